// Package staleness has nothing but a test: the simulation behind docs/staleness.md.
//
// It runs the real cache and other strategies for 60 days of virtual time on simulated back ends, while permissions
// change. It measures how long each strategy takes to hold a token that carries a change, and how many calls that
// costs. A small run is part of every test run. The full run needs the build tag staleness; `make bench-staleness`
// starts it and rewrites the page.
package staleness
