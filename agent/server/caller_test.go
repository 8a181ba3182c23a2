package server

import (
	"net"
	"os"
	"testing"

	"perceptd/agent/attest"
	"perceptd/agent/grants"
	"perceptd/agent/server/limit"
)

func TestQuotaKeys(t *testing.T) {
	t.Parallel()
	in := &grants.Container{ID: "1f"}
	const nobody = grants.NoID
	type who struct {
		caller   grants.Caller
		owner    uint32
		unproved bool
	}
	for _, row := range []struct {
		name string
		a, b who
		same bool
	}{
		{"one user", who{caller: grants.Caller{UID: 1}, owner: nobody},
			who{caller: grants.Caller{UID: 1, GID: 5, PID: 7}, owner: nobody}, true},
		{"two users", who{caller: grants.Caller{UID: 1}, owner: nobody},
			who{caller: grants.Caller{UID: 2}, owner: nobody}, false},
		{"a user's unit", who{caller: grants.Caller{UID: 1, Unit: "a.service"}, owner: nobody},
			who{caller: grants.Caller{UID: 1}, owner: nobody}, false},
		{"a user's two units", who{caller: grants.Caller{UID: 1, Unit: "a.service"}, owner: nobody},
			who{caller: grants.Caller{UID: 1, Unit: "b.service"}, owner: nobody}, false},
		{"a user, not proved", who{caller: grants.Caller{UID: 1}, owner: nobody},
			who{caller: grants.Caller{UID: 1}, owner: nobody, unproved: true}, false},
		{"two users of a unit", who{caller: grants.Caller{UID: 1, Unit: "a.service"}, owner: nobody},
			who{caller: grants.Caller{UID: 2, Unit: "a.service"}, owner: nobody}, false},
		{"a user's manager", who{caller: grants.Caller{UID: 1}, owner: 1},
			who{caller: grants.Caller{UID: 1}, owner: nobody}, true},
		{"a user that the owner of a session has become", who{caller: grants.Caller{UID: 100_001}, owner: 1},
			who{caller: grants.Caller{UID: 1}, owner: nobody}, true},
		{"that, not proved", who{caller: grants.Caller{UID: 100_001}, owner: 1, unproved: true},
			who{caller: grants.Caller{UID: 100_002}, owner: 1, unproved: true}, true},
		{"root in a user's session", who{caller: grants.Caller{UID: 0}, owner: 1},
			who{caller: grants.Caller{UID: 0}, owner: nobody}, true},
		{"a user in root's session", who{caller: grants.Caller{UID: 1}, owner: 0},
			who{caller: grants.Caller{UID: 1}, owner: nobody}, true},
		{"two units of root's", who{caller: grants.Caller{UID: 0, Unit: "a.service"}, owner: nobody},
			who{caller: grants.Caller{UID: 0, Unit: "b.service"}, owner: nobody}, false},
		{"a unit of root's and root", who{caller: grants.Caller{UID: 0, Unit: "a.service"}, owner: nobody},
			who{caller: grants.Caller{UID: 0}, owner: nobody}, false},
		{"two users of a container", who{caller: grants.Caller{UID: 1, Container: in}, owner: nobody},
			who{caller: grants.Caller{UID: 2, Container: in}, owner: nobody}, true},
		{"a user in a container", who{caller: grants.Caller{UID: 1, Container: in}, owner: nobody},
			who{caller: grants.Caller{UID: 1}, owner: nobody}, false},
		{"on a module's socket", who{caller: grants.Caller{UID: 1, Module: "m"}, owner: nobody},
			who{caller: grants.Caller{UID: 2, Module: "m", Container: in}, owner: nobody}, true},
		{"there, not proved", who{caller: grants.Caller{UID: 1, Module: "m"}, owner: nobody},
			who{caller: grants.Caller{UID: 2, Module: "m"}, owner: nobody, unproved: true}, false},
		{"two modules", who{caller: grants.Caller{Module: "m"}, owner: nobody},
			who{caller: grants.Caller{Module: "n"}, owner: nobody}, false},
		{"users who are not known", who{caller: grants.Caller{UID: nobody}, owner: nobody, unproved: true},
			who{caller: grants.Caller{UID: nobody}, owner: nobody, unproved: true}, true},
	} {
		a, b := keyOf(&row.a.caller, row.a.owner, row.a.unproved), keyOf(&row.b.caller, row.b.owner, row.b.unproved)
		if (a == b) != row.same {
			t.Errorf("%s: %v and %v", row.name, a, b)
		}
	}
}

// On a real socket a process is found to be of its user, and closely of what it runs in.
func TestKeyOfAConnection(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	l := d.Callers.Listen(d.listen("s"))
	defer l.Close()
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	me := uint32(os.Getuid())
	keyOfConn := d.newKeyOf()
	if got := keyOfConn(conn, false); got != (limit.Key{UID: me, Parent: true}) {
		t.Errorf("%+v", got)
	}
	who, owner := d.Callers.Peer(conn)
	want := keyOf(&who, owner, false)
	if who.UID != me || int(who.PID) != os.Getpid() {
		t.Errorf("%+v", who)
	}
	for range 2 {
		if got := keyOfConn(conn, true); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	if who, owner := d.Callers.Peer(client); who.UID != grants.NoID || owner != grants.NoID ||
		attest.PeerPID(client) != 0 {
		t.Errorf("of a connection that no listener of the attestor's accepted: %+v %d", who, owner)
	}
}
