package main

import (
	"errors"
	"fmt"

	"github.com/pelletier/go-toml/v2/unstable"

	"perceptd/agent"
)

// places remembers in which file and line each [[identity]] and [[grant]] stands, in the order of
// config's lists.
type places struct {
	identities, grants []string // "FILE:LINE"
	last               string   // the file read last
}

// add notes the tables of one file, which is known to be sound TOML.
func (p *places) add(file string, text []byte) {
	p.last = file
	var parser unstable.Parser
	parser.Reset(text)
	for parser.NextExpression() {
		table := parser.Expression()
		if table.Kind != unstable.ArrayTable {
			continue
		}
		var name []byte
		keys := table.Key()
		var at unstable.Range
		for keys.Next() {
			name, at = keys.Node().Data, keys.Node().Raw
		}
		place := fmt.Sprintf("%s:%d", file, parser.Shape(at).Start.Line)
		switch string(name) {
		case "identity":
			p.identities = append(p.identities, place)
		case "grant":
			p.grants = append(p.grants, place)
		}
	}
}

// of returns where the table is, or the file alone for one written inline.
func (p *places) of(kind string, index int) string {
	list := p.identities
	if kind == "grant" {
		list = p.grants
	}
	if index >= 0 && index < len(list) && kind != "sdk_life" {
		return list[index]
	}
	return p.last
}

// locate puts file and line before each fault that the rules found.
func (p *places) locate(err error) error {
	faults, many := err.(interface{ Unwrap() []error })
	if !many {
		return err
	}
	var located []error
	for _, fault := range faults.Unwrap() {
		var rule *agent.RuleError
		if errors.As(fault, &rule) {
			fault = fmt.Errorf("%s: %w", p.of(rule.Kind, rule.Index), rule)
		}
		located = append(located, fault)
	}
	return errors.Join(located...)
}
