package lives

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"sync"
	"testing/synctest"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/agent/store"
	"perceptd/tokencache"
)

// life is one device that lives its plan.
type life struct {
	plan   plan
	began  time.Time
	clocks clocks
	keys   []*key
	asking sync.WaitGroup
	agenda agenda

	mu      sync.Mutex // protects what follows
	backEnd *backEnd
	disk    disk
	carried *tokencache.Snapshot // what systemd holds for the daemon; nil: nothing
	process *process             // nil: none runs
	killed  bool                 // the process died in a step on the disk
	dying   chan struct{}        // tells of that
	until   time.Duration        // the down time then
	off     time.Time            // since when the device is off; zero: it is on
	oracle  oracle
	tally
}

// tally is what a life came to.
type tally struct {
	days     float64
	calls    int
	answers  int
	refusals int
	digest   uint64 // of its history
	excused  map[excuse]int
}

// process is one daemon.
type process struct {
	agent *agent.Agent
	began time.Time
	gone  bool // nothing that it does counts any more
	// it dies in a step on the tokens, or on anything else: what it does beside that, at the same moment, is done
	torn *bool
}

// key is what a module asks for.
type key struct {
	tokencache.Key
	identity string
}

// appointment is something that happens at a moment.
type appointment struct {
	on time.Time
	f  func()
}

type agenda []appointment

func (a agenda) Len() int           { return len(a) }
func (a agenda) Less(i, j int) bool { return a[i].on.Before(a[j].on) }
func (a agenda) Swap(i, j int)      { a[i], a[j] = a[j], a[i] }
func (a *agenda) Push(x any)        { *a = append(*a, x.(appointment)) }
func (a *agenda) Pop() any {
	last := (*a)[len(*a)-1]
	*a = (*a)[:len(*a)-1]
	return last
}

func (l *life) at(on time.Time, f func()) { heap.Push(&l.agenda, appointment{on, f}) }

func (l *life) after(d time.Duration, f func()) { l.at(time.Now().Add(d), f) }

// live lives a plan, in a bubble, and returns what went wrong first, or nil.
func live(p plan) (*fault, tally) {
	l := &life{plan: p, began: time.Now()}
	l.excused = make(map[excuse]int)
	l.dying = make(chan struct{}, 1)
	l.backEnd = newBackEnd(p)
	l.disk.files = make(map[string]file)
	l.oracle.open(l)
	l.clocks.drift = p.device.drift
	if p.device.vouched {
		l.clocks.drift = 0
	}
	l.clocks.reboot()
	l.clocks.step(p.device.ahead, p.device.vouched)
	l.oracle.clockSet(p.device.ahead, p.device.vouched)
	l.makeKeys()
	for _, e := range p.events {
		l.at(l.began.Add(e.on), func() { l.happen(e) })
	}
	for i, k := range l.keys {
		l.at(l.began.Add(time.Duration(i+1)*703*time.Millisecond), func() { l.keepAsking(k) })
	}
	l.at(l.began.Add(time.Minute), l.keepLooking)
	l.start()
	l.run()
	l.end(false)
	l.asking.Wait()
	l.days = time.Since(l.began).Hours() / 24
	return l.oracle.fault, l.tally
}

func (l *life) run() {
	ends := l.began.Add(l.plan.device.lasts)
	l.at(ends, func() {})
	for !l.failed() && time.Now().Before(ends) {
		if !l.wait(l.agenda[0].on) {
			continue // what comes next may be another by now
		}
		heap.Pop(&l.agenda).(appointment).f()
		synctest.Wait()
		l.bury()
	}
}

// wait returns at that moment; false: the daemon died in a step on the disk before.
func (l *life) wait(until time.Time) bool {
	timer := time.NewTimer(time.Until(until))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-l.dying:
		synctest.Wait()
		l.bury()
		return false
	}
}

// bury ends a daemon that died in a step on the disk, and has another start.
func (l *life) bury() {
	select {
	case <-l.dying:
	default:
	}
	l.mu.Lock()
	killed := l.killed
	l.killed = false
	l.mu.Unlock()
	if killed {
		l.end(false)
		l.after(l.until, l.start)
	}
}

func (l *life) failed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.oracle.fault != nil
}

// set changes what is shared with the daemon's and the modules' goroutines.
func (l *life) set(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
}

func (l *life) makeKeys() {
	v := l.plan.device
	for i := range v.keys {
		id, resource := i%v.identities, resourceName(i/v.identities)
		if v.spelled && i/v.identities == 1 {
			resource = resourceName(0) + "/"
		}
		k := &key{identity: identities[id].Name, Key: tokencache.Key{Selector: identities[id].Selector(),
			Resource: resource}}
		l.keys = append(l.keys, k)
	}
}

var identities = []grants.Identity{
	{Name: "device", Default: true},
	{Name: "vision", ClientID: "00000000-0000-0000-0000-000000000001"},
	{Name: "speech", ClientID: "00000000-0000-0000-0000-000000000002"},
}

func resourceName(i int) string { return fmt.Sprintf("https://r%d.example.net", i) }

var uid = uint32(1000)

func (l *life) rules() agent.Rules {
	v := l.plan.device
	r := agent.Rules{Rules: grants.Rules{Identities: identities[:v.identities]}, Spread: v.spread}
	for i := range v.identities {
		g := grants.Grant{Caller: grants.Match{UID: &uid}, Identity: identities[i].Name, Prefetch: v.prefetch}
		for _, k := range l.keys {
			if k.identity == g.Identity {
				g.Resources = append(g.Resources, k.Resource)
			}
		}
		r.Grants = append(r.Grants, g)
	}
	if v.alternates {
		r.Alternates = map[string][]string{resourceName(0): {resourceName(1)}, resourceName(1): {resourceName(0)}}
	}
	return r
}

// start starts a daemon.
func (l *life) start() {
	if l.process != nil || !l.off.IsZero() {
		return
	}
	p := &process{began: time.Now()}
	o := agent.Options{Fetch: l.fetchOf(p), Rules: l.rules(), Clock: l.clocks.forDaemon(), Roll: l.roll,
		BootID: l.clocks.bootID()}
	on := folder{l, p}
	record := store.OpenPolicyChanges(on, l.clocks.boot)
	var tokens *store.Tokens // nil: there is no file
	if l.hasKey() {
		tokens = tokensIn(on)
		o.Persistence.Save = func(m tokencache.Snapshot) error {
			return on.put(tokensName, func() []byte { return sealed(m) })
		}
	}
	l.oracle.starts()
	begin := store.Recover(record, tokens, l.takeCarried(), func(*tokencache.Snapshot) bool { return true }, o.BootID)
	o.Record, o.UnreadRecord, o.LostRecord = begin.Record, begin.Unread, begin.Lost
	o.Snapshot, o.Copies, o.On = begin.Snapshot, begin.Copies, begin.On
	o.LoadRecord, o.SaveRecord = record.Load, record.Save
	o.Persistence.HandOver = func(m tokencache.Snapshot) error { return l.carry(p, m) }
	l.set(func() { l.process = p })
	a, err := agent.New(o)
	if err != nil {
		l.set(func() { l.oracle.fail("start", "%v", err) })
		return
	}
	p.agent = a
	synctest.Wait()
	l.oracle.started()
}

// hasKey reports whether a start finds what the tokens are sealed with.
func (l *life) hasKey() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.hasKeyLocked()
}

func (l *life) hasKeyLocked() bool { return !l.plan.device.keyless && l.disk.now() != noKey }

// takeCarried returns what systemd holds.
func (l *life) takeCarried() []tokencache.Snapshot {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.carried == nil {
		return nil
	}
	m, err := tokensIn(sheet{tokensName: sealed(*l.carried)}).Load()
	if err != nil {
		l.oracle.fail("start", "%v", err)
		return nil
	}
	return []tokencache.Snapshot{*m}
}

// carry hands m to systemd.
func (l *life) carry(p *process, m tokencache.Snapshot) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !p.gone {
		l.carried, l.oracle.carriedBlind = &m, l.oracle.blind
	}
	return nil
}

// end ends the daemon, in order or not.
func (l *life) end(inOrder bool) {
	p := l.process
	if p == nil {
		return
	}
	l.mu.Lock()
	p.gone = p.gone || !inOrder
	l.process = nil
	l.oracle.ended()
	l.mu.Unlock()
	p.agent.Close()
	l.mu.Lock()
	p.gone = true
	l.mu.Unlock()
}

// roll is as random as the moment: who rolls first of several makes no difference.
func (l *life) roll() float64 { return l.draw("roll", tokencache.Key{}) }

// happen has an event happen.
func (l *life) happen(e event) {
	p := l.process
	switch e.kind {
	case restart, crash:
		if p != nil {
			l.end(e.kind == restart)
			l.after(e.span, l.start)
		}
	case torn:
		l.set(func() { l.disk.tear, l.until = tear{e.n, e.tokens}, e.span })
	case reboot, powerCut:
		l.end(e.kind == reboot)
		l.set(func() { l.carried = nil })
		if l.off.IsZero() {
			l.off = time.Now()
		}
		l.after(e.span, func() {
			l.end(false) // one that began meanwhile, in no boot
			l.set(func() { l.carried = nil })
			l.clocks.reboot()
			l.setClock(e)
			if !l.off.IsZero() {
				l.set(func() { l.oracle.booted(time.Since(l.off)) })
			}
			l.off = time.Time{}
			l.start()
		})
	case clockSet:
		l.setClock(e)
		if p != nil {
			_ = p.agent.Ping(context.Background()) // it notices at a moment of its own
		}
	case diskFault:
		l.set(func() { l.disk.trouble, l.disk.until = e.disk, time.Now().Add(e.span) })
	case gone:
		l.set(func() { l.disk.delete(e.n) })
	case backFault:
		o := outage{failing: e.back, from: time.Now(), to: time.Now().Add(e.span)}
		if e.n > 0 {
			o.key = &l.keys[e.n%len(l.keys)].Key
		}
		l.set(func() { l.backEnd.outages = append(l.backEnd.outages, o) })
	case change:
		l.note(e)
	case pipeline:
		for d, apart := time.Duration(0), time.Duration(e.n)*time.Microsecond; d < e.span; d += e.every {
			l.after(d+apart, func() { l.note(e) })
			// else one comes as the one before it has spread: what happens first then has no order
			apart += time.Microsecond
		}
	case withdraw:
		l.withdraw(e.n)
	case insist:
		l.set(func() { l.oracle.insisted = time.Now() })
		if k := l.keys[e.n%len(l.keys)]; p != nil {
			l.asking.Go(func() { _, _ = p.agent.Refresh(context.Background(), k.identity, k.Resource, e.span == 0) })
		}
	case anew:
		l.set(func() { l.oracle.renewed = time.Now() })
		id := identities[e.n%l.plan.device.identities].Selector()
		for replica := range l.plan.device.replicas {
			lag := time.Duration(float64(replica) * l.draw("lag",
				tokencache.Key{Selector: id}) * float64(4*time.Minute))
			l.after(lag, func() { l.set(func() { l.backEnd.renew(id, replica, e.span) }) })
		}
	case crowd:
		k := l.keys[e.n%len(l.keys)]
		for d := time.Duration(0); d < e.span; d += e.every {
			l.after(d, func() { l.ask(k) })
		}
	}
}

func (l *life) setClock(e event) {
	ahead := e.offset
	if e.lost {
		ahead = time.Until(time.Unix(60, 0))
	}
	l.clocks.step(ahead, e.vouched)
	l.set(func() { l.oracle.clockSet(ahead, e.vouched) })
}

func (l *life) keepAsking(k *key) {
	l.ask(k)
	l.after(time.Duration((0.5+l.draw("asks", k.Key))*float64(l.plan.device.asks)), func() { l.keepAsking(k) })
}

func (l *life) keepLooking() {
	l.oracle.look()
	l.after(11*time.Minute+time.Duration(l.draw("looks", tokencache.Key{})*float64(time.Minute)), l.keepLooking)
}

// ask has a module ask for a key, as the SDKs' forms do.
func (l *life) ask(k *key) {
	p := l.process
	if p == nil {
		return // it waits on its socket
	}
	l.asking.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		began := time.Now()
		answer, err := p.agent.Token(ctx, grants.Caller{UID: uid, GID: grants.NoID},
			agent.Request{Request: grants.Request{Resource: k.Resource, Identity: k.identity}, MinTTL: 5 * time.Minute})
		refusal := new(agent.Error)
		var onRecord []api.PolicyChange // by which it is withheld: some of them may have been read just now
		if errors.As(err, &refusal) && refusal.Code == api.CodeRevoked {
			onRecord = p.agent.Changes()
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if p.gone || l.process != p {
			return
		}
		if onRecord != nil {
			l.oracle.takeIn(onRecord)
		}
		l.tell(k.Key, answer, err)
		if err == nil {
			l.answers++
			l.oracle.answered(p, k, answer)
			return
		}
		l.refusals++
		if !errors.As(err, &refusal) {
			l.oracle.fail("strange error", "%v: %v", k, err)
			return
		}
		l.oracle.refused(p, k, began, refusal)
	})
}

// tell adds an answer to the digest of the history, in which those of one moment have no order.
func (l *life) tell(k tokencache.Key, answer agent.Answer, err error) {
	h := fnv.New64a()
	fmt.Fprint(h, time.Since(l.began), k, answer.Resource, answer.Left, answer.RefreshIn, answer.Permissions.State,
		answer.Unconfirmed)
	if answer.Token != nil {
		fmt.Fprint(h, answer.Token.Text.SHA256())
	}
	if err != nil {
		fmt.Fprint(h, err)
	}
	l.digest += h.Sum64()
}

// called notes a call of the daemon's.
func (l *life) called(k tokencache.Key) {
	l.calls++
	h := fnv.New64a()
	fmt.Fprint(h, "call", time.Since(l.began), k)
	l.digest += h.Sum64()
	l.oracle.called(k)
}

func (l *life) fetchOf(p *process) func(context.Context, tokencache.Key) (tokencache.Fetched, error) {
	return func(ctx context.Context, k tokencache.Key) (tokencache.Fetched, error) {
		f, err := l.fetch(ctx, k)
		if err == nil {
			l.mu.Lock()
			l.oracle.received(p, f)
			l.mu.Unlock()
		}
		return f, err
	}
}
