package store

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"perceptd/agent/binding"
	"perceptd/tokencache"
)

const (
	tokensName = "tokens.sealed"
	maxSealed  = maxSnapshot + 1024

	// A sealed file begins with this, in the clear: sealedMagic, the version in two bytes, and from version 2 on one
	// byte for the kind of what it is bound to. Version 1 was bound to nothing, and sealed with the key itself.
	sealedMagic = "percept-sealed"
	formerHead  = sealedMagic + "\x00\x01"
	sealedHead  = sealedMagic + "\x00\x02"
)

// Tokens is the cache on the disk: one file, sealed with AES-256-GCM. Its key is kept elsewhere, and its head is
// authenticated with it.
//
// The file is bound to the device: it is sealed with a key made of the one that is kept and of what the device is known
// by, so that a copy of both files opens on no other device. The head says which kind of fact that is, since a device
// may be known by more or by less another day. A file that is bound to anything that the device is known by opens, and
// is bound to the best of it from then on.
//
// Each sealing draws a nonce of 96 random bits. Two of n are the same with a probability of about n²/2⁹⁷: after one
// write a second for a hundred years under one key, less than one in ten thousand million. At the few writes that are
// made it does not happen.
//
// The seal shows that somebody with the key wrote the file, not when: whoever can write to the disk can put an older
// one back, and it loads. What that gains is bounded. A token in it is one that this device was given, and is dropped
// when it has certainly expired. Policy changes are in files of their own, so that a revocation stands against an older
// token as before. What was learnt of rollovers since is forgotten. Only a counter off the disk, as in a TPM, could
// show it; there is none.
type Tokens struct {
	folder Folder
	head   string // of what is written

	unopened bool     // what Load found was not opened: Save keeps it
	opened   []string // the files kept so by starts before that are open by now: Save has what is in them
	spoilt   []string // the files that were found spoilt, which stay until Save has put something beside them
	unread   []unreadFile

	// seal returns what seals a file with that head; nil: it is not known here. It is a function since fmt prints what
	// unexported fields hold, whatever they point to: here the key.
	seal func(head string) cipher.AEAD
	// find returns the key where it is there by now, and what the device is known by. Nil: the key is there.
	find FindFunc
}

// FindFunc looks for a key that comes late, and returns what the device is known by beside it. The error says why the
// key is not there yet.
type FindFunc func() (*Key, []binding.Binding, error)

// OpenTokens returns the tokens in folder, bound to the best of what the device is known by; to nothing where there is
// none.
func OpenTokens(folder Folder, key *Key, known ...binding.Binding) (*Tokens, error) {
	former, err := sealWith(key[:])
	if err != nil {
		return nil, err
	}
	seals := map[string]cipher.AEAD{formerHead: former}
	for _, b := range append([]binding.Binding{{}}, known...) {
		bound, err := hkdf.Key(sha256.New, key[:], nil, sealedHead+b.Kind.String()+string(b.ID[:]), len(key))
		if err != nil {
			return nil, err
		}
		if seals[headOf(b.Kind)], err = sealWith(bound); err != nil {
			return nil, err
		}
		clear(bound)
	}
	seal := func(head string) cipher.AEAD { return seals[head] }
	return &Tokens{folder: folder, head: headOf(binding.Best(known)), seal: seal}, nil
}

// AwaitTokens returns the tokens in folder whose key may come later. Until it does every file that is there counts as
// one that cannot be read now, and Save fails: LoadAgain and Save look for the key.
func AwaitTokens(folder Folder, find FindFunc) *Tokens { return &Tokens{folder: folder, find: find} }

// takeKey looks for the key, where it is not there yet. The error says why it still is not.
func (t *Tokens) takeKey() error {
	if t.find == nil {
		return nil
	}
	key, known, err := t.find()
	if err != nil {
		return err
	}
	opened, err := OpenTokens(t.folder, key, known...)
	if err != nil {
		return err
	}
	t.head, t.seal, t.find = opened.head, opened.seal, nil
	return nil
}

// awaitKey notes that the files that are there cannot be read without the key, and why it is not here.
func (t *Tokens) awaitKey(why error) {
	for _, name := range append([]string{tokensName}, unopenedNames()...) {
		if mayBeThere(t.folder, name) {
			t.unread = append(t.unread, unreadFile{name, why})
		}
	}
	t.unopened = t.indexUnread(tokensName) >= 0
}

// mayBeThere reports whether there may be a file of that name: also where it cannot be read now.
func mayBeThere(folder Folder, name string) bool {
	_, err := folder.Read(name, 0, maxSealed)
	return !errors.Is(err, fs.ErrNotExist)
}

func headOf(kind binding.Kind) string { return sealedHead + string([]byte{byte(kind)}) }

func sealWith(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// Load returns what was saved; nil when there is no file. A file that is damaged, or sealed with another key or on
// another device (*SpoiltError), stays where it is. So does one that is bound to a fact that cannot be read of the
// device now (*UnopenedError), and one that the kernel does not let be read now (any other error). Save overwrites none
// of them without keeping it, and each start until then finds that tokens were saved. A file that is not sealed as Save
// would do it is sealed anew.
func (t *Tokens) Load() (*tokencache.Snapshot, error) {
	t.unopened, t.unread, t.spoilt = false, nil, nil
	if err := t.takeKey(); err != nil {
		t.awaitKey(err)
		return nil, t.whyUnread()
	}
	m, err := t.loadNoting(tokensName)
	_, spoilt := errors.AsType[*SpoiltError](err)
	switch {
	case spoilt:
		return nil, fmt.Errorf("the tokens that were kept are fetched anew, "+
			"and their file is moved aside when others are saved: %w", err)
	case err != nil:
		return nil, fmt.Errorf("the tokens that were kept cannot be read now, and are fetched anew: %w", err)
	}
	return m, nil
}

// loadNoting loads one file and notes what is to be done about it later. It returns nil when there is none.
func (t *Tokens) loadNoting(name string) (*tokencache.Snapshot, error) {
	m, head, err := t.load(name)
	_, spoilt := errors.AsType[*SpoiltError](err)
	_, unopened := errors.AsType[*UnopenedError](err)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	case spoilt:
		t.spoilt = append(t.spoilt, name)
	case unopened: // and stays so while this process runs
	case err != nil:
		t.unread = append(t.unread, unreadFile{name, err})
	case name != tokensName:
		t.opened = append(t.opened, name)
	case head != t.head:
		_ = t.write(name, *m) // what cannot be kept now is kept, and told of, with the next newer token
	}
	if name == tokensName {
		t.unopened = err != nil && !spoilt
	}
	return m, err
}

// read reads one file, also where others could have changed it: without the key they could only have put back an older
// one. See Tokens.
func (t *Tokens) read(name string) ([]byte, error) {
	sealed, err := t.folder.Read(name, 0, maxSealed)
	if isLoose(err) {
		err = nil
	}
	return sealed, err
}

// load reads and opens one file.
func (t *Tokens) load(name string) (m *tokencache.Snapshot, head string, err error) {
	sealed, err := t.read(name)
	if err != nil {
		return nil, "", err
	}
	m, head, err = t.unseal(sealed)
	unopened, stays := errors.AsType[*UnopenedError](err)
	switch {
	case stays:
		unopened.Name = name
	case err != nil:
		err = &SpoiltError{Name: name, Why: err}
	}
	if err != nil {
		return nil, "", err
	}
	return m, head, nil
}

// Save puts m on the disk. When it returns nil, m outlives a power cut. When it returns an error, what was there before
// does. What Load could not open is kept beside it for a later start; what it could not read is not overwritten before
// that can be read; what was found spoilt is moved aside. Without the key nothing is saved.
func (t *Tokens) Save(m tokencache.Snapshot) error {
	if err := t.takeKey(); err != nil {
		return err
	}
	if err := t.keepUnopened(); err != nil {
		return err
	}
	if err := t.makeWay(m); err != nil {
		return err
	}
	if err := t.write(tokensName, m); err != nil {
		return err
	}
	t.opened = slices.DeleteFunc(t.opened, func(name string) bool { return t.folder.Remove(name) == nil })
	for _, name := range slices.Clone(t.spoilt) {
		_ = t.aside(name) // where it cannot be now, the next save tries it again
	}
	return nil
}

func (t *Tokens) write(name string, m tokencache.Snapshot) error {
	sealed, err := t.sealed(m)
	if err != nil {
		return err
	}
	return t.folder.Replace(name, sealed)
}

// makeWay moves the tokens' file aside, if it is spoilt, once another file is beside it, or else m. The spoilt file may
// be all that shows a start that it is not the first one, and a full disk or a power cut may leave nothing in its
// place.
func (t *Tokens) makeWay(m tokencache.Snapshot) error {
	if !slices.Contains(t.spoilt, tokensName) {
		return nil
	}
	if !slices.ContainsFunc(unopenedNames(), t.isThere) {
		sealed, err := t.sealed(m)
		if err != nil {
			return err
		}
		name, err := t.putAside(sealed, kindOf(t.head))
		if err != nil {
			return err
		}
		t.opened = append(t.opened, name)
	}
	return t.aside(tokensName)
}

// isThere reports whether a file of that name, or something in its place, is certainly there.
func (t *Tokens) isThere(name string) bool {
	_, err := t.read(name)
	_, spoilt := errors.AsType[*SpoiltError](err)
	return err == nil || spoilt
}

// aside moves a file aside if it was found spoilt.
func (t *Tokens) aside(name string) error {
	if !slices.Contains(t.spoilt, name) {
		return nil
	}
	if _, err := t.folder.Aside(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	t.spoilt = slices.DeleteFunc(t.spoilt, func(spoilt string) bool { return spoilt == name })
	return nil
}

// UnopenedError says that a file is bound to a fact that cannot be read of this device now: the unit that reads it
// failed, or the kernel does not show it yet, or the disk is in another device, which has none.
type UnopenedError struct {
	Name string
	Kind binding.Kind
}

func (e *UnopenedError) Error() string {
	return fmt.Sprintf("%s is bound to its device's %s, which this one has not, or nobody can read now; "+
		"it stays, and the next start tries it again (systemctl restart perceptd-cache-key perceptd); "+
		"if this device will never have one, remove the file", e.Name, e.Kind.Name())
}

// maxUnopened is how many files that could not be opened are kept, of each kind that they are bound to. There is a
// second one only where the first could not be read either when a process that could have opened it wrote the second.
const maxUnopened = 4

// unopenedName is where Save keeps the nth file that Load could not open, from 1 on, by the kind that it is bound to.
func unopenedName(kind binding.Kind, nth int) string {
	name := tokensName + ".unopened-" + kind.String()
	if nth > 1 {
		name += fmt.Sprint("-", nth)
	}
	return name
}

func unopenedNamesOf(kind binding.Kind) (all []string) {
	for nth := range maxUnopened {
		all = append(all, unopenedName(kind, nth+1))
	}
	return all
}

func unopenedNames() (all []string) {
	for _, kind := range []binding.Kind{binding.ProductUUID, binding.Serial, binding.MachineID, binding.None} {
		all = append(all, unopenedNamesOf(kind)...)
	}
	return all
}

// putAside puts a sealed file beside the tokens' file, under a free name of its kind. A file that is there already
// stays: it may be the only one that has what it has, also where this process has opened it, until Save has succeeded.
// The same file is not put there twice.
func (t *Tokens) putAside(sealed []byte, kind binding.Kind) (name string, err error) {
	why := fmt.Errorf("%d files were put aside before it, from %s on, which cannot be opened: "+
		"remove those of another device", maxUnopened, unopenedName(kind, 1))
	for _, at := range unopenedNamesOf(kind) {
		there, err := t.read(at)
		_, spoilt := errors.AsType[*SpoiltError](err)
		free := errors.Is(err, fs.ErrNotExist)
		switch {
		case err == nil && bytes.Equal(there, sealed):
			return at, nil
		case err != nil && !spoilt && !free:
			why = err
		case name == "" && (free || slices.Contains(t.spoilt, at)):
			name = at
		}
	}
	if name == "" {
		return "", notOverwritten(why)
	}
	if err := t.aside(name); err != nil {
		return "", err
	}
	return name, t.folder.Replace(name, sealed)
}

// LoadUnopened returns what earlier starts could not open and this one can. The error is about the files that it cannot
// open either, which stay.
func (t *Tokens) LoadUnopened() (all []tokencache.Snapshot, err error) {
	t.opened = nil
	if t.find != nil {
		return nil, nil // Load has noted them
	}
	for _, name := range unopenedNames() {
		m, fault := t.loadNoting(name)
		if m != nil {
			all = append(all, *m)
		}
		err = errors.Join(err, fault)
	}
	return all, err
}

// LoadAgain returns what Load, LoadUnopened and earlier calls of it could not read, as far as it can be read now, each
// file once. The error says why a file still cannot be read; there may be both. Save must not run meanwhile.
func (t *Tokens) LoadAgain() (all []tokencache.Snapshot, err error) {
	if err := t.takeKey(); err != nil {
		for i := range t.unread {
			t.unread[i].why = err
		}
		return nil, err
	}
	before := t.unread
	t.unread = nil
	for _, u := range before {
		if m, _ := t.loadNoting(u.name); m != nil {
			all = append(all, *m)
		}
	}
	return all, t.whyUnread()
}

// unreadFile is a file that cannot be read now.
type unreadFile struct {
	name string
	why  error
}

func (t *Tokens) indexUnread(name string) int {
	return slices.IndexFunc(t.unread, func(u unreadFile) bool { return u.name == name })
}

// whyUnread returns why a file cannot be read now; nil: there is none.
func (t *Tokens) whyUnread() error {
	if len(t.unread) == 0 {
		return nil
	}
	return t.unread[0].why
}

// keepUnopened keeps a file that Load could not open for a start that can: it has a copy of the record, and the marks
// on its tokens.
func (t *Tokens) keepUnopened() error {
	if !t.unopened {
		return nil
	}
	sealed, err := t.read(tokensName)
	var head, kept string
	if err == nil {
		if head, err = cutHead(sealed); err != nil {
			err = &SpoiltError{Name: tokensName, Why: err}
		}
	}
	_, spoilt := errors.AsType[*SpoiltError](err)
	switch {
	case errors.Is(err, fs.ErrNotExist): // somebody took it away
	case spoilt:
		t.spoilt = append(t.spoilt, tokensName)
	case err != nil:
		return notOverwritten(err)
	default:
		if kept, err = t.putAside(sealed, kindOf(head)); err != nil {
			return err
		}
	}
	t.unopened = false
	switch i := t.indexUnread(tokensName); {
	case i >= 0 && (kept == "" || t.indexUnread(kept) >= 0):
		t.unread = slices.Delete(t.unread, i, i+1)
	case i >= 0:
		t.unread[i].name = kept // where LoadAgain finds it
	}
	return nil
}

func notOverwritten(why error) error {
	return fmt.Errorf("what was kept before is not overwritten before it was read, or was taken away: %w", why)
}

func (t *Tokens) sealed(m tokencache.Snapshot) ([]byte, error) {
	text, err := encodeSnapshot(m)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	head := []byte(t.head)
	return append(head, t.seal(t.head).Seal(nil, nil, text, head)...), nil
}

func (t *Tokens) unseal(sealed []byte) (m *tokencache.Snapshot, head string, err error) {
	head, err = cutHead(sealed)
	if err != nil {
		return nil, "", err
	}
	seal := t.seal(head)
	if seal == nil {
		return nil, "", &UnopenedError{Kind: kindOf(head)}
	}
	text, err := seal.Open(nil, nil, sealed[len(head):], []byte(head))
	if err != nil {
		return nil, "", errors.New("it was sealed with another key or on another device, or changed since")
	}
	defer clear(text)
	m, err = decodeSnapshot(text)
	return m, head, err
}

// kindOf returns what a file with that head is bound to.
func kindOf(head string) binding.Kind {
	if head == formerHead {
		return binding.None
	}
	return binding.Kind(head[len(sealedHead)])
}

// cutHead returns the head of a sealed file: formerHead, or that of a kind.
func cutHead(sealed []byte) (string, error) {
	text := string(sealed[:min(len(sealed), len(sealedHead)+1)])
	switch {
	case len(text) < len(sealedHead) || !strings.HasPrefix(text, sealedMagic):
		return "", errors.New("it is no cache file of perceptd")
	case strings.HasPrefix(text, formerHead):
		return formerHead, nil
	case !strings.HasPrefix(text, sealedHead):
		return "", errors.New("it is not of version 1 or 2: another release of perceptd wrote it")
	case len(text) == len(sealedHead):
		return "", errors.New("it ends in its head")
	}
	if kind := binding.Kind(text[len(sealedHead)]); kind != binding.None && kind.Name() == "" {
		return "", errors.New("it is bound to what this release does not know: another release of perceptd wrote it")
	}
	return text, nil
}
