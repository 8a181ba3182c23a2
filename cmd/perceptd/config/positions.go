package config

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/pelletier/go-toml/v2/unstable"

	"perceptd/agent/grants"
)

// positions remembers in which file and line each table and each single value of the configuration stands.
type positions struct {
	// tables has where the tables of each kind stand, "identity", "grant", "resource" or "module", as "FILE:LINE", in
	// the order of Config's lists.
	tables map[string][]string
	values map[string]string // "source.kind" → "FILE:LINE", where it was set last
	last   string            // the file read last
}

func newPositions() *positions {
	return &positions{tables: make(map[string][]string), values: make(map[string]string)}
}

// tableCounts is how many tables of each kind a file has.
type tableCounts struct{ identities, grants, resources, modules int }

func (p *positions) counts() tableCounts {
	return tableCounts{
		len(p.tables["identity"]), len(p.tables["grant"]), len(p.tables["resource"]), len(p.tables["module"]),
	}
}

// add notes the tables and values of one file, which is known to be sound TOML, and returns how many
// tables it has.
func (p *positions) add(file string, text []byte) tableCounts {
	p.last = file
	before := p.counts()
	var parser unstable.Parser
	parser.Reset(text)
	f := positionedFile{positions: p, name: file, left: text, line: 1}
	table := ""
	for parser.NextExpression() {
		switch e := parser.Expression(); e.Kind {
		case unstable.Table:
			var at unstable.Range
			table, at = dotted("", e.Key())
			p.values[table] = f.position(at) // where a single value belongs, perhaps
		case unstable.ArrayTable:
			var at unstable.Range
			table, at = dotted("", e.Key())
			p.tables[table] = append(p.tables[table], f.position(at))
		case unstable.KeyValue:
			f.add(table, e)
		}
	}
	after := p.counts()
	return tableCounts{
		after.identities - before.identities, after.grants - before.grants,
		after.resources - before.resources, after.modules - before.modules,
	}
}

// table returns where the table of that kind and index in Config's list stands.
func (p *positions) table(kind string, index int) string {
	if list := p.tables[kind]; index < len(list) {
		return list[index]
	}
	return p.last // there is none, which may be the fault
}

// value returns where a key has its value from.
func (p *positions) value(key string) string {
	if place, ok := p.values[key]; ok {
		return place
	}
	return p.last
}

// locate puts file and line before each fault that the rules found.
func (p *positions) locate(err error) error {
	faults, many := err.(interface{ Unwrap() []error })
	if !many {
		return err
	}
	var located []error
	for _, fault := range faults.Unwrap() {
		var rule *grants.RuleError
		if errors.As(fault, &rule) {
			place := p.table(rule.Kind, rule.Index)
			if rule.Kind == "sdk_life" || rule.Kind == "spread" {
				place = p.value("tokens." + rule.Kind)
			}
			fault = fmt.Errorf("%s: %w", place, rule)
		}
		located = append(located, fault)
	}
	return errors.Join(located...)
}

// positionedFile is a file that is gone through from its beginning to its end.
type positionedFile struct {
	positions *positions
	name      string
	left      []byte // from offset
	offset    int
	line      int // of offset
}

// position returns file and line of a range, which begins no earlier than the one before.
func (f *positionedFile) position(at unstable.Range) string {
	skipped := int(at.Offset) - f.offset
	f.line += bytes.Count(f.left[:skipped], []byte("\n"))
	f.left, f.offset = f.left[skipped:], int(at.Offset)
	return fmt.Sprintf("%s:%d", f.name, f.line)
}

// add notes a value of a table, and tables that are written inline.
func (f *positionedFile) add(table string, pair *unstable.Node) {
	key, at := dotted(table, pair.Key())
	f.positions.values[key] = f.position(at)
	switch value := pair.Value(); value.Kind {
	case unstable.InlineTable:
		f.addPairs(key, value)
	case unstable.Array:
		for elements := value.Children(); elements.Next(); {
			if element := elements.Node(); element.Kind == unstable.InlineTable {
				f.positions.tables[key] = append(f.positions.tables[key], f.position(element.Raw))
				f.addPairs(key, element)
			}
		}
	}
}

func (f *positionedFile) addPairs(table string, inline *unstable.Node) {
	for pairs := inline.Children(); pairs.Next(); {
		if pair := pairs.Node(); pair.Kind == unstable.KeyValue {
			f.add(table, pair)
		}
	}
}

// dotted joins a key below a table and returns where its last part stands.
func dotted(table string, parts unstable.Iterator) (key string, at unstable.Range) {
	key = table
	for parts.Next() {
		if key != "" {
			key += "."
		}
		key += string(parts.Node().Data)
		at = parts.Node().Raw
	}
	return key, at
}

// located puts where it stands before a fault, if there is one.
func located(place string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", place, err)
}
