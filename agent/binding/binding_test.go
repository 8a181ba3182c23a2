package binding

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// device is a folder in which a device says of itself what the rows give.
func device(t *testing.T, says map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for path, text := range says {
		path = filepath.Join(root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755),
			os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

const (
	uuidPath    = "sys/class/dmi/id/product_uuid"
	serialPath  = "sys/firmware/devicetree/base/serial-number"
	machinePath = "etc/machine-id"

	uuid    = "7F3C2A10-5B1E-4C55-9D0A-3E1C7F5B2A99\n"
	serial  = "1423320A1B2C3D\x00"
	machine = "3f1c7b2a995d4c55a0e1c7f5b2a99d0a\n"
)

func kindsOf(all []Binding) (kinds []Kind) {
	for _, b := range all {
		kinds = append(kinds, b.Kind)
	}
	return kinds
}

func TestHere(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		says map[string]string
		want []Kind
	}{
		"a PC": {map[string]string{uuidPath: uuid, machinePath: machine},
			[]Kind{ProductUUID, MachineID}},
		"a board": {map[string]string{serialPath: serial, machinePath: machine}, []Kind{Serial, MachineID}},
		"both": {map[string]string{serialPath: serial, uuidPath: uuid, machinePath: machine},
			[]Kind{ProductUUID, Serial, MachineID}},
		"nothing of its own": {map[string]string{machinePath: machine}, []Kind{MachineID}},
		"nothing":            {nil, nil},
		"zeros": {map[string]string{uuidPath: "00000000-0000-0000-0000-000000000000\n",
			serialPath: "0000000000000000\x00"}, nil},
		"ones": {map[string]string{uuidPath: "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF\n"}, nil},
		"a maker's default": {map[string]string{uuidPath: "03000200-0400-0500-0006-000700080009\n",
			serialPath: "0123456789\x00"}, nil},
		"never filled in": {map[string]string{uuidPath: "Not Settable\n", serialPath: "To be filled by O.E.M.\x00"},
			nil},
		"default string":      {map[string]string{serialPath: "Default string\x00"}, nil},
		"empty":               {map[string]string{uuidPath: "\n", serialPath: "", machinePath: ""}, nil},
		"too long":            {map[string]string{serialPath: strings.Repeat("abc", 100)}, nil},
		"machine-id to come":  {map[string]string{machinePath: "uninitialized\n"}, nil},
		"a short machine-id":  {map[string]string{machinePath: "3f1c7b2a\n"}, nil},
		"no hexadecimal":      {map[string]string{machinePath: strings.Repeat("xyz0", 8) + "\n"}, nil},
		"machine-id of zeros": {map[string]string{machinePath: strings.Repeat("0", 32) + "\n"}, nil},
	} {
		if got := kindsOf(Here(device(t, row.says))); !reflect.DeepEqual(got, row.want) {
			t.Errorf("%s: %v, want %v", name, got, row.want)
		}
	}
}

// A machine-id that systemd drew for this boot is on another file system than /etc, and no device is known by it.
func TestPassingMachineID(t *testing.T) {
	t.Parallel()
	root := device(t, map[string]string{"etc/hostname": "x\n"})
	memory, err := os.CreateTemp("/dev/shm", "percept-machine-id-*")
	if err != nil {
		t.Skipf("needs a file system in memory: %v", err)
	}
	defer os.Remove(memory.Name())
	_, err = memory.WriteString(machine)
	if err := errors.Join(err, memory.Close(),
		os.Symlink(memory.Name(), filepath.Join(root, machinePath))); err != nil {
		t.Fatal(err)
	}
	var here, there unix.Stat_t
	if err := errors.Join(unix.Stat(root, &here), unix.Stat(memory.Name(), &there)); err != nil {
		t.Fatal(err)
	}
	if here.Dev == there.Dev {
		t.Skip("the test's folder is in memory, too")
	}
	if got := Here(root); got != nil {
		t.Errorf("it is known by %v", kindsOf(got))
	}
}

// The same value is another binding on another device, and under another kind; how it is written is nothing.
func TestBindingsTellDevicesApart(t *testing.T) {
	t.Parallel()
	one := Here(device(t, map[string]string{uuidPath: uuid}))
	for name, says := range map[string]map[string]string{
		"another device": {uuidPath: strings.Replace(uuid, "7F", "8F", 1)},
		"another kind":   {serialPath: uuid},
	} {
		if other := Here(device(t, says)); len(other) != 1 || other[0].ID == one[0].ID {
			t.Errorf("%s: %v", name, other)
		}
	}
	if same := Here(device(t, map[string]string{uuidPath: " " + strings.ToLower(uuid)})); !reflect.DeepEqual(same,
		one) {
		t.Errorf("in small letters: %v", same)
	}
}

// What root has read counts, and is completed by what anybody can read.
func TestKnown(t *testing.T) {
	t.Parallel()
	whole := Here(device(t, map[string]string{uuidPath: uuid, machinePath: machine}))
	told := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(told, []byte(Text(whole[:1])+"vein-pattern "+strings.Repeat("00", 32)+"\n"),
		0o644); err != nil {
		t.Fatal(err)
	}
	without := device(t, map[string]string{machinePath: machine})
	if got, err := Known(told, without); err != nil || !reflect.DeepEqual(got, whole) || Best(got) != ProductUUID {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := Known(told+".none", without); err != nil || !reflect.DeepEqual(got, whole[1:]) {
		t.Errorf("nobody has told: %v, %v", got, err)
	}
	for _, nonsense := range []string{"product-uuid", "product-uuid 00", "product-uuid " + strings.Repeat("x", 64),
		"\x00"} {
		if err := os.WriteFile(told, []byte(nonsense), 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := Known(told, without); err == nil || Best(got) != MachineID {
			t.Errorf("%q: %v, %v", nonsense, got, err)
		}
	}
}

func TestKinds(t *testing.T) {
	t.Parallel()
	for _, kind := range []Kind{ProductUUID, Serial, MachineID, None} {
		if KindOf(kind.String()) != kind || (kind.Name() == "") != (kind == None) ||
			kind.Hardware() != (kind == ProductUUID || kind == Serial) {
			t.Errorf("%d: %q, %q", kind, kind, kind.Name())
		}
	}
	if Best(nil) != None || Kind(9).String() != "none" || KindOf("") != None {
		t.Error("nothing is something")
	}
}
