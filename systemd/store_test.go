package systemd

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"perceptd/cmd/perceptd/e2e/harness"
)

func TestStore(t *testing.T) {
	t.Parallel()
	path := filepath.Join(harness.ShortFolder(t), "notify")
	conn := receiver(t, path)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	n := Notify{address: path}
	if err := n.Store("module-vision-7", int(null.Fd())); err != nil {
		t.Fatal(err)
	}
	message, control := make([]byte, 512), make([]byte, 64)
	length, rights, _, _, err := conn.ReadMsgUnix(message, control)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Split(string(message[:length]), "\n"); !slices.Equal(got,
		[]string{"FDSTORE=1", "FDNAME=module-vision-7", "FDPOLL=0"}) {
		t.Errorf("received %q", got)
	}
	messages, err := unix.ParseSocketControlMessage(control[:rights])
	if err != nil || len(messages) != 1 {
		t.Fatal(messages, err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		t.Fatal(fds, err)
	}
	got := os.NewFile(uintptr(fds[0]), "received")
	defer got.Close()
	here, errHere := null.Stat()
	there, errThere := got.Stat()
	if errHere != nil || errThere != nil || !os.SameFile(here, there) {
		t.Errorf("another file was received: %v %v", errHere, errThere)
	}
	if err := n.Discard("module-vision-7"); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, conn); got != "FDSTOREREMOVE=1\nFDNAME=module-vision-7" {
		t.Errorf("received %q", got)
	}
}

func TestStoreRefuses(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "a:b", "a b", "a\nFDNAME=b", "ä", "a\x7f", strings.Repeat("a", 256)} {
		if (Notify{}).Store(name, 0) == nil || (Notify{}).Discard(name) == nil {
			t.Errorf("%q is a name", name)
		}
	}
	if err := (Notify{}).Store("a", 0); err != nil {
		t.Errorf("outside systemd: %v", err)
	}
	path := filepath.Join(harness.ShortFolder(t), "notify")
	receiver(t, path)
	if err := (Notify{address: path}).Store("a", -1); err == nil {
		t.Error("what is no descriptor was stored")
	}
}

// What was stored and is of no use is closed, and is no reason not to start.
func TestClaimStored(t *testing.T) {
	t.Parallel()
	plain, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	stream := func() *os.File { return socketFile(t, unix.AF_UNIX, unix.SOCK_STREAM, 1) }
	again, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	carried, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	files := []*os.File{stream(), stream(), plain, stream(), socketFile(t, unix.AF_UNIX, unix.SOCK_STREAM, -1), carried,
		again}
	given, err := claim(wanted, []string{"token", "module-a-1", "module-b-2", "module-a-1", "module-c-3", "cache-1",
		"cache-1"}, files)
	found, unknown := given.Listeners, given.Unknown
	if len(given.Files) != 1 || given.Files["cache-1"] != carried {
		t.Errorf("files %v", given.Files)
	}
	if err != nil || len(found) != 2 || found["module-a-1"] == nil ||
		!slices.Equal(unknown, []string{"module-b-2", "module-a-1", "module-c-3", "cache-1"}) {
		t.Errorf("%v, %v, %v", found, unknown, err)
	}
	given.Close()
	for _, file := range files {
		if file.Close() == nil {
			t.Error("a passed descriptor was left open")
		}
	}
}

func TestStoreRoom(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int{"": shippedRoom, "8": 8, "0": 0, "5000": mostRoom,
		"-1": shippedRoom, "many": shippedRoom,
		"99999999999": shippedRoom} {
		if got := parseRoom(text); got != want {
			t.Errorf("FDSTORE=%q: %d", text, got)
		}
	}
	unit := settings(t, serviceUnit)["Service.FileDescriptorStoreMax"]
	if !slices.Equal(unit, []string{strconv.Itoa(shippedRoom)}) {
		t.Errorf("the unit asks for %q", unit)
	}
}
