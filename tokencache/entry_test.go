package tokencache

import "testing"

// What a token leaves out is not known to be another than before.
func TestOmittedClaimsDoNotDiffer(t *testing.T) {
	t.Parallel()
	full := Claims{Groups: []string{"a"}, Roles: []string{"r"}}
	for _, row := range []struct {
		what   string
		other  Claims
		differ bool
	}{
		{"the same", Claims{Groups: []string{"a"}, Roles: []string{"r"}}, false},
		{"another group", Claims{Groups: []string{"b"}, Roles: []string{"r"}}, true},
		{"no groups", Claims{Roles: []string{"r"}}, true},
		{"groups that are left out", Claims{Roles: []string{"r"}, Omitted: []string{"groups"}}, false},
		{"groups that are left out, and another role", Claims{Roles: []string{"s"}, Omitted: []string{"oid", "groups"}},
			true},
		{"roles that are left out, and no groups", Claims{Omitted: []string{"roles"}}, true},
	} {
		if got := differing(full, row.other, true); (got != nil) != row.differ {
			t.Errorf("%s: %+v", row.what, got)
		}
		if got := differing(row.other, full, true); (got != nil) != row.differ {
			t.Errorf("%s before: %+v", row.what, got)
		}
	}
}
