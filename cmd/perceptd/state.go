package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/binding"
	"perceptd/agent/lock"
	"perceptd/agent/simulator"
	"perceptd/agent/source"
	"perceptd/agent/store"
	"perceptd/cmd/perceptd/config"
	"perceptd/tokencache"
)

// state is what of the token cache outlives this process: what is handed over through systemd, and a file.
type state struct {
	log     *zap.Logger
	handoff store.Handoff
	denied  store.DenyHandoff
	tokens  *store.Tokens // nil: there is no file
	bound   atomic.Pointer[boundTo]

	record *store.PolicyChanges

	noHandoff, noFile string // why there is none, in words; empty: there is one

	handoffFault, fileFault atomic.Pointer[error] // why the last save failed; nil: it worked
	trouble                 string                // what is wrong with the key or the file; empty: nothing

	mu     sync.Mutex // protects what follows
	kind   string     // of the source
	source store.Source
	taken  bool // tokens of source were taken over from an earlier process
	// waiting is why those are not taken over yet: nothing says whose tokens are of use, or to whom; nil: none wait.
	// Nothing is saved meanwhile. begun is what was read of them.
	waiting error
	begun   []tokencache.Snapshot
}

// boundTo is what of the device the file of tokens is bound to. It is known once the key is there.
type boundTo struct {
	kind   binding.Kind
	untold bool // root has told nothing of the device
}

// openState has the agent begin with what processes before saved, and save what the next begins with. handedOver is
// what systemd holds. The daemon also serves where it can save nothing, and says so; but it does not serve beside
// another process that has locked the same folder. waiting is why tokens that were kept are not taken over yet.
func (d *daemon) openState(ctx context.Context, waiting error, o *agent.Options, handedOver map[string]*os.File) error {
	s := &state{
		log: d.log, waiting: waiting,
		handoff: store.Handoff{Store: d.notify.Store, Discard: d.notify.Discard},
		denied:  store.DenyHandoff{Handoff: store.Handoff{Store: d.notify.Store, Discard: d.notify.Discard}},
	}
	s.setSource(d.backend.status())
	d.state = s
	d.backend.move = func(c config.Source) error {
		return s.move(d.backend.status, func() error { return d.backend.replace(c, s.mayBeLocked) })
	}
	defer func() {
		for _, file := range handedOver {
			_ = file.Close()
		}
	}()
	err := d.whileHeld(ctx, func() (err error) {
		d.stateLock, err = store.Lock(d.flags.stateDir)
		return err
	})
	if _, held := errors.AsType[lock.HeldError](err); held || errors.Is(err, errAskedToEnd) {
		return err
	}
	if err != nil {
		d.log.Warn("the state folder is not locked", zap.Error(err))
	}
	var awaited error // why the key is not there yet
	switch {
	case d.backend.forgets:
		s.noHandoff = "the simulated back end has a clock of its own"
		s.noFile = s.noHandoff
	case d.flags.passing:
		s.noFile = fmt.Sprintf("the state is in %s, which is not kept over a reboot: name a folder with --state-dir",
			d.flags.stateDir)
	default:
		awaited = s.openFile(d.flags)
	}
	record := store.OpenPolicyChanges(store.Disk(d.flags.stateDir), o.Clock.Boot)
	s.record = record
	o.BootID = store.BootID()
	cached, denied := make(map[string]*os.File), make(map[string]*os.File)
	for name, file := range handedOver {
		if strings.HasPrefix(name, store.DenyHandoffPrefix) {
			denied[name] = file
		} else {
			cached[name] = file
		}
	}
	var before []tokencache.Snapshot
	if s.noHandoff == "" {
		before = s.handoff.Take(cached, s.logUnusable)
	}
	begin := store.Recover(record, s.tokens, before, s.ours, o.BootID)
	if _, loose := errors.AsType[*store.LooseError](begin.RecordFault); loose {
		d.log.Error("others could have changed a file of the policy changes: "+
			"what is in it is in force, and withdraws nothing; it is written anew", zap.Error(begin.RecordFault))
	} else if begin.RecordFault != nil {
		d.log.Error("one of the two files of the policy changes cannot be used, the other is in force",
			zap.Error(begin.RecordFault))
	}
	if begin.TokensFault != nil && awaited == nil {
		d.log.Error("the kept tokens cannot be used and are fetched anew", zap.Error(begin.TokensFault))
	}
	o.Record, o.UnreadRecord, o.LostRecord = begin.Record, begin.Unread, begin.Lost
	o.Snapshot, o.Copies, o.On = s.real(begin.Snapshot), begin.Copies, begin.On
	for _, m := range begin.Unopened {
		o.Unopened = append(o.Unopened, s.real(m))
	}
	s.taken = begin.Snapshot != nil
	o.LoadRecord, o.SaveRecord = record.Load, record.Save
	o.Deny = s.denyStore(store.OpenDenyRules(record), denied, d.notify.Enabled())
	if awaited != nil { // also where no tokens are there yet
		begin.UnreadTokens = awaited
	}
	if begin.UnreadTokens != nil {
		s.fileFault.Store(&begin.UnreadTokens)
	}
	if len(begin.Copies) == 0 && begin.UnreadTokens == nil {
		waiting, s.waiting = nil, nil // nothing is there to wait for
	}
	if waiting != nil {
		s.begun = begin.Copies
	}
	if o.UnreadTokens = cmp.Or(waiting, begin.UnreadTokens); o.UnreadTokens != nil {
		o.LoadTokens = s.loadAgain
	}
	if s.noHandoff == "" && d.notify.Enabled() {
		o.Persistence.HandOver = s.handOver
	} else {
		s.noHandoff = cmp.Or(s.noHandoff, "perceptd was not started by systemd")
	}
	if s.tokens != nil {
		o.Persistence.Save = s.save
	}
	return nil
}

// denyStore has deny rules kept on the disk and by systemd, which holds those in handedOver.
func (s *state) denyStore(disk *store.DenyRules, handedOver map[string]*os.File, isHeld bool) agent.DenyStore {
	record, err := disk.Load()
	kept := agent.DenyStore{Record: record, Noted: s.record.DenyRecord(), Load: disk.Load, LoadOther: disk.LoadOther}
	kept.Copies = s.denied.Take(handedOver, s.logUnusable)
	_, spoilt := errors.AsType[*store.SpoiltError](err)
	_, loose := errors.AsType[*store.LooseError](err)
	switch {
	case loose:
		s.log.Error("others could have changed a file of the deny rules: it is written anew", zap.Error(err))
		if record.Lost != "" && len(kept.Copies) > 0 { // nothing can have been taken out of these
			kept.Record = nil
		}
	case record != nil && err != nil:
		s.log.Error("one of the two files of the deny rules cannot be used, the other is in force", zap.Error(err))
	case spoilt:
		kept.Lost = err
	case record == nil:
		kept.Unread = err
	}
	kept.Save = disk.Save
	if isHeld {
		kept.HandOver = s.denied.Save
	}
	return kept
}

// openFile opens the cache's file, or says why there is none. A key that was made and is not open may come while this
// process runs: awaited is why it is not there yet.
func (s *state) openFile(f flags) (awaited error) {
	find := func() (*store.Key, []binding.Binding, error) { return s.findKey(f.cacheKey) }
	key, known, err := find()
	if errors.As(err, new(*store.UnopenedKeyError)) {
		s.log.Warn("tokens are not kept over a reboot, until the key is open that they are sealed with", zap.Error(err))
		s.tokens = store.AwaitTokens(store.Disk(f.stateDir), find)
		return err
	}
	if errors.Is(err, errNoKey) {
		s.noFile = err.Error()
		return nil
	}
	if err == nil {
		s.tokens, err = store.OpenTokens(store.Disk(f.stateDir), key, known...)
	}
	if err != nil {
		s.noFile = err.Error()
		s.trouble = "tokens are not kept over a reboot: " + s.noFile
		s.log.Warn("tokens are not kept over a reboot", zap.Error(err))
	}
	return nil
}

var errNoKey = errors.New("there is no key to seal them with: perceptctl cache-key make")

// findKey returns the key of the cache's file, and what the device is known by.
func (s *state) findKey(path string) (*store.Key, []binding.Binding, error) {
	key, err := store.FindKey(path, os.Getenv("CREDENTIALS_DIRECTORY"), func(folder string) error {
		return config.CheckFolder(folder, "the key of the kept tokens")
	})
	if err != nil {
		return nil, nil, err
	}
	if key == nil {
		return nil, nil, errNoKey
	}
	known := s.knownBy()
	to := boundTo{kind: binding.Best(known)}
	_, told := os.Lstat(binding.DeviceFile)
	if to.untold = errors.Is(told, fs.ErrNotExist); to.untold && !to.kind.Hardware() {
		s.log.Info("root has told nothing of this device that the kept tokens could be bound to: "+
			"systemctl restart perceptd-cache-key perceptd",
			zap.String("file", binding.DeviceFile), zap.Stringer("bound_to", to.kind))
	}
	s.bound.Store(&to)
	return key, known, nil
}

// knownBy returns what this device is known by, as far as root has told it or this process can read it.
func (s *state) knownBy() []binding.Binding {
	known, err := binding.Known(binding.DeviceFile, "/")
	if err != nil {
		s.log.Warn("what root has read of this device is of no use: systemctl restart perceptd-cache-key perceptd",
			zap.String("file", binding.DeviceFile), zap.Error(err))
	}
	return known
}

// logUnusable says that something that systemd holds is of no use.
func (s *state) logUnusable(name string, why error) {
	s.log.Warn("what systemd has kept of the cache is of no use: tokens are read from the disk or fetched anew",
		zap.String("name", name), zap.Error(why))
}

// sourceOf tells a source's tokens by its kind, its endpoint and its address. The simulated back end in this process
// has another address at each start.
func sourceOf(from api.SourceStatus) store.Source {
	s := store.Source{
		Former:    from.Kind + " " + from.Endpoint,
		Simulated: func(text tokencache.Secret) bool { return source.Claims(text).Simulated() },
	}
	s.Name = s.Former
	if from.Kind != config.Simulated {
		s.Name += " " + from.Address
	}
	return s
}

// ours reports whether the tokens of m are of this source.
func (s *state) ours(m *tokencache.Snapshot) bool {
	if s.waiting != nil {
		return false // for now
	}
	if s.source.Has(m) {
		return true
	}
	s.log.Info("the kept tokens are of another source: they are not used, and those of this one take their place",
		zap.String("theirs", m.Source), zap.String("ours", s.source.Name))
	return false
}

// loadAgain reads what could not be read before, as far as it can be now: all of it, and that whose tokens are of use.
// What is read comes once, with an error too. It waits while a reload settles whose tokens are.
func (s *state) loadAgain() (all []tokencache.Snapshot, ours []*tokencache.Snapshot, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting != nil {
		return nil, nil, s.waiting
	}
	if s.tokens != nil {
		all, err = s.tokens.LoadAgain()
	}
	for _, copies := range [][]tokencache.Snapshot{s.begun, all} {
		for i := range copies {
			if copies[i].DenyRules { // also for the start after this
				s.record.NoteDenyRules()
			}
			if s.ours(&copies[i]) {
				ours = append(ours, s.real(&copies[i]))
			}
		}
	}
	s.begun, s.taken = nil, s.taken || len(ours) > 0
	if err == nil {
		s.fileFault.Store(nil)
	}
	return all, ours, err
}

// settle calls apply, which puts a configuration in force. Tokens that wait for one are taken over after it, those of
// the source that there is then.
func (s *state) settle(from func() api.SourceStatus, apply func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := apply(); err != nil {
		return err
	}
	s.setSource(from())
	s.waiting = nil
	return nil
}

// move calls replace, which puts another source in force. Not while tokens wait for a configuration, which may be of
// the source that there is.
func (s *state) move(from func() api.SourceStatus, replace func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting != nil {
		return errSourceStays
	}
	if err := replace(); err != nil {
		return err
	}
	s.setSource(from())
	return nil
}

// setSource notes the source that there is now.
func (s *state) setSource(now api.SourceStatus) { s.kind, s.source = now.Kind, sourceOf(now) }

// mayBeLocked reports whether all tokens that were taken over are of that source too.
func (s *state) mayBeLocked(from api.SourceStatus) bool {
	return !s.taken || sourceOf(from).Name == s.source.Name
}

// real returns m without what a simulated back end made, which opens nothing: where the real one's address was that of
// a simulator, the tokens of both have one source. A process that is led to a simulator on purpose keeps them; then its
// environment says so.
func (s *state) real(m *tokencache.Snapshot) *tokencache.Snapshot {
	if m == nil || s.kind == config.Simulated || os.Getenv(simulator.URLVariable) != "" {
		return m
	}
	left, dropped := m.WithoutSimulated()
	if dropped > 0 {
		s.log.Warn("kept tokens are dropped and fetched anew: a simulated back end made them, and they open nothing",
			zap.Int("tokens", dropped), zap.String("message_id", agent.MessageSimulated))
	}
	return left
}

// handOver has systemd hold m in the place of what it holds.
func (s *state) handOver(m tokencache.Snapshot) error {
	if !s.mark(&m) {
		return nil
	}
	return outcome(&s.handoffFault, s.handoff.Save(m))
}

// mark notes in m whose tokens it has. False: what was kept is not to be overwritten yet.
func (s *state) mark(m *tokencache.Snapshot) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	m.Source, m.DenyRules = s.source.Name, s.record.HaveDenyRules()
	return s.waiting == nil
}

// outcome remembers how something ended, for the status.
func outcome(of *atomic.Pointer[error], err error) error {
	if err == nil {
		of.Store(nil)
	} else {
		of.Store(&err)
	}
	return err
}

func (s *state) save(m tokencache.Snapshot) error {
	if !s.mark(&m) {
		return nil
	}
	return outcome(&s.fileFault, s.tokens.Save(m))
}

// status says over what tokens are kept, as far as that worked the last time.
func (s *state) status() api.KeptStatus {
	noHandoff, noFile := s.noHandoff, s.noFile
	if err := s.handoffFault.Load(); err != nil {
		noHandoff = (*err).Error()
	}
	if err := s.fileFault.Load(); err != nil {
		noFile = (*err).Error()
	}
	kept := api.KeptStatus{Restart: noHandoff == "", Reboot: noFile == "", Why: cmp.Or(noFile, noHandoff)}
	if to := s.bound.Load(); to != nil {
		kept.BoundTo, kept.Untold = to.kind.String(), to.untold
	}
	return kept
}
