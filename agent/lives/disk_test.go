package lives

import (
	"io/fs"
	"maps"
	"slices"
	"strings"
	"syscall"
	"time"

	"perceptd/agent/store"
	"perceptd/tokencache"
)

// trouble is what is wrong with the disk.
type trouble uint8

const (
	sound trouble = iota
	full
	readOnly   // the whole disk
	broken     // writing fails with EIO, perhaps when all was written
	unreadable // reading fails: EIO, EMFILE, EACCES
	wrongMode  // of the folder: it is read, and not written to
	troubles   // up to here, of any life

	recordStuck // writing the record fails, and not the tokens
	noKey       // at a start, for the tokens: they are not read, nor saved by that daemon
)

func (t trouble) String() string {
	return [...]string{"sound", "full", "read-only", "writes fail", "reads fail", "wrong mode",
		recordStuck: "writing the record fails", noKey: "no key for the tokens at a start"}[t]
}

func (t trouble) errno() error {
	return [...]error{nil, syscall.ENOSPC, syscall.EROFS, syscall.EIO, syscall.EMFILE, syscall.EPERM,
		recordStuck: syscall.ENOSPC, noKey: nil}[t]
}

// disk is what outlives a power cut. The life's lock protects it.
type disk struct {
	files map[string]file

	trouble
	until   time.Time
	tear    tear
	savedOn time.Time // the tokens
}

func (d *disk) now() trouble {
	if time.Now().Before(d.until) {
		return d.trouble
	}
	return sound
}

// file is what is in a file, or what makes that once it is read: most of what is saved never is.
type file func() []byte

func text(b []byte) file { return func() []byte { return b } }

// delete removes one of the files, the n-th in the order of their names.
func (d *disk) delete(n int) {
	if names := slices.Sorted(maps.Keys(d.files)); len(names) > 0 {
		delete(d.files, names[n%len(names)])
	}
}

// tear has the daemon killed in the n-th step from now on that it takes on its tokens, or on anything else: those two
// are saved beside each other, in no order. n is 0: it is not.
type tear struct {
	n      int
	tokens bool
}

func onTokens(name string) bool { return strings.HasPrefix(name, "tokens") }

// has reports whether there is a file whose name begins so.
func (d *disk) has(prefix string) bool {
	for name := range d.files {
		if strings.HasPrefix(name, prefix) && !strings.HasSuffix(name, aside) {
			return true
		}
	}
	return false
}

const aside = ".unreadable"

// folder is the state folder as one process sees it.
type folder struct {
	l *life
	p *process
}

var _ store.Folder = folder{}

func (f folder) Read(name string, _ fs.FileMode, _ int) ([]byte, error) {
	f.l.mu.Lock()
	defer f.l.mu.Unlock()
	if t := f.l.disk.now(); t == unreadable {
		return nil, &fs.PathError{Op: "open", Path: name, Err: t.errno()}
	}
	is, there := f.l.disk.files[name]
	if !there {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return is(), nil
}

func (f folder) Replace(name string, b []byte) error { return f.put(name, text(b)) }

func (f folder) put(name string, is file) error {
	return f.change("replace", name, func(d *disk) { d.files[name] = is })
}

func (f folder) Aside(name string) (string, error) {
	to := name + aside
	return to, f.change("rename", name, func(d *disk) {
		d.files[to] = d.files[name]
		delete(d.files, name)
	})
}

func (f folder) Remove(name string) error {
	return f.change("remove", name, func(d *disk) { delete(d.files, name) })
}

// change is a step on the disk. One in which the process dies, or writing fails, may have been taken all the same.
func (f folder) change(op, name string, step func(*disk)) error {
	l, p := f.l, f.p
	l.mu.Lock()
	defer l.mu.Unlock()
	d := &l.disk
	if p.gone || p.torn != nil && *p.torn == onTokens(name) {
		return &fs.PathError{Op: op, Path: name, Err: syscall.EIO}
	}
	perhaps := func() {
		if l.draw("step", tokencache.Key{Resource: name}) < 0.5 {
			step(d)
		}
	}
	if d.tear.n > 0 && d.tear.tokens == onTokens(name) {
		if d.tear.n--; d.tear.n == 0 {
			torn := d.tear.tokens
			p.torn, l.killed = &torn, true
			l.dying <- struct{}{}
			perhaps()
			return &fs.PathError{Op: op, Path: name, Err: syscall.EIO}
		}
	}
	t := d.now()
	if t == recordStuck && onTokens(name) {
		t = sound
	}
	switch t {
	case sound, unreadable, noKey:
		if step(d); onTokens(name) {
			d.savedOn = time.Now()
		}
		return nil
	case broken:
		perhaps()
		fallthrough
	default:
		return &fs.PathError{Op: op, Path: name, Err: t.errno()}
	}
}

// sheet is a folder that nothing is ever wrong with.
type sheet map[string][]byte

var _ store.Folder = sheet{}

func (s sheet) Read(name string, _ fs.FileMode, _ int) ([]byte, error) {
	if b, there := s[name]; there {
		return b, nil
	}
	return nil, fs.ErrNotExist
}

func (s sheet) Replace(name string, b []byte) error {
	s[name] = b
	return nil
}

func (s sheet) Aside(name string) (string, error) { return "", s.Remove(name) }

func (s sheet) Remove(name string) error {
	delete(s, name)
	return nil
}

// tokensName is the file that agent/store has the tokens in.
const tokensName = "tokens.sealed"

// sealed is m as agent/store writes it.
func sealed(m tokencache.Snapshot) []byte {
	on := sheet{}
	if err := tokensIn(on).Save(m); err != nil {
		panic(err)
	}
	return on[tokensName]
}

func tokensIn(folder store.Folder) *store.Tokens {
	tokens, err := store.OpenTokens(folder, &store.Key{1})
	if err != nil {
		panic(err)
	}
	return tokens
}
