package systemd

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// longestStored is the service manager's own limit for a descriptor's name.
const longestStored = 255

const (
	// shippedRoom is FileDescriptorStoreMax= of perceptd.service.
	shippedRoom = 256
	// mostRoom is what can be passed to the next start beside the sockets of the socket units, whatever the unit says.
	mostRoom = mostPassed - 8
)

// StoreRoom returns how many descriptors the service manager keeps, and takes FDSTORE out of the environment. Before
// systemd 254, which is the first to tell, it is what perceptd.service asks for.
func StoreRoom() int {
	text := os.Getenv("FDSTORE")
	_ = os.Unsetenv("FDSTORE") // cannot err
	return parseRoom(text)
}

func parseRoom(text string) int {
	room, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return shippedRoom
	}
	return int(min(room, mostRoom))
}

// Store has the service manager keep a duplicate of a descriptor, and pass it to the next start by that name
// (FDSTORE=1, FileDescriptorStoreMax=). It outlives a restart, a crash and a daemon-reexec; a stop empties the store
// unless FileDescriptorStorePreserve= (254) says otherwise. When the store is full the service manager drops the
// descriptor, and says so in its log alone: count what is stored, against StoreRoom.
func (n Notify) Store(name string, fd int) error {
	if err := checkStored(name); err != nil {
		return err
	}
	// FDPOLL=0 (246): it need not be watched, since it does not end by itself.
	return n.sendWith(unix.UnixRights(fd), "FDSTORE=1", "FDNAME="+name, "FDPOLL=0")
}

// Discard has the service manager close every descriptor that it keeps by that name.
func (n Notify) Discard(name string) error {
	if err := checkStored(name); err != nil {
		return err
	}
	return n.sendWith(nil, "FDSTOREREMOVE=1", "FDNAME="+name)
}

func checkStored(name string) error {
	if name == "" || len(name) > longestStored ||
		strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == ':' }) {
		return fmt.Errorf("%q is no name for a stored descriptor", name)
	}
	return nil
}
