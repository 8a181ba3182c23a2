package config

import (
	"cmp"
	"crypto/sha256"
	endian "encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	copyName  = "last.json"
	maxCopy   = 32 << 20
	machineID = "/etc/machine-id"
)

// KeptFolder is where root keeps the copy of the configuration last in force (perceptd-config.service).
const KeptFolder = "/var/lib/percept-config"

// Sum identifies configuration files, by their paths and what they say, in their order.
func Sum(files []File) string {
	sum := sha256.New()
	for _, file := range files {
		for _, part := range [][]byte{[]byte(file.Path), file.Text} {
			_, _ = sum.Write(endian.BigEndian.AppendUint64(nil, uint64(len(part)))) // never fails
			_, _ = sum.Write(part)
		}
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// lastCopy is the configuration last in force, as root keeps it for a start that finds a fault in a file. It is bound
// to the device and to the path of the main file.
type lastCopy struct {
	Machine string `json:"machine"`
	Path    string `json:"path"`
	SHA256  string `json:"sha256"` // Sum of Files
	Files   []File `json:"files"`
}

// Kept keeps the copy of the configuration last in force.
type Kept struct {
	Folder  string // root's, and only root may write there
	machine string // the file with the device's ID; empty: machineID
	owner   int    // who owns the copy beside root, in tests
}

// Keep writes a copy of r where sum, as the daemon has recorded it, is that of its files. It reports whether it has
// written one: one that is there already stays.
func (k Kept) Keep(r Reading, sum string) (written bool, err error) {
	machine, err := k.machineID()
	switch {
	case err != nil:
		return false, err
	case len(r.Faults) > 0:
		return false, fmt.Errorf("the files are not those in force: %w", errors.Join(r.Faults...))
	case Sum(r.Files) != sum:
		return false, errors.New("the files are not those in force: perceptctl reload puts them in force")
	case r.saysNothing():
		return false, nil
	}
	text, err := json.Marshal(lastCopy{Machine: machine, Path: r.path, SHA256: sum, Files: r.Files})
	if err != nil || len(text) > maxCopy {
		return false, cmp.Or(err,
			fmt.Errorf("the configuration is too large to keep a copy of: over %d bytes", maxCopy))
	}
	path := filepath.Join(k.Folder, copyName)
	if before, err := os.ReadFile(path); err == nil && string(before) == string(text) {
		return false, nil
	}
	return true, replaceFile(path, text)
}

// Lock has one process at a time keep a copy. Call unlock in the end.
func (k Kept) Lock() (unlock func(), err error) {
	folder, err := os.Open(k.Folder)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(&fs.PathError{Op: "lock", Path: k.Folder, Err: err}, folder.Close())
	}
	return func() { _ = folder.Close() }, nil
}

// ReadForService is Read for root, in the place of the daemon's user.
func ReadForService(path string) Reading {
	return readTrustedFiles(path, &trust{reader: serviceReader()}, otherMemberOf)
}

// replaceFile puts a file in the place of what was there, whole or not at all. The folder's group may read it.
func replaceFile(path string, text []byte) error {
	file, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	err = errors.Join(err, file.Chmod(0o640), file.Sync(), file.Close())
	if err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	folder, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}

// Last returns the configuration last in force, which had path as its main file: what root's copy has, where only root
// can have written it, it is of this device, and its files have that sum. Those that are not on the disk any more are
// left out, since to take a file away is a decision, and so are those of before, which were taken away earlier. It
// returns the paths of those that are left out.
func (k Kept) Last(path, sum string, before []string) (r Reading, gone []string, err error) {
	if sum == Sum(nil) {
		return r, nil, errors.New("none was in force last, since there was no file")
	}
	by := &trust{self: k.owner, guards: "which configuration goes on"}
	text, _, err := readTrusted(filepath.Join(k.Folder, copyName), maxCopy, by)
	if err == nil && len(by.shared) > 0 {
		err = fmt.Errorf("%s: a group may write there", by.shared[0].path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil, errors.New("there is no copy of the last one: perceptd-config.service makes it, as root")
	}
	if err != nil {
		return r, nil, err
	}
	machine, err := k.machineID()
	if err != nil {
		return r, nil, err
	}
	var last lastCopy
	switch err := json.Unmarshal(text, &last); {
	case err != nil:
		return r, nil, fmt.Errorf("the copy of the last one is spoilt: %w", err)
	case last.Machine != machine:
		return r, nil, errors.New("the copy of the last one is of another device")
	case last.Path != path:
		return r, nil, fmt.Errorf("the copy of the last one is of %s", last.Path)
	case last.SHA256 != sum || Sum(last.Files) != sum:
		return r, nil, errors.New("the copy that is kept is not of the one last in force")
	}
	r.path = path
	for _, file := range last.Files {
		if IsGone(file.Path) || slices.Contains(before, file.Path) {
			gone = append(gone, file.Path)
			continue
		}
		r.Files = append(r.Files, file)
	}
	return r, gone, nil
}

// machineID returns the device's ID, as systemd made it at the first boot.
func (k Kept) machineID() (string, error) {
	path := k.machine
	if path == "" {
		path = machineID
	}
	text, err := os.ReadFile(path)
	id := strings.TrimSpace(string(text))
	if err == nil && len(id) != 32 {
		err = fmt.Errorf("%s has no ID of this device: systemd-machine-id-setup", path)
	}
	return id, err
}
