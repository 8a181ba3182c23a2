package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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
	"perceptd/systemd"
	"perceptd/tokencache"
)

const (
	// storedCache begins the name by which systemd keeps what the cache knows while the daemon restarts. After it comes a
	// number, higher for what was stored later.
	storedCache = "cache-"

	// cacheCredential is the systemd credential that is the key of the cache's file.
	cacheCredential = "percept-cache-key"

	// openedKey is that key where perceptd-cache-key.service has opened it, and readDevice what it has read, as root, of what
	// the device is known by.
	openedKey  = "/run/percept-cache-key/key"
	readDevice = "/run/percept-cache-key/device"

	// reservedRoom is for the cache's memory in systemd's store: two of it while one takes the other's place.
	reservedRoom = 2
)

// kept is how the token cache outlives this process: by a descriptor in systemd's store and by a file.
type kept struct {
	notify systemd.Notify
	log    *zap.Logger
	source string        // whose tokens they are: sourceName
	former string        // the same, as versions before wrote it: without an address
	tokens *store.Tokens // nil: there is no file
	bound  binding.Kind  // what of the device the file is bound to
	untold bool          // root has told nothing of the device

	stored []string // what systemd keeps of it, by name

	noCarry, noFile string // why it does not, in words; empty: it does

	uncarried, unsaved atomic.Pointer[error] // why the last time failed; nil: it did not
	trouble            string                // what is wrong with the key or the file, for a person; empty: nothing, though there may be none
}

// openState has the agent begin with what was kept, and keep what the next begins with. The daemon serves without a place to keep
// things in, and says so, but not beside another that keeps its state there.
func (d *daemon) openState(o *agent.Options, carried map[string]*os.File) error {
	from := d.backend.status()
	k := &kept{notify: d.notify, log: d.log, source: sourceName(from), former: from.Kind + " " + from.Endpoint}
	d.kept = k
	defer func() {
		for _, file := range carried {
			_ = file.Close()
		}
	}()
	var held lock.HeldError
	var err error
	if d.state, err = store.Hold(d.flags.stateDir); errors.As(err, &held) {
		return err
	}
	if err != nil {
		d.log.Warn("the state folder is not locked", zap.Error(err))
	}
	switch {
	case d.config.Source.Speed != 1 && d.config.Source.Kind == config.Simulated:
		k.noCarry, k.noFile = "the simulated back end has a clock of its own", "the simulated back end has a clock of its own"
	case d.flags.passing:
		k.noFile = fmt.Sprintf("the state is in %s, which is not kept over a reboot: name a folder with --state-dir", d.flags.stateDir)
	default:
		k.openFile(d.flags)
	}
	record := store.OpenPolicyChanges(store.Disk(d.flags.stateDir), o.Clock.Boot)
	o.BootID = store.BootID()
	var before []tokencache.Snapshot
	if k.noCarry == "" {
		before = k.takeCarried(carried)
	}
	begin := store.Recover(record, k.tokens, before, k.ours, o.BootID)
	if _, loose := errors.AsType[*store.LooseError](begin.RecordFault); loose {
		d.log.Error("others could have changed a file of the policy changes: what is in it is in force, and withdraws nothing; it is written anew", zap.Error(begin.RecordFault))
	} else if begin.RecordFault != nil {
		d.log.Error("one of the two files of the policy changes cannot be used, the other is in force", zap.Error(begin.RecordFault))
	}
	if begin.TokensFault != nil {
		d.log.Error("the kept tokens cannot be used and are fetched anew", zap.Error(begin.TokensFault))
	}
	o.Record, o.UnreadRecord, o.LostRecord = begin.Record, begin.Unread, begin.Lost
	o.Snapshot, o.Copies, o.On = k.real(begin.Snapshot, d.config.Source.Kind), begin.Copies, begin.On
	for _, m := range begin.Unopened {
		o.Unopened = append(o.Unopened, k.real(m, d.config.Source.Kind))
	}
	o.Load, o.Keep = record.Load, record.Save
	if begin.UnreadTokens != nil {
		o.UnreadTokens, o.LoadTokens = begin.UnreadTokens, func() ([]tokencache.Snapshot, []*tokencache.Snapshot, error) {
			return k.loadAgain(d.config.Source.Kind)
		}
		_ = outcome(&k.unsaved, begin.UnreadTokens)
	}
	if k.noCarry == "" && d.notify.Enabled() {
		o.Keeping.Carry = k.carry
	} else {
		k.noCarry = cmp.Or(k.noCarry, "perceptd was not started by systemd")
	}
	if k.tokens != nil {
		o.Keeping.Save = k.save
	}
	return nil
}

// openFile opens the cache's file, or says why there is none.
func (k *kept) openFile(f flags) {
	places := []string{openedKey, f.cacheKey}
	if folder := os.Getenv("CREDENTIALS_DIRECTORY"); folder != "" {
		places = append([]string{filepath.Join(folder, cacheCredential)}, places...)
	}
	key, place, err := findKey(places)
	if err == nil && place == f.cacheKey {
		// Others could put theirs into an open folder. What systemd opens is in folders of its own.
		err = config.CheckFolder(filepath.Dir(f.cacheKey), "the key of the kept tokens")
	}
	if errors.Is(err, fs.ErrNotExist) {
		if err = unopened(f.cacheKey); err == nil {
			k.noFile = "there is no key to seal them with: perceptctl cache-key make"
			return
		}
	}
	if err == nil {
		known := k.knownBy()
		k.bound = binding.Best(known)
		_, told := os.Lstat(readDevice)
		if k.untold = errors.Is(told, fs.ErrNotExist); k.untold && !k.bound.Hardware() {
			k.log.Info("root has told nothing of this device that the kept tokens could be bound to: systemctl restart perceptd-cache-key perceptd",
				zap.String("file", readDevice), zap.Stringer("bound_to", k.bound))
		}
		k.tokens, err = store.OpenTokens(store.Disk(f.stateDir), key, known...)
	}
	if err != nil {
		k.noFile = err.Error()
		k.trouble = "tokens are not kept over a reboot: " + k.noFile
		k.log.Warn("tokens are not kept over a reboot", zap.Error(err))
	}
}

// knownBy returns what this device is known by, as far as root has told it or this process can read it.
func (k *kept) knownBy() []binding.Binding {
	known, err := binding.Known(readDevice, "/")
	if err != nil {
		k.log.Warn("what root has read of this device is of no use: systemctl restart perceptd-cache-key perceptd", zap.String("file", readDevice), zap.Error(err))
	}
	return known
}

// findKey returns the key of the cache's file, the first that is in any of the places, and its place.
func findKey(places []string) (key *store.Key, place string, err error) {
	for _, place = range places {
		if key, err = store.ReadKey(place); !errors.Is(err, fs.ErrNotExist) {
			return key, place, err
		}
	}
	return nil, "", err
}

// unopened says that a key was made, which is sealed beside path and could not be opened; nil: none was made.
func unopened(path string) error {
	if _, err := os.Stat(path + ".cred"); err != nil {
		return nil
	}
	return fmt.Errorf("the key to seal them with, %s.cred, was not opened: systemctl status perceptd-cache-key tells why", path)
}

// takeCarried returns what systemd has kept, the latest first. It goes when the next is stored.
func (k *kept) takeCarried(carried map[string]*os.File) []tokencache.Snapshot {
	latest := make(map[uint64]tokencache.Snapshot)
	for name, file := range carried {
		k.stored = append(k.stored, name)
		number, err := strconv.ParseUint(strings.TrimPrefix(name, storedCache), 10, 64)
		var memory *tokencache.Snapshot
		if err == nil {
			memory, err = store.ReadMemfd(file)
		}
		if err != nil {
			k.log.Warn("what systemd has kept of the cache is of no use: tokens are read from the disk or fetched anew", zap.String("name", name), zap.Error(err))
			continue
		}
		latest[number] = *memory
	}
	var all []tokencache.Snapshot
	for _, number := range slices.Backward(slices.Sorted(maps.Keys(latest))) {
		all = append(all, latest[number])
	}
	return all
}

// sourceName names a source by what makes its tokens another's: the endpoint's form, and its address, since whoever was at
// another one may have been anybody. The simulated back end in this process has another address at each start.
func sourceName(from api.SourceStatus) string {
	if from.Kind == config.Simulated {
		return from.Kind + " " + from.Endpoint
	}
	return from.Kind + " " + from.Endpoint + " " + from.Address
}

// ours reports whether the tokens of m are of this source. What was kept by a version that did not tell the address counts as this
// source's, but for tokens of a simulated back end, which was at another.
func (k *kept) ours(m *tokencache.Snapshot) bool {
	if m.Source == k.source || m.Source == k.former && !anySimulated(m) {
		return true
	}
	k.log.Info("the kept tokens are of another source: they are not used, and those of this one take their place", zap.String("theirs", m.Source), zap.String("ours", k.source))
	return false
}

// loadAgain reads what could not be read before, as far as it can be now: all of it, and that whose tokens are of use. What is read comes
// once, with an error too.
func (k *kept) loadAgain(kind string) (all []tokencache.Snapshot, ours []*tokencache.Snapshot, err error) {
	all, err = k.tokens.LoadAgain()
	for i := range all {
		if k.ours(&all[i]) {
			ours = append(ours, k.real(&all[i], kind))
		}
	}
	if err == nil {
		k.unsaved.Store(nil)
	}
	return all, ours, err
}

// anySimulated looks into the tokens themselves: the claims that versions before have kept name no issuer.
func anySimulated(m *tokencache.Snapshot) bool {
	return slices.ContainsFunc(m.Keys, func(r tokencache.SnapshotEntry) bool { return source.Claims(r.Token.Text).Simulated() })
}

// real returns m without what a simulated back end made, which opens nothing: where the real one's address was that of a simulator,
// the tokens of both have one source. A process that is led to a simulator on purpose keeps them; then its environment says so.
func (k *kept) real(m *tokencache.Snapshot, kind string) *tokencache.Snapshot {
	if m == nil || kind == config.Simulated || os.Getenv(simulator.URLVariable) != "" {
		return m
	}
	left, dropped := m.WithoutSimulated()
	if dropped > 0 {
		k.log.Warn("kept tokens are dropped and fetched anew: a simulated back end made them, and they open nothing",
			zap.Int("tokens", dropped), zap.String("message_id", agent.MessageSimulated))
	}
	return left
}

// carry has systemd keep m in the place of what it keeps.
func (k *kept) carry(m tokencache.Snapshot) error { return outcome(&k.uncarried, k.store(m)) }

// outcome remembers how something ended, for the status.
func outcome(of *atomic.Pointer[error], err error) error {
	if err == nil {
		of.Store(nil)
	} else {
		of.Store(&err)
	}
	return err
}

func (k *kept) store(m tokencache.Snapshot) error {
	m.Source = k.source
	file, err := store.WriteMemfd(m)
	if err != nil {
		return err
	}
	defer file.Close()
	name := storedCache + strconv.FormatInt(int64(m.Boot), 10)
	if err := k.notify.Store(name, int(file.Fd())); err != nil {
		return err
	}
	before := k.stored
	k.stored = []string{name}
	for _, old := range before { // the new one first: a crash in between leaves two, and never none
		if old == name {
			continue
		}
		if err := k.notify.Discard(old); err != nil {
			k.stored = append(k.stored, old)
		}
	}
	return nil
}

func (k *kept) save(m tokencache.Snapshot) error {
	m.Source = k.source
	return outcome(&k.unsaved, k.tokens.Save(m))
}

// status says over what tokens are kept, as far as that worked the last time.
func (k *kept) status() api.KeptStatus {
	noCarry, noFile := k.noCarry, k.noFile
	if err := k.uncarried.Load(); err != nil {
		noCarry = (*err).Error()
	}
	if err := k.unsaved.Load(); err != nil {
		noFile = (*err).Error()
	}
	s := api.KeptStatus{Restart: noCarry == "", Reboot: noFile == "", Why: cmp.Or(noFile, noCarry)}
	if k.noFile == "" {
		s.BoundTo, s.Untold = k.bound.String(), k.untold
	}
	return s
}
