//go:build clients

package clients

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"perceptd/cmd/perceptd/e2e/harness"
)

// fast is how much faster than the device's clock a simulated back end's runs: a day in a minute.
const fast = 1440

const newGroup = "00000000-0000-0000-0002-000000000077"

// TestClientsFollowPolicyChange has each client ask again and again until the token in its hand has the group that its
// identity was added to. Clients that keep a token judge its age by a clock as fast as the back end's.
func TestClientsFollowPolicyChange(t *testing.T) {
	all := programs(t)
	resources := []string{armURI}
	for _, p := range all {
		resources = append(resources, "https://"+p.slug+".example.net")
	}
	source := fmt.Sprintf("rollover = \"half-life\"\nspread = \"5m\"\nspeed = %d.0\n", fast)
	d := harness.LaunchDaemon(t, twoIdentities(source, resources, resources))
	c := newCounter(t, d)
	askers := make([]*asker, len(all))
	for i, p := range all {
		askers[i] = p.start(t, c.socket, "", inStep(p, simulatedNow(t, d))...)
		if got := askers[i].ask(resources[i+1]); got.Token == "" || slices.Contains(groups(t, got), newGroup) {
			t.Fatalf("%s: %v", p.name, got)
		}
	}
	steer(t, d, "permissions", "--identity", "device", "--groups", newGroup)
	noted := simulatedNow(t, d)
	change := `{"all_resources": true, "effect": "granted"}`
	if status, body, err := d.Ask(d.Admin(), "POST", "/v1/policy-changes", change); status/100 != 2 {
		t.Fatal(status, body, err)
	}
	rows := make([][]string, len(all))
	t.Run("each", func(t *testing.T) {
		for i, a := range askers {
			t.Run(a.slug, func(t *testing.T) {
				t.Parallel()
				a.t = t
				asked, calls, minted := a.follow(t, resources[i+1], c)
				now := simulatedNow(t, d)
				hours, late := now.Sub(noted).Hours(), now.Sub(minted)
				t.Logf("asked %d times, of which %d reached the daemon, until %.1f hours after the change, %v after "+
					"the minting",
					asked, calls, hours, late)
				// Every 20 minutes: a life of 25 is told meanwhile, and no client waits for the last 5.
				if most := int(hours*3) + 5; a.cached && calls > most {
					t.Errorf("%d calls in %.1f hours, and %d are the most expected", calls, hours, most)
				}
				each := "whenever it is asked"
				if a.cached {
					each = fmt.Sprintf("every %.0f minutes", hours*60/float64(calls))
				}
				rows[i] = []string{a.name, each, half(late)}
			})
		}
	})
	keepTable(t, "policy", aligned(append([][]string{{"client", "asks perceptd", "has the new token"}}, rows...)))
}

// half is a time in half hours.
func half(late time.Duration) string {
	return fmt.Sprintf("within %.1f hours of its minting", (late.Truncate(30*time.Minute) + 30*time.Minute).Hours())
}

// follow asks until the token has the new group, and returns when that one was minted.
func (a *asker) follow(t *testing.T, resource string, c *counter) (asked, calls int, minted time.Time) {
	t.Helper()
	before, _ := c.of(resource)
	harness.Until(t, "the new token", nil, func() bool {
		got := a.ask(resource)
		if got.Error != "" {
			t.Fatal(got.Error)
		}
		asked++
		// by which Entra dates it back
		minted = time.Unix(int64(harness.Claims(t, got.Token)["iat"].(float64)), 0).Add(5 * time.Minute)
		return slices.Contains(groups(t, got), newGroup)
	})
	calls, _ = c.of(resource)
	return asked, calls - before, minted
}

// inStep is what makes a client's clock run with the back end's, which has that time now.
func inStep(p program, now time.Time) []string {
	switch {
	case !p.cached:
		return nil
	case p.slug == "go" || p.slug == "go-default":
		return []string{"START=" + now.UTC().Format(time.RFC3339)}
	}
	return []string{"TZ=UTC", "LD_PRELOAD=" + library, "FAKETIME_DONT_FAKE_MONOTONIC=1",
		fmt.Sprintf("FAKETIME=@%s x%d", now.UTC().Format(time.DateTime), fast)}
}

// simulatedNow is the time by the back end's clock.
func simulatedNow(t *testing.T, d *harness.Daemon) time.Time {
	t.Helper()
	var state struct{ Now time.Time }
	must(t, json.Unmarshal([]byte(steer(t, d, "state", "--json")), &state))
	return state.Now
}

func groups(t *testing.T, from answer) []string {
	t.Helper()
	var all []string
	for _, group := range harness.Claims(t, from.Token)["groups"].([]any) {
		all = append(all, group.(string))
	}
	return all
}
