package hubtest

import (
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"unicode"
)

// query is a query in IoT Hub's language, as far as the hub knows it: SELECT *, COUNT() or fields, FROM devices or
// devices.modules, WHERE with AND, OR, NOT, parentheses, IN, IS_DEFINED, and comparisons of fields with primitives.
// What it does not know is an error.
//
// Source: IoT Hub, "Query language for device and module twins".
type query struct {
	fields  []selection // nil: everything
	count   string      // the name of COUNT(); empty: there is none
	modules bool
	where   condition // nil: all
}

// selection is one field of a projection.
type selection struct{ path, name string }

// condition reports whether a twin satisfies it. A comparison with what is not there, or is no primitive, is neither
// true nor false.
type condition func(twin object) truth

type truth int8

const (
	isFalse truth = iota - 1
	isUnknown
	isTrue
)

// parser reads a query by its words.
type parser struct {
	words []string
	at    int
}

// parseQuery reads a whole query.
func parseQuery(text string) (q query, err error) {
	p, err := newParser(text)
	if err != nil {
		return q, err
	}
	if !p.skip("select") {
		return q, p.unexpected("SELECT")
	}
	if err := q.readSelection(p); err != nil {
		return q, err
	}
	if !p.skip("from") {
		return q, p.unexpected("FROM")
	}
	switch {
	case p.skip("devices.modules"):
		q.modules = true
	case p.skip("devices"):
	default:
		return q, p.unexpected("devices or devices.modules")
	}
	if p.skip("where") {
		if q.where, err = p.disjunction(0); err != nil {
			return q, err
		}
	}
	if p.at < len(p.words) {
		return q, p.unexpected("the end")
	}
	return q, nil
}

// parseCondition reads the target condition of a configuration: what stands behind WHERE, "*" for all, or for modules
// FROM devices.modules WHERE …
func parseCondition(text string) (modules bool, where condition, err error) {
	text = strings.TrimSpace(text)
	if text == "*" {
		return false, nil, nil
	}
	if strings.HasPrefix(strings.ToLower(text), "from ") {
		q, err := parseQuery("SELECT * " + text)
		return q.modules, q.where, err
	}
	p, err := newParser(text)
	if err != nil {
		return false, nil, err
	}
	if where, err = p.disjunction(0); err == nil && p.at < len(p.words) {
		err = p.unexpected("the end")
	}
	return false, where, err
}

// maxQuery bounds a query, in bytes.
const maxQuery = 8 << 10

// newParser cuts a query into words: names with dots, numbers, strings in quotes, and marks.
func newParser(text string) (*parser, error) {
	if len(text) > maxQuery {
		return nil, fmt.Errorf("the query has more than %d bytes", maxQuery)
	}
	p := &parser{}
	for rest := strings.TrimSpace(text); rest != ""; rest = strings.TrimSpace(rest) {
		n := 1
		switch first := rune(rest[0]); {
		case first == '\'' || first == '"':
			end := strings.IndexRune(rest[1:], first)
			if end < 0 {
				return nil, fmt.Errorf("a string does not end: %.40s", rest)
			}
			n = end + 2
		case isWord(first) || first == '-':
			n = len(rest)
			if end := strings.IndexFunc(rest[1:], func(r rune) bool { return !isWord(r) }); end >= 0 {
				n = end + 1
			}
		case slices.Contains([]string{"!=", "<>", "<=", ">="}, rest[:min(2, len(rest))]):
			n = 2
		case !strings.ContainsRune("()[],=<>*", first):
			return nil, fmt.Errorf("unexpected %.40q", rest)
		}
		p.words = append(p.words, rest[:n])
		rest = rest[n:]
	}
	return p, nil
}

func isWord(r rune) bool {
	return r == '.' || r == '_' || r == '$' || r < 0x80 && (unicode.IsLetter(r) || unicode.IsDigit(r))
}

// next returns the next word; empty: there is none.
func (p *parser) next() string {
	if p.at == len(p.words) {
		return ""
	}
	return p.words[p.at]
}

// skip takes the next word if it is that one.
func (p *parser) skip(word string) bool {
	if !strings.EqualFold(p.next(), word) {
		return false
	}
	p.at++
	return true
}

func (p *parser) unexpected(want string) error {
	if p.next() == "" {
		return fmt.Errorf("the query ends where %s is expected", want)
	}
	return fmt.Errorf("%q stands where %s is expected", p.next(), want)
}

func (q *query) readSelection(p *parser) error {
	if p.skip("*") {
		return nil
	}
	for {
		var s selection
		isCount := p.skip("count")
		if isCount {
			if !p.skip("(") || !p.skip(")") {
				return p.unexpected("()")
			}
		} else {
			path, err := p.path()
			if err != nil {
				return err
			}
			s = selection{path: path, name: path[strings.LastIndexByte(path, '.')+1:]}
		}
		if p.skip("as") {
			name, err := p.path()
			if err != nil {
				return err
			}
			s.name = name
		}
		switch {
		case isCount && (s.name == "" || q.fields != nil || q.count != ""):
			return fmt.Errorf("COUNT() stands alone, and has a name: COUNT() AS n")
		case isCount:
			q.count = s.name
		default:
			q.fields = append(q.fields, s)
		}
		if !p.skip(",") {
			return nil
		}
	}
}

// The roots of paths in a twin.
var pathRoots = []string{
	"deviceId", "moduleId", "status", "connectionState", "etag", "version", "tags", "properties", "authenticationType",
}

// path takes a name with dots.
func (p *parser) path() (string, error) {
	word := p.next()
	first := rune(0)
	if word != "" {
		first = rune(word[0])
	}
	if !unicode.IsLetter(first) && first != '_' && first != '$' || strings.HasSuffix(word, ".") ||
		strings.Contains(word, "..") {
		return "", p.unexpected("a name")
	}
	p.at++
	return word, nil
}

// maxNesting bounds parentheses and NOTs within each other.
const maxNesting = 32

func (p *parser) disjunction(depth int) (condition, error) {
	return p.joined(depth, "or", (*parser).conjunction, func(x, y truth) truth { return max(x, y) })
}

func (p *parser) conjunction(depth int) (condition, error) {
	return p.joined(depth, "and", (*parser).term, func(x, y truth) truth { return min(x, y) })
}

// joined takes conditions with a word between them.
func (p *parser) joined(
	depth int, word string, part func(*parser, int) (condition, error), join func(x, y truth) truth,
) (condition, error) {
	all, err := part(p, depth)
	for err == nil && p.skip(word) {
		before := all
		var next condition
		if next, err = part(p, depth); err == nil {
			all = func(twin object) truth { return join(before(twin), next(twin)) }
		}
	}
	return all, err
}

func (p *parser) term(depth int) (condition, error) {
	if depth > maxNesting {
		return nil, fmt.Errorf("the query nests deeper than %d levels", maxNesting)
	}
	switch {
	case p.skip("not"):
		of, err := p.term(depth + 1)
		return func(twin object) truth { return -of(twin) }, err
	case p.skip("("):
		of, err := p.disjunction(depth + 1)
		if err == nil && !p.skip(")") {
			err = p.unexpected(")")
		}
		return of, err
	case p.skip("is_defined"):
		return p.isDefined()
	}
	path, err := p.field()
	if err != nil {
		return nil, err
	}
	if p.skip("in") {
		return p.in(path)
	}
	return p.comparison(path)
}

// field takes a path that begins as those of twins do.
func (p *parser) field() (string, error) {
	root, _, _ := strings.Cut(p.next(), ".")
	if !slices.Contains(pathRoots, root) {
		return "", p.unexpected("a field of a twin")
	}
	return p.path()
}

func (p *parser) isDefined() (condition, error) {
	if !p.skip("(") {
		return nil, p.unexpected("(")
	}
	path, err := p.field()
	if err != nil {
		return nil, err
	}
	if !p.skip(")") {
		return nil, p.unexpected(")")
	}
	return func(twin object) truth {
		if _, there := lookUp(twin, path); there {
			return isTrue
		}
		return isFalse
	}, nil
}

func (p *parser) in(path string) (condition, error) {
	if !p.skip("[") {
		return nil, p.unexpected("[")
	}
	var values []any
	for {
		value, err := p.literal()
		if err != nil {
			return nil, err
		}
		values = append(values, value)
		if p.skip("]") {
			break
		}
		if !p.skip(",") {
			return nil, p.unexpected(", or ]")
		}
	}
	return func(twin object) truth {
		found := isUnknown
		for _, value := range values {
			found = max(found, compare(twin, path, "=", value))
		}
		if found == isUnknown {
			if held, there := lookUp(twin, path); there && isPrimitive(held) {
				return isFalse
			}
		}
		return found
	}, nil
}

func (p *parser) comparison(path string) (condition, error) {
	operator := p.next()
	if !slices.Contains([]string{"=", "!=", "<>", "<", ">", "<=", ">="}, operator) {
		return nil, p.unexpected("a comparison")
	}
	p.at++
	value, err := p.literal()
	if err != nil {
		return nil, err
	}
	return func(twin object) truth { return compare(twin, path, operator, value) }, nil
}

// literal takes a string, a number, true, false or null.
func (p *parser) literal() (any, error) {
	word := p.next()
	number := json.Number(word)
	_, isNumber := new(big.Float).SetString(word)
	switch {
	case word == "":
		return nil, p.unexpected("a value")
	case word[0] == '\'' || word[0] == '"':
		p.at++
		return word[1 : len(word)-1], nil
	case p.skip("true"):
		return true, nil
	case p.skip("false"):
		return false, nil
	case p.skip("null"):
		return nil, nil
	case isNumber && (unicode.IsDigit(rune(word[0])) || word[0] == '-'):
		p.at++
		return number, nil
	}
	return nil, p.unexpected("a string, a number, true, false or null")
}

// lookUp returns what is at a path of a twin.
func lookUp(twin object, path string) (value any, there bool) {
	value = twin
	for _, name := range strings.Split(path, ".") {
		within, isObject := value.(object)
		if !isObject {
			return nil, false
		}
		if value, there = within[name]; !there {
			return nil, false
		}
	}
	return value, true
}

func isPrimitive(value any) bool {
	switch value.(type) {
	case object, []any:
		return false
	}
	return true
}

// compare compares the value at a path with another. Values of different types cannot be compared.
func compare(twin object, path, operator string, with any) truth {
	held, there := lookUp(twin, path)
	if !there || !isPrimitive(held) {
		return isUnknown
	}
	order, comparable := orderOf(held, with)
	if !comparable {
		return isUnknown
	}
	holds := false
	switch operator {
	case "=":
		holds = order == 0
	case "!=", "<>":
		holds = order != 0
	case "<":
		holds = order < 0
	case ">":
		holds = order > 0
	case "<=":
		holds = order <= 0
	case ">=":
		holds = order >= 0
	}
	if holds {
		return isTrue
	}
	return isFalse
}

// orderOf returns whether x is before (-1), as (0) or after (1) y, where they are of one type.
func orderOf(x, y any) (order int, comparable bool) {
	if x, isText := x.(string); isText {
		y, isText := y.(string)
		return strings.Compare(x, y), isText
	}
	if x, y := numberOf(x), numberOf(y); x != nil && y != nil {
		return x.Cmp(y), true
	}
	if x, isBool := x.(bool); isBool {
		y, isBool := y.(bool)
		if x == y {
			return 0, isBool
		}
		return 1, isBool
	}
	return 0, x == nil && y == nil
}

// numberOf returns a number of a twin; nil: it is none.
func numberOf(value any) *big.Float {
	switch v := value.(type) {
	case json.Number:
		n, _ := new(big.Float).SetString(v.String())
		return n
	case int64:
		return new(big.Float).SetInt64(v)
	case uint64:
		return new(big.Float).SetUint64(v)
	}
	return nil
}

// run returns what a query makes of twins.
func (q *query) run(twins []object) []object {
	var all []object
	for _, twin := range twins {
		if q.where != nil && q.where(twin) != isTrue {
			continue
		}
		if q.fields == nil {
			all = append(all, twin)
			continue
		}
		row := object{}
		for _, s := range q.fields {
			if value, there := lookUp(twin, s.path); there {
				row[s.name] = value
			}
		}
		all = append(all, row)
	}
	if q.count != "" {
		return []object{{q.count: len(all)}}
	}
	return all
}
