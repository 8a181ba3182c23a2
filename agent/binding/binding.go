// Package binding tells what this device is known by, so that what was kept on it is of no use on another one that has
// the same disk.
//
// The hardware is asked first, which a copied disk leaves behind. What it says of itself is no secret: it tells devices
// apart, and keeps nobody out who has the key and knows both.
package binding

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Kind is what a device is known by. Its number is written before what is sealed to it, and never changes.
type Kind byte

// The kinds, of which the first that can be read is the best.
const (
	None        Kind = 0 // nothing: what is kept opens wherever its key is
	ProductUUID Kind = 1 // of the mainboard or the virtual machine, by its firmware; only root can read it
	Serial      Kind = 2 // of the board, by the device tree
	MachineID   Kind = 3 // of the installation; on the disk
)

// DeviceFile is what perceptd-cache-key.service has read, as root, of what the device is known by.
const DeviceFile = "/run/percept-cache-key/device"

var kinds = []struct {
	kind       Kind
	word, path string
	says       string
}{
	{ProductUUID, "product-uuid", "sys/class/dmi/id/product_uuid", "product UUID"},
	{Serial, "device-tree-serial", "sys/firmware/devicetree/base/serial-number", "serial number"},
	{MachineID, "machine-id", "etc/machine-id", "machine-id"},
}

// String is the kind's word in interfaces and files.
func (k Kind) String() string {
	for _, of := range kinds {
		if of.kind == k {
			return of.word
		}
	}
	return "none"
}

// Name is what people call it; empty for None.
func (k Kind) Name() string {
	for _, of := range kinds {
		if of.kind == k {
			return of.says
		}
	}
	return ""
}

// KindOf returns the kind of a word; None for any that is none.
func KindOf(word string) Kind {
	for _, of := range kinds {
		if of.word == word {
			return of.kind
		}
	}
	return None
}

// Hardware reports whether a copy of the whole disk leaves it behind.
func (k Kind) Hardware() bool { return k == ProductUUID || k == Serial }

// Binding is one thing that a device is known by: a digest of what stands there.
type Binding struct {
	Kind Kind
	ID   [sha256.Size]byte
}

// Here returns all that this process can read of what the device is known by, the best first. root is "/", but in
// tests.
func Here(root string) (all []Binding) {
	for _, of := range kinds {
		path := filepath.Join(root, of.path)
		text, err := os.ReadFile(path)
		value := strings.ToLower(strings.Trim(string(text), "\x00 \t\r\n"))
		if err != nil || !tellsApart(value) || of.kind == MachineID && !persistent(path, value) {
			continue
		}
		all = append(all, Binding{of.kind, sha256.Sum256([]byte("percept binding\n" + of.word + "\n" + value))})
	}
	return all
}

// persistent reports whether a machine-id is on the disk: where /etc cannot be written to, systemd draws one for each
// boot and mounts it over the file.
func persistent(path, id string) bool {
	if raw, err := hex.DecodeString(id); err != nil || len(raw) != 16 {
		return false // "uninitialized", among others
	}
	file, fileErr := os.Stat(path)
	folder, folderErr := os.Stat(filepath.Dir(path))
	if fileErr != nil || folderErr != nil {
		return false
	}
	one, known := file.Sys().(*syscall.Stat_t)
	other, too := folder.Sys().(*syscall.Stat_t)
	return known && too && one.Dev == other.Dev
}

// Text is what Parse reads: a line for each.
func Text(all []Binding) string {
	var text strings.Builder
	for _, b := range all {
		text.WriteString(b.Kind.String() + " " + hex.EncodeToString(b.ID[:]) + "\n")
	}
	return text.String()
}

// Parse reads what Text wrote. Kinds that it does not know are left out.
func Parse(text string) (all []Binding, err error) {
	for line := range strings.Lines(text) {
		word, digits, _ := strings.Cut(strings.TrimSpace(line), " ")
		id, err := hex.DecodeString(digits)
		if err != nil || len(id) != sha256.Size {
			return nil, errors.New("a line of it names nothing that a device is known by")
		}
		if kind := KindOf(word); kind != None {
			all = append(all, Binding{kind, [sha256.Size]byte(id)})
		}
	}
	return all, nil
}

// Known returns what this device is known by: what root has read of it, in the file at told, and what this process can
// read itself where that says nothing.
func Known(told, root string) (all []Binding, err error) {
	text, err := os.ReadFile(told)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	case err == nil:
		all, err = Parse(string(text))
	}
	for _, b := range Here(root) {
		if !slices.ContainsFunc(all, func(other Binding) bool { return other.Kind == b.Kind }) {
			all = append(all, b)
		}
	}
	slices.SortStableFunc(all, func(a, b Binding) int { return int(a.Kind) - int(b.Kind) })
	return all, err
}

// Best returns the kind of the first; None where there is none.
func Best(all []Binding) Kind {
	if len(all) == 0 {
		return None
	}
	return all[0].Kind
}
