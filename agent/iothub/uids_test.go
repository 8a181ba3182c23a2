package iothub

import (
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/grants"
)

// TestUidsTakeThePlaceOfNames shows that each side that denies a user may name the uid, for users that the device does
// not know by name.
func TestUidsTakeThePlaceOfNames(t *testing.T) {
	twin(t, func(t *testing.T, w twinned) {
		ldap := grants.Caller{Module: "vision", UID: 70001}
		expect := func(what string, want bool) {
			t.Helper()
			if _, code := w.served(t, ldap); (code == api.CodeDenied) != want {
				t.Errorf("%s: %q", what, code)
			}
			if served, code := w.served(t, vision); !served {
				t.Errorf("%s: another user gets %q", what, code)
			}
		}
		expect("no rule", false)
		w.reads(1, `{"deny":[{"user":"70001"}]}`)
		expect("the twin", true)
		w.reads(2, `{"deny":[{"user":"user-of-a-directory"}]}`)
		expect("the twin, by name", false)
		if idle := w.describe().Idle; len(idle) != 1 || idle[0] != "percept.deny[0]: /etc/passwd has no user "+
			"user-of-a-directory (of users from elsewhere name the uid)" {
			t.Errorf("idle: %q", idle)
		}
		if status, text := w.ask(t, api.MethodDeny, `{"user":"70001"}`); status != 200 {
			t.Fatal(text)
		}
		expect("a method", true)
		a := w.desired.agent
		for _, rule := range a.DenyStatus().Rules {
			if rule.Origin == api.DenyMethod {
				if _, err := a.LiftDeny(w.hub, api.DenySide{Origin: api.DenyMethod, Hub: w.hub}, rule.ID); err != nil {
					t.Fatal(err)
				}
			}
		}
		expect("lifted", false)
		if _, err := a.Deny("uid 0 (pid 1)", api.DenySide{Origin: api.DenyLocal},
			api.DenyRequest{DenyTarget: api.DenyTarget{User: "70001"}}); err != nil {
			t.Fatal(err)
		}
		expect("a person", true)
	})
}
