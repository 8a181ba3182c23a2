package server

import (
	"cmp"
	"time"

	"perceptd/agent/server/limit"
)

// Limits bounds how long a connection may take over each thing, and how much callers may take at once. Zero fields mean
// the defaults.
type Limits struct {
	Header time.Duration // to send a request's header; 5 s
	Answer time.Duration // until a request for a token is answered, beside what it asked to wait; 8 s, so that 10 s are kept on a busy device too
	Admin  time.Duration // until a request on the admin socket is answered; 8 s as well
	Idle   time.Duration // between two requests on one connection; 60 s
	Place  time.Duration // that a connection waits for a place when all are taken; 1 s
	Alive  time.Duration // between two signs of life on a stream of events; 15 s

	Waiting     int // requests of one caller at once that asked to wait, and of all that one user runs; 64
	AllWaiting  int // such requests at once, a quarter of them for modules alone; 192
	Watching    int // streams of events of one caller at once, half of what all that one user runs may have; 16
	AllWatching int // streams of events at once, a quarter of them for modules alone; 128

	Connections int // at once on the socket of all local services; 1,024
	PerCaller   int // of one user, one unit or one container there; a quarter of Connections
	Modules     int // at once on all modules' sockets, each of which has its part, 128 at most and 2 at least; 512

	AdminConnections int // at once on the admin socket, a quarter of them for root alone; 64
	AdminPerUser     int // of one user there; a quarter of AdminConnections
	AdminRequests    int // under way at once on the admin socket, half of them of one user; 16

	LoopbackConnections int // at once on the loopback listener; 128
	LoopbackPerUser     int // of one user there; half of LoopbackConnections

	PerSecond int // requests of one caller on a token socket, in the long run; 200. More wait, and then get 429
	Burst     int // requests of one caller at once; 400
}

// orDefaults fills in the zero fields.
func (l Limits) orDefaults() Limits {
	for _, limit := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&l.Header, 5 * time.Second},
		{&l.Answer, 8 * time.Second},
		{&l.Admin, 8 * time.Second},
		{&l.Idle, 60 * time.Second},
		{&l.Place, time.Second},
		{&l.Alive, 15 * time.Second},
	} {
		*limit.field = cmp.Or(*limit.field, limit.value)
	}
	for _, limit := range []struct {
		field *int
		value int
	}{
		{&l.Waiting, 64}, {&l.AllWaiting, 192}, {&l.Watching, 16}, {&l.AllWatching, 128},
		{&l.Connections, 1024}, {&l.Modules, 512}, {&l.AdminConnections, 64}, {&l.AdminRequests, 16},
		{&l.LoopbackConnections, 128}, {&l.PerSecond, 200}, {&l.Burst, 400},
	} {
		*limit.field = cmp.Or(*limit.field, limit.value)
	}
	l.PerCaller = cmp.Or(l.PerCaller, max(1, l.Connections/4))
	l.AdminPerUser = cmp.Or(l.AdminPerUser, max(1, l.AdminConnections/4))
	l.LoopbackPerUser = cmp.Or(l.LoopbackPerUser, max(1, l.LoopbackConnections/2))
	return l
}

const (
	// perConnection is how many descriptors a connection takes: itself, and a hold on the process at its other end.
	perConnection = 2

	// busyCallers is as how many busy callers, with a connection for each request, all callers of one user may connect on
	// the socket of all local services, and once more each of its units.
	busyCallers = 5
)

// capacities returns how many connections each kind of listener has room for.
func (l Limits) capacities() (tokens, modules, admin, loopback limit.Capacity) {
	tokens = limit.Capacity{
		Name: "token socket", Total: l.Connections, PerParent: l.PerCaller, PerKey: l.PerCaller - l.PerCaller/8,
		ForRoot: l.Connections / 16, Line: max(1, l.Connections/16), LinePerParent: max(1, l.Connections/64),
		Refused: 3 * l.Connections / 8,
	}
	modules = limit.Capacity{
		Name: "modules' sockets", Total: l.Modules, PerModule: true,
		Line: max(1, l.Modules/8), LinePerParent: max(1, l.Modules/64), Refused: l.Modules / 8,
	}
	admin = limit.Capacity{
		Name: "admin socket", Total: l.AdminConnections, PerParent: l.AdminPerUser, PerKey: l.AdminPerUser,
		ForRoot: l.AdminConnections / 4, Line: max(1, l.AdminConnections/4), LinePerParent: max(1, l.AdminConnections/16),
		Refused: l.AdminConnections / 2,
	}
	loopback = limit.Capacity{
		Name: "loopback listener", Total: l.LoopbackConnections, PerParent: l.LoopbackPerUser, PerKey: l.LoopbackPerUser,
		Line: l.LoopbackConnections, LinePerParent: max(1, l.LoopbackPerUser), Refused: 9 * l.LoopbackConnections / 4,
	}
	for _, c := range [...]*limit.Capacity{&tokens, &modules, &admin, &loopback} {
		c.LineTimeout = l.Place
	}
	return tokens, modules, admin, loopback
}

// mostArriving is how many connections may wait until it is found out who calls.
func (l Limits) mostArriving() int { return max(1, l.Connections/2) }

// most is how many connections there can be at once, those included that wait for a place or for their refusal.
func (l Limits) most() (sum int) {
	tokens, modules, admin, loopback := l.capacities()
	for _, c := range [...]limit.Capacity{tokens, modules, admin, loopback} {
		sum += c.Total + c.Line + limit.OwnPlaces
	}
	return sum
}

// mostRefused is how many connections at once were refused and are not closed yet.
func (l Limits) mostRefused() (sum int) {
	tokens, modules, admin, loopback := l.capacities()
	for _, c := range [...]limit.Capacity{tokens, modules, admin, loopback} {
		sum += c.Refused
	}
	return sum
}

// Descriptors returns how many descriptors all callers together can take.
func (l Limits) Descriptors() int {
	l = l.orDefaults()
	return perConnection * (l.most() + l.mostArriving() + l.mostRefused())
}

// Within returns l with fewer connections, where that many descriptors are too few for all of them.
func (l Limits) Within(descriptors int) Limits {
	l = l.orDefaults()
	const own = 4 * limit.OwnPlaces * perConnection // the same however few others there are
	most := l.Descriptors() - own
	descriptors = max(0, descriptors-own)
	if most <= descriptors {
		return l
	}
	for _, field := range [...]*int{&l.Connections, &l.PerCaller, &l.Modules, &l.AdminConnections, &l.AdminPerUser, &l.LoopbackConnections, &l.LoopbackPerUser} {
		*field = max(1, *field*descriptors/most)
	}
	return l
}

const (
	// connectionMemory is what a connection takes of this process's memory, whatever its client does with it.
	connectionMemory = 40 << 10

	// stayMemory is what a request that waits, or a stream, takes beside that.
	stayMemory = 28 << 10

	// refusedMemory is what a connection takes that was refused and is not closed yet.
	refusedMemory = 9 << 10
)

// Memory returns how many bytes of this process's memory all callers together can have in use.
func (l Limits) Memory() int {
	l = l.orDefaults()
	return l.most()*connectionMemory + l.mostRefused()*refusedMemory + (l.AllWaiting+l.AllWatching)*stayMemory
}
