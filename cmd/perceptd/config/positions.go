package config

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// written is a configuration file that is TOML: what it says, and where each of its keys stands.
type written struct {
	name   string
	values int // how many tables and values it has
	keys   map[string]any
	top    []string          // the keys of keys, in the order of the file
	places map[string]string // path → "FILE:LINE"
	tables map[string]int    // path of a list of tables → how many were there so far
	lines  []int             // where each line ends
}

// parse reads a file. The error says where it is not TOML, and what is wrong there.
func parse(file File) (*written, error) {
	text, err := plainText(file)
	if err != nil {
		return nil, err
	}
	values := countValues(text)
	if values > maxValues {
		return nil, crowded(file.Path)
	}
	w := &written{name: file.Path, values: values, places: make(map[string]string), tables: make(map[string]int)}
	if err := toml.Unmarshal(text, &w.keys); err != nil {
		return nil, notTOML(file.Path, text, err)
	}
	for i, c := range text {
		if c == '\n' {
			w.lines = append(w.lines, i)
		}
	}
	w.locate(text)
	return w, nil
}

// maxValues bounds the tables and values of all files together. Some hundred modules have a tenth of that.
const maxValues = 10_000

func crowded(path string) error {
	return fmt.Errorf("%s: with it there are more than %d tables and values: take out what the device does not need",
		path, maxValues)
}

// countValues counts the tables and values of a file, up to one more than there may be. It comes before the file is
// read as TOML, which takes a time that is quadratic in them.
func countValues(text []byte) (n int) {
	var parser unstable.Parser
	parser.Reset(text)
	for n <= maxValues && parser.NextExpression() {
		n += valuesIn(parser.Expression())
	}
	return min(n, maxValues+1)
}

// valuesIn counts a value or table, and what is in it.
func valuesIn(node *unstable.Node) int {
	n := 1
	switch node.Kind {
	case unstable.Comment:
		return 0
	case unstable.KeyValue:
		return valuesIn(node.Value())
	case unstable.Array, unstable.InlineTable:
		for parts := node.Children(); parts.Next(); {
			n += valuesIn(parts.Node())
		}
	}
	return n
}

// locate notes where the tables and values of the file stand.
func (w *written) locate(text []byte) {
	var parser unstable.Parser
	parser.Reset(text)
	table := ""
	for parser.NextExpression() {
		switch e := parser.Expression(); e.Kind {
		case unstable.Table:
			table = w.note("", e.Key())
		case unstable.ArrayTable:
			list := w.note("", e.Key())
			table = below(list, strconv.Itoa(w.tables[list]))
			w.tables[list]++
			w.places[table] = w.places[list+lastHeader]
		case unstable.KeyValue:
			w.notePair(table, e)
		}
	}
}

// lastHeader is below a list of tables where its last header stands. No key has it: what follows a separator is not
// empty there.
const lastHeader = separator + separator

// note notes where the parts of a dotted key stand, and returns the path of the last one. Of a list of tables it is the
// last table that a key leads into.
func (w *written) note(table string, key unstable.Iterator) (path string) {
	path = table
	for key.Next() && !isDeep(path) {
		if n := w.tables[path]; n > 0 {
			path = below(path, strconv.Itoa(n-1))
		}
		part := key.Node()
		path = below(path, string(part.Data))
		place := w.position(part.Raw)
		if _, known := w.places[path]; !known {
			w.places[path] = place
			if !strings.Contains(path, separator) {
				w.top = append(w.top, path)
			}
		}
		w.places[path+lastHeader] = place
	}
	return path
}

func (w *written) notePair(table string, pair *unstable.Node) {
	w.noteInside(w.note(table, pair.Key()), pair.Value())
}

// noteInside notes what is in a value.
func (w *written) noteInside(path string, value *unstable.Node) {
	i := 0
	for parts := value.Children(); parts.Next() && !isDeep(path); {
		switch part := parts.Node(); {
		case part.Kind == unstable.Comment:
		case value.Kind == unstable.InlineTable:
			w.notePair(path, part)
		case value.Kind == unstable.Array:
			element := below(path, strconv.Itoa(i))
			i++
			if part.Raw.Length > 0 {
				w.places[element] = w.position(part.Raw)
			}
			w.noteInside(element, part)
		}
	}
}

func (w *written) position(at unstable.Range) string {
	line, _ := slices.BinarySearch(w.lines, int(at.Offset))
	return fmt.Sprintf("%s:%d", w.name, line+1)
}

// place returns where what is at a path stands, or what it is in.
func (w *written) place(path string) string {
	for path != "" {
		if place, known := w.places[path]; known {
			return place
		}
		path = path[:max(strings.LastIndex(path, separator), 0)]
	}
	return w.name
}

// isDeep reports whether what is below a path is so deep that no table of a configuration has it: it counts as being
// where the path is, since each place has the whole path.
func isDeep(path string) bool {
	const deepest = 8
	return strings.Count(path, separator) >= deepest
}

// separator is between the keys of a path.
const separator = "\x00"

// below returns the path of a key of a table.
func below(table, key string) string {
	if table == "" {
		return key
	}
	return table + separator + key
}
