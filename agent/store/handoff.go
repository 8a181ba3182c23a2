package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"perceptd/tokencache"
)

const (
	memfdName  = "perceptd-tokens"
	memfdMagic = "percept-memory\x00\x01" // and its version

	memfdHead = len(memfdMagic) + 8 + sha256.Size // then the text's length, and its digest
	maxMemfd  = memfdHead + maxSnapshot

	allSeals = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

	// sysMemfdSecret has this number on every architecture that has the call.
	sysMemfdSecret = 447
)

// Systemd holds a handoff by a name: this prefix and a number, higher for what was stored later. HandoffRoom is how
// many it holds at most: two of the cache and two of the deny rules, while one takes the other's place.
const (
	HandoffPrefix = "cache-"
	HandoffRoom   = 4
)

// Handoff hands a snapshot over to the next process, by a descriptor that systemd holds meanwhile.
type Handoff struct {
	Store   func(name string, fd int) error // has systemd hold a descriptor
	Discard func(name string) error         // has it hold those of that name no more

	held []string // names
}

// Take returns what earlier processes handed over in files, which systemd held by these names, the latest first.
// Systemd goes on holding it until Save. Take calls unusable for each file that is of no use.
func (h *Handoff) Take(files map[string]*os.File, unusable func(name string, why error)) (all []tokencache.Snapshot) {
	byNumber := make(map[uint64]tokencache.Snapshot)
	for name, file := range files {
		h.held = append(h.held, name)
		number, err := strconv.ParseUint(strings.TrimPrefix(name, HandoffPrefix), 10, 64)
		var m *tokencache.Snapshot
		if err == nil {
			m, err = ReadMemfd(file)
		}
		if err != nil {
			unusable(name, err)
			continue
		}
		byNumber[number] = *m
	}
	for _, number := range slices.Backward(slices.Sorted(maps.Keys(byNumber))) {
		all = append(all, byNumber[number])
	}
	return all
}

// Save hands m over in the place of what was handed over before.
func (h *Handoff) Save(m tokencache.Snapshot) error {
	file, err := WriteMemfd(m)
	if err != nil {
		return err
	}
	defer file.Close()
	return h.hold(file, HandoffPrefix+strconv.FormatInt(int64(m.Boot), 10))
}

// hold has systemd hold file by that name, in the place of what it holds.
func (h *Handoff) hold(file *os.File, name string) error {
	if err := h.Store(name, int(file.Fd())); err != nil {
		return err
	}
	before := h.held
	h.held = []string{name}
	for _, old := range before { // the new one first: a crash in between leaves two, and never none
		if old == name {
			continue
		}
		if err := h.Discard(old); err != nil {
			h.held = append(h.held, old)
		}
	}
	return nil
}

// WriteMemfd writes m into memory that outlives this process in a descriptor, for systemd to hold. Where the kernel
// allows it, that is memory which no other process can read without the descriptor, not even one of root's. Elsewhere
// it is a memfd that nobody can change any more.
func WriteMemfd(m tokencache.Snapshot) (*os.File, error) {
	text, err := encodeSnapshot(m)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	framed := frame(text)
	defer clear(framed)
	if f, err := writeSecretMemfd(framed); err == nil {
		return f, nil
	}
	return writeSealedMemfd(framed)
}

// ReadMemfd returns what WriteMemfd wrote into f, which stays open.
func ReadMemfd(f *os.File) (*tokencache.Snapshot, error) {
	return readDocument(f, decodeSnapshot)
}

// readDocument returns what decode makes of what is in f, which stays open.
func readDocument[D any](f *os.File, decode func(text []byte) (*D, error)) (*D, error) {
	defer runtime.KeepAlive(f) // it is read by its number, which is closed, and another's, once nothing refers to f
	framed, err := readFramed(f)
	defer clear(framed)
	var text []byte
	if err == nil {
		text, err = unframe(framed)
	}
	var d *D
	if err == nil {
		d, err = decode(text)
	}
	if err != nil {
		return nil, fmt.Errorf("the memory that was carried over: %w", err)
	}
	return d, nil
}

// frame puts a head before text, by which unframe tells a whole one from a torn one or one of another version.
func frame(text []byte) []byte {
	digest := sha256.Sum256(text)
	framed := make([]byte, 0, memfdHead+len(text))
	framed = append(framed, memfdMagic...)
	framed = binary.BigEndian.AppendUint64(framed, uint64(len(text)))
	framed = append(framed, digest[:]...)
	return append(framed, text...)
}

func unframe(framed []byte) ([]byte, error) {
	rest, ok := bytes.CutPrefix(framed, []byte(memfdMagic))
	if !ok || len(framed) < memfdHead {
		return nil, errors.New("it is not what this release of perceptd writes")
	}
	length, digest, text := binary.BigEndian.Uint64(rest), rest[8:8+sha256.Size], rest[8+sha256.Size:]
	if sum := sha256.Sum256(text); length != uint64(len(text)) || !bytes.Equal(sum[:], digest) {
		return nil, errors.New("it is not whole")
	}
	return text, nil
}

// writeSecretMemfd uses memory that the kernel removes from its own view. It counts as locked memory, which
// RLIMIT_MEMLOCK bounds.
func writeSecretMemfd(framed []byte) (*os.File, error) {
	fd, _, errno := unix.Syscall(sysMemfdSecret, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		return nil, os.NewSyscallError("memfd_secret", errno)
	}
	f := os.NewFile(fd, memfdName)
	if err := fillSecret(f, framed); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

func fillSecret(f *os.File, framed []byte) error {
	if err := f.Truncate(int64(len(framed))); err != nil {
		return err
	}
	there, err := unix.Mmap(int(f.Fd()), 0, len(framed), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	copy(there, framed)
	return os.NewSyscallError("munmap", unix.Munmap(there))
}

func writeSealedMemfd(framed []byte) (*os.File, error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(memfdName, flags|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate(memfdName, flags)
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), memfdName)
	_, err = f.Write(framed)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, allSeals)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("memory for what is carried over: %w", err)
	}
	return f, nil
}

// readFramed reads what is in f if it is of one of the two kinds that WriteMemfd makes, and refuses everything else. It
// does not wait for a pipe or a file, and takes nothing that others could change meanwhile.
func readFramed(f *os.File) ([]byte, error) {
	secret, err := isSecret(f)
	if err != nil {
		return nil, err
	}
	if seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0); !secret && (err != nil || seals&allSeals != allSeals) {
		return nil, errors.New("it is neither a sealed memfd nor a memfd_secret")
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if size := info.Size(); size < int64(memfdHead) || size > int64(maxMemfd) {
		return nil, fmt.Errorf("%d bytes are not what perceptd writes", size)
	}
	framed := make([]byte, info.Size())
	if secret {
		return framed, readSecret(f, framed)
	}
	_, err = f.ReadAt(framed, 0)
	return framed, err
}

func isSecret(f *os.File) (bool, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return false, os.NewSyscallError("fstatfs", err)
	}
	return int64(fs.Type) == unix.SECRETMEM_MAGIC, nil
}

func readSecret(f *os.File, framed []byte) error {
	there, err := unix.Mmap(int(f.Fd()), 0, len(framed), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mmap: %w: is LimitMEMLOCK lower than it was?", err)
	}
	copy(framed, there)
	return os.NewSyscallError("munmap", unix.Munmap(there))
}
