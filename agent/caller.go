package agent

import "fmt"

// Caller is the local process that asks, as far as it was proved. It is a value: whoever proves a
// caller fills it in, and everything after that only compares it.
type Caller struct {
	// Module is the module whose own socket the caller came in on; empty on the token socket.
	Module string

	// UID, GID and PID are the peer credentials that the kernel recorded when the caller connected.
	UID, GID uint32
	PID      int32
}

func (c Caller) String() string {
	if c.Module != "" {
		return fmt.Sprintf("module %s (uid %d, pid %d)", c.Module, c.UID, c.PID)
	}
	return fmt.Sprintf("uid %d (pid %d)", c.UID, c.PID)
}

// Match says which callers a grant is for. Exactly one field names them.
type Match struct {
	// Module is for whoever comes in on that module's own socket.
	Module string

	// UID is for processes of that user on the token socket, and only there: inside a container a uid
	// says nothing, since root of one container is root of every other.
	UID *uint32

	// User is the name that UID was configured as, for people; empty when it was a number.
	User string
}

func (m Match) String() string {
	switch {
	case m.Module != "":
		return "module " + m.Module
	case m.UID == nil:
		return "nobody"
	case m.User != "":
		return fmt.Sprintf("user %s (uid %d)", m.User, *m.UID)
	}
	return fmt.Sprintf("uid %d", *m.UID)
}

// who is the part of a caller that grants are looked up by.
type who struct {
	module string
	uid    uint32
}

func (c Caller) who() who {
	if c.Module != "" {
		return who{module: c.Module}
	}
	return who{uid: c.UID}
}

func (m Match) who() who {
	if m.UID != nil {
		return who{uid: *m.UID}
	}
	return who{module: m.Module}
}
