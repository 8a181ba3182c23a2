package main

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
)

// TestArchitecture shows that the drawing in docs/architecture.md is that of the packages as they are. With
// ARCHITECTURE_DOCS=1 it draws it anew.
func TestArchitecture(t *testing.T) {
	t.Parallel()
	const file = "../../docs/architecture.svg"
	imports := make(map[string][]string)
	for _, p := range listed(t, "perceptd/...") {
		name := strings.TrimPrefix(p.ImportPath, "perceptd/")
		if slices.Contains(p.Imports, "testing") || name == "tokencache/tokencachetest" { // it is for tests alone
			continue
		}
		for _, imported := range p.Imports {
			if of, ours := strings.CutPrefix(imported, "perceptd/"); ours {
				imports[name] = append(imports[name], of)
			}
		}
	}
	drawn := drawImports(imports)
	if os.Getenv("ARCHITECTURE_DOCS") != "" {
		if err := os.WriteFile(file, drawn, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	committed, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(committed, drawn) {
		t.Error("docs/architecture.svg is not what the packages import: make architecture")
	}
}

// Measures of the drawing, in pixels.
const (
	boxHigh          = 30.0
	letterWide       = 7.4  // at most, on average
	bendWide         = 12.0 // room for an arrow that passes a layer
	boxGap, layerGap = 14.0, 62.0
	margin           = 20.0
)

// node is a package in its layer, or the bend of an arrow that passes the layer.
type node struct {
	name       string // "" for a bend
	layer      int
	x          float64 // of its middle
	from, to   []*node // where arrows come from, one layer up, and go to, one layer down
	barycentre float64
}

func (n *node) wide() float64 {
	if n.name == "" {
		return bendWide
	}
	return float64(len(n.name))*letterWide + 20
}

func (n *node) top() float64 { return margin + float64(n.layer)*(boxHigh+layerGap) }

// layers is a drawing from top to bottom, each layer from left to right.
type layers [][]*node

// drawImports draws which package imports which as an SVG. An import that follows from others is left out.
func drawImports(imports map[string][]string) []byte {
	drawing := layersOf(reduced(imports))
	drawing.untangle()
	drawing.place()
	return drawing.svg()
}

// reduced returns imports without those that other imports imply: of a to b, b to c and a to c it leaves out the last.
func reduced(imports map[string][]string) map[string][]string {
	var reaches func(from, to string) bool
	reaches = func(from, to string) bool {
		return slices.ContainsFunc(imports[from], func(by string) bool { return by == to || reaches(by, to) })
	}
	direct := make(map[string][]string)
	for from, all := range imports {
		for _, to := range all {
			if !slices.ContainsFunc(all, func(by string) bool { return reaches(by, to) }) {
				direct[from] = append(direct[from], to)
			}
		}
		slices.Sort(direct[from])
	}
	return direct
}

// layersOf puts each package directly below the lowest of those that import it.
func layersOf(imports map[string][]string) layers {
	layer := make(map[string]int)
	var sink func(name string, to int)
	sink = func(name string, to int) {
		layer[name] = max(layer[name], to)
		for _, imported := range imports[name] {
			sink(imported, layer[name]+1)
		}
	}
	for name := range imports {
		sink(name, 0)
	}
	all := make(layers, slices.Max(slices.Collect(maps.Values(layer)))+1)
	add := func(name string, in int) *node {
		n := &node{name: name, layer: in}
		all[in] = append(all[in], n)
		return n
	}
	nodes := make(map[string]*node)
	for _, name := range slices.Sorted(maps.Keys(layer)) {
		nodes[name] = add(name, layer[name])
	}
	for _, name := range slices.Sorted(maps.Keys(imports)) {
		for _, imported := range imports[name] {
			from, to := nodes[name], nodes[imported]
			for from.layer+1 < to.layer {
				bend := add("", from.layer+1)
				from.to, bend.from = append(from.to, bend), []*node{from}
				from = bend
			}
			from.to, to.from = append(from.to, to), append(to.from, from)
		}
	}
	return all
}

// untangle orders each layer so that few arrows cross. It starts from random orders, sorts each layer by the mean place
// of the nodes that arrows come from, then of those that arrows go to, a few times, and takes the best result.
func (ls layers) untangle() {
	random := rand.New(rand.NewPCG(1, 1))
	fewest, best := math.MaxInt, layers(nil)
	for range 300 {
		for _, l := range ls {
			random.Shuffle(len(l), func(i, j int) { l[i], l[j] = l[j], l[i] })
		}
		for range 8 {
			for _, l := range ls {
				ls.sortBy(l, func(n *node) []*node { return n.from })
			}
			for _, l := range slices.Backward(ls) {
				ls.sortBy(l, func(n *node) []*node { return n.to })
			}
			if n := ls.crossings(); n < fewest {
				fewest, best = n, nil
				for _, l := range ls {
					best = append(best, slices.Clone(l))
				}
			}
		}
	}
	copy(ls, best)
}

func (ls layers) sortBy(l []*node, neighbours func(*node) []*node) {
	for at, n := range l {
		n.barycentre = float64(at)
		if all := neighbours(n); len(all) > 0 {
			sum := 0
			for _, other := range all {
				sum += slices.Index(ls[other.layer], other)
			}
			n.barycentre = float64(sum) / float64(len(all))
		}
	}
	slices.SortStableFunc(l, func(a, b *node) int { return cmp.Compare(a.barycentre, b.barycentre) })
}

func (ls layers) crossings() (n int) {
	for _, l := range ls {
		for i, left := range l {
			for _, right := range l[i+1:] {
				for _, a := range left.to {
					for _, b := range right.to {
						if slices.Index(ls[a.layer], a) > slices.Index(ls[b.layer], b) {
							n++
						}
					}
				}
			}
		}
	}
	return n
}

// place moves the nodes of each layer towards their neighbours, without changing their order.
func (ls layers) place() {
	for range 60 {
		for _, l := range ls {
			settle(l, func(n *node) []*node { return n.from })
		}
		for _, l := range slices.Backward(ls) {
			settle(l, func(n *node) []*node { return slices.Concat(n.from, n.to) })
		}
	}
	left := math.Inf(1)
	for _, l := range ls {
		left = min(left, l[0].x-l[0].wide()/2)
	}
	for _, l := range ls {
		for _, n := range l {
			n.x += margin - left
		}
	}
}

// settle puts nodes as near as room allows to the middle of their neighbours. Nodes that would overlap become a block,
// which stands at the mean of the places that its nodes want for it.
func settle(l []*node, neighbours func(*node) []*node) {
	type block struct{ sum, nodes float64 }
	var blocks []block
	at := 0.0 // where the node is if the whole layer is packed
	packed := make([]float64, len(l))
	for i, n := range l {
		if i > 0 {
			at += l[i-1].wide()/2 + boxGap + n.wide()/2
		}
		packed[i] = at
		wish := n.x
		if all := neighbours(n); len(all) > 0 {
			sum, weights := 0.0, 0.0
			for _, other := range all {
				weight := 1.0
				if n.name == "" && other.name == "" { // so that long arrows are straight
					weight = 8
				}
				sum, weights = sum+weight*other.x, weights+weight
			}
			wish = sum / weights
		}
		b := block{wish - at, 1}
		for len(blocks) > 0 && blocks[len(blocks)-1].sum/blocks[len(blocks)-1].nodes > b.sum/b.nodes {
			last := blocks[len(blocks)-1]
			b = block{last.sum + b.sum, last.nodes + b.nodes}
			blocks = blocks[:len(blocks)-1]
		}
		blocks = append(blocks, b)
	}
	i := 0
	for _, b := range blocks {
		for range int(b.nodes) {
			l[i].x = packed[i] + b.sum/b.nodes
			i++
		}
	}
}

// svg draws on a background of its own, so that it reads the same in light and dark surroundings.
func (ls layers) svg() []byte {
	var b bytes.Buffer
	wide := 0.0
	for _, l := range ls {
		last := l[len(l)-1]
		wide = max(wide, last.x+last.wide()/2)
	}
	high := ls[len(ls)-1][0].top() + boxHigh + margin
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" role="img" `, wide+margin, high)
	b.WriteString(`font-family="system-ui, sans-serif" font-size="14" fill="#20242a">` + "\n")
	b.WriteString("<title>The packages of perceptd: each imports those below that its arrows lead to</title>\n")
	b.WriteString(`<defs><marker id="head" viewBox="0 0 8 8" refX="7.5" refY="4" ` +
		`markerWidth="8" markerHeight="8" orient="auto"><path d="M0,0.8 L8,4 L0,7.2 Z" ` +
		`fill="#5c6570"/></marker></defs>` + "\n")
	fmt.Fprintf(&b, `<rect width="%.0f" height="%.0f" rx="6" fill="#fdfdfc"/>`+"\n", wide+margin, high)
	for _, l := range ls {
		for _, n := range l {
			if n.name == "" {
				continue
			}
			for i := range n.to {
				n.arrow(&b, i)
			}
		}
	}
	for _, l := range ls {
		for _, n := range l {
			if n.name == "" {
				continue
			}
			fill := "#eef1f5"
			if strings.HasPrefix(n.name, "cmd/") {
				fill = "#cfe2fb"
			}
			fmt.Fprintf(&b, `<rect x="%.1f" y="%.1f" width="%.0f" height="%.0f" rx="4" fill="%s" stroke="#5c6570"/>`,
				n.x-n.wide()/2, n.top(), n.wide(), boxHigh, fill)
			fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="middle">%s</text>`+"\n",
				n.x, n.top()+boxHigh/2+5, n.name)
		}
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// arrow draws the ith arrow from n through its bends to the package that it leads to.
func (n *node) arrow(b *bytes.Buffer, i int) {
	x, y := n.port(n.to, n.to[i]), n.top()+boxHigh
	fmt.Fprintf(b, `<path d="M%.1f,%.1f`, x, y)
	from, to := n, n.to[i]
	for {
		at := to.x
		if to.name != "" {
			at = to.port(to.from, from)
		}
		middle := (y + to.top()) / 2
		fmt.Fprintf(b, " C%.1f,%.1f %.1f,%.1f %.1f,%.1f", x, middle, at, middle, at, to.top())
		if to.name != "" {
			break
		}
		x, y = at, to.top()+boxHigh
		fmt.Fprintf(b, " L%.1f,%.1f", x, y)
		from, to = to, to.to[0]
	}
	b.WriteString(`" fill="none" stroke="#5c6570" stroke-width="1.2" marker-end="url(#head)"/>` + "\n")
}

// port returns where on n's edge the arrow from or to one of its neighbours begins or ends: in the neighbours' order.
func (n *node) port(all []*node, other *node) float64 {
	right := 0
	for _, o := range all {
		if o.x < other.x {
			right++
		}
	}
	return n.x + (float64(right)-float64(len(all)-1)/2)*min(18, (n.wide()-10)/float64(len(all)))
}
