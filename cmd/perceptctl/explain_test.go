package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"perceptd/agent/api"
	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
)

const vault = "https://vault.azure.net"

// scenario is a token and what is on record, made by changes to a token of nine hours that is current.
type scenario struct {
	name    string
	token   func(*api.TokenStatus)
	changes []api.PolicyChange
	says    []string
	hides   []string
}

func scenarios() []scenario {
	granted := aChange("1f0c2a34", api.EffectGranted, time.Hour, 2)
	return append([]scenario{
		{
			name: "current, and no change is known",
			says: []string{
				"vision's token for " +
					vault + " is current, as far as perceptd was told: no policy change for it is on record.",
				"was minted at 03:00 (9h ago).", "It expires at Nov 24 03:00 (in 15h).",
				"It carries no groups, no app roles and no directory roles.",
				"gave a newer token (asked once so far).",
				"has not been learnt yet: no rollover of this token was observed so far.",
				"It is current now.", "Percept-Permissions: current.",
				"to do Nothing.", "perceptctl policy-changed " + vault + " --effect",
			},
			hides: []string{"RBAC", "recalled", "withdraw"},
		},
		{
			name:    "current, a change was met",
			changes: []api.PolicyChange{aChange("1f0c2a34", api.EffectGranted, 20*time.Hour, 0)},
			says: []string{"is current: it carries every policy change on record.", "and carries it.",
				"Direct Azure RBAC"},
			hides: []string{"withdraw"},
		},
		{
			name: "stale, the back end rolls over at expiry",
			token: func(token *api.TokenStatus) {
				*token = lacking(*token, api.PermissionsStale, time.Hour)
				token.Permissions.Likely = token.Permissions.CurrentBy
				token.Rollover = api.RolloverStatus{Pattern: api.RolloverRegular, Seen: 1, Age: 86400,
					Expected: token.ExpiresOn}
				token.LastOutcome, token.Fetches = api.OutcomeUnchanged, 3
			},
			changes: []api.PolicyChange{granted},
			says: []string{
				"is stale: it was minted before a policy change (at 11:00).",
				"Permissions were granted at 11:00 (1h ago) to every identity on every resource (ID 1f0c2a34).",
				"minted before that, and does not carry it.",
				"gave its copy of the token already held (asked 3 times so far).",
				"always at the expiry of the one before (1 rollover of this token was observed).",
				"The next is expected at about Nov 24 03:00 (in 15h).",
				"by Nov 24 03:00 (in 15h) at the latest, if the back end answers, and probably not much earlier.",
				fmt.Sprintf("Percept-Permissions: stale; changed=%d; current-by=%d.", noon.Add(-time.Hour).Unix(),
					noon.Add(15*time.Hour+time.Second).Unix()),
				"25 minutes at most", "cannot be recalled",
				"Wait: nothing can hurry the back end", "perceptctl policy-changes withdraw 1f0c2a34.",
			},
		},
		{
			name: "stale, the back end rolls over at half life",
			token: func(token *api.TokenStatus) {
				*token = lacking(*token, api.PermissionsStale, time.Hour)
				token.Permissions.Likely = noon.Add(3 * time.Hour)
				token.Rollover = api.RolloverStatus{Pattern: api.RolloverRegular, Seen: 4, Age: 43200,
					Expected: after(3 * time.Hour)}
			},
			changes: []api.PolicyChange{granted},
			says:    []string{"always at about 12h of age (4 rollovers", "and probably by 15:00 (in 3h)."},
		},
		{
			name: "uncertain while the change spreads",
			token: func(token *api.TokenStatus) {
				*token = lacking(*token, api.PermissionsUncertain, time.Minute)
				token.IssuedFrom, token.IssuedTo, token.HeldUntil = after(-3*time.Minute), after(2*time.Minute),
					after(9*time.Minute)
				token.Rollover.Pattern = api.RolloverIrregular
				token.LastOutcome = api.OutcomeOlder
			},
			changes: []api.PolicyChange{{ID: "a", Effect: api.EffectChanged, Identity: "vision", Resource: vault,
				At: noon.Add(-time.Minute), RecordedOn: noon.Add(-time.Minute),
				Unsure: true, Note: "by\nmail", Touched: 1, Waiting: 1}},
			says: []string{
				"is uncertain: it may or may not carry a policy change (at 11:59).",
				"was minted between 11:57 and 12:02 (no more exactly, since the issuer may date a token back by 5 " +
					"minutes).",
				"Permissions were changed at 11:59 (1m ago) for identity vision on " +
					vault + " (ID a). Note: \"by mail\". That time is not sure",
				"Whether the token carries it cannot be told", "at ages that differ",
				"gave a token minted before the one held, which stays",
				"Until 12:09 (in 9m) perceptd asks for no newer token: a policy change takes minutes to reach new " +
					"tokens",
				"Whether it comes earlier cannot be said",
			},
		},
	}, moreScenarios()...)
}

func moreScenarios() []scenario {
	return []scenario{
		{
			name: "withheld",
			token: func(token *api.TokenStatus) {
				*token = lacking(*token, api.PermissionsStale, time.Hour)
				token.Permissions.Withheld, token.Refused = true, after(-5*time.Minute)
			},
			changes: []api.PolicyChange{aChange("c", api.EffectGranted, time.Hour, 2),
				aChange("b", api.EffectRevoked, 2*time.Hour, 2),
				aChange("a", api.EffectRevoked, 3*time.Hour, 2)},
			says: []string{
				"is withheld: permissions were revoked", "are refused (403, permissions_revoked) on every form",
				"A module reported at 11:55 (5m ago) that the resource refused this token.",
				"perceptctl policy-changes withdraw b a.", "from every identity",
			},
			hides: []string{"SDKs are told", "Percept-Permissions"},
		},
		{
			name: "of a former principal",
			token: func(token *api.TokenStatus) {
				token.Former, token.Claims = true, &api.TokenClaims{ObjectID: "object-1", TenantID: "tenant-1",
					ClientID: "client-1"}
				token.LastOutcome = api.OutcomeFormer
			},
			says: []string{
				"It speaks for object ID object-1, tenant tenant-1, which is a former principal of the identity",
				"gave a token of a principal that the identity's tokens were of before, which is taken only where " +
					"none is held",
			},
			hides: []string{"client-1"},
		},
		{
			name: "withheld through an alternate",
			token: func(token *api.TokenStatus) {
				*token = lacking(*token, api.PermissionsStale, time.Hour)
				token.Permissions.Withheld = true
			},
			changes: []api.PolicyChange{{ID: "e", Resource: "https://alternate.example", Effect: api.EffectRevoked,
				At: noon.Add(-time.Hour), Touched: 1, Waiting: 1}},
			says: []string{"from every identity on https://alternate.example (ID e). That resource is an alternate " +
				"of this one. The token was minted before that",
				"withdraw e."},
			hides: []string{"No policy change that touches it"},
		},
		{
			name: "a daemon that is older",
			token: func(token *api.TokenStatus) {
				*token = lacking(*token, api.PermissionsStale, time.Hour)
				token.Changes = nil
			},
			says:  []string{"perceptd does not say, since it is older than this perceptctl: it is to be restarted."},
			hides: []string{"No policy change that touches it"},
		},
		{
			name: "missing, the back end fails",
			token: func(token *api.TokenStatus) {
				*token = api.TokenStatus{Identity: "vision",
					Resource: vault, State: api.StateMissing, LastFetch: after(-10 * time.Second),
					LastOutcome: api.OutcomeFailed, LastError: "it does not answer.", Failures: 4, Fetches: 4,
					NextRefresh: after(-time.Second)}
			},
			changes: []api.PolicyChange{aChange("1f0c2a34", api.EffectGranted, time.Hour, 0)},
			says: []string{
				"vision has no token for " +
					vault + ": the back end did not give one.", "and gave none (asked 4 times so far)",
				"Fetching fails, 4 times in a row: it does not answer. It is asked again right now.",
				"A token that comes now is judged by the changes above.", "See to the back end",
			},
			hides: []string{"carries", "Percept-Permissions"},
		},
		{
			name: "not there yet",
			token: func(token *api.TokenStatus) {
				*token = api.TokenStatus{Identity: "vision", Resource: vault, State: api.StateFetching}
			},
			says: []string{"has no token for " + vault + " yet: it is being fetched.", "It has not answered yet.",
				"No further fetch is planned.", "Wait a moment"},
		},
		{
			name: "not fetched while a revocation is spreading",
			token: func(token *api.TokenStatus) {
				*token = api.TokenStatus{Identity: "vision", Resource: vault, State: api.StateFetching,
					NextRefresh: after(9 * time.Minute), HeldUntil: after(9 * time.Minute)}
			},
			changes: []api.PolicyChange{aChange("a", api.EffectRevoked, time.Minute, 0)},
			says: []string{"has no token for " + vault + ", and none is fetched while a revocation is spreading.",
				"It is asked again at 12:09 (in 9m).", "Wait: the token comes by itself."},
			hides: []string{"or earlier when a caller needs"},
		},
		{
			name: "failing with a token",
			token: func(token *api.TokenStatus) {
				token.State, token.LastOutcome, token.LastError, token.Failures = api.StateFailing, api.OutcomeFailed,
					"throttled", 1
			},
			says: []string{"Fetching fails: throttled. It is asked again at 13:00 (in 1h)",
				"see to the back end before it expires"},
			hides: []string{"in a row"},
		},
		{
			name:  "current and refused",
			token: func(token *api.TokenStatus) { token.Refused = after(-5 * time.Minute) },
			says: []string{"If permissions on " + vault + " were changed, tell perceptd",
				"the permission may be missing."},
		},
		{
			name: "of an older daemon, nobody asks for it",
			token: func(token *api.TokenStatus) {
				token.State, token.Permissions, token.IssuedFrom, token.Claims, token.LastOutcome = api.StateIdle,
					api.Permissions{}, time.Time{}, nil, "odd"
			},
			says: []string{"minted at a time that is not known", "its claims cannot be read",
				"an answer that is not known here", "left to expire", "current."},
		},
		{
			name: "claims differ, and are many",
			token: func(token *api.TokenStatus) {
				token.IssuedFrom = after(-20 * time.Hour)
				token.Claims = &api.TokenClaims{Audience: "https://other.example",
					Groups: []string{"a", "b", "c", "d", "e"}, Roles: []string{"R"}}
				token.Before = &api.TokenClaims{Groups: []string{"a", "b", "c", "d"}, Roles: []string{"R"},
					WIDs: []string{"w"}}
			},
			says: []string{
				"carries 5 groups (a, b, c and 2 more), 1 app role (R) and no directory roles. Its audience is " +
					"https://other.example.",
				"Compared with the token before it, 1 group (e) came, 1 directory role (w) went. That is evidence of " +
					"a change that reached it, and no proof",
				"since it carries no date of its own",
			},
		},
		{
			name: "claims are left out",
			token: func(token *api.TokenStatus) {
				token.IssuedFrom = after(-20 * time.Hour)
				token.Claims = &api.TokenClaims{Omitted: []string{"groups"}, Roles: []string{"R"}}
				token.Before = &api.TokenClaims{Groups: []string{"a"}, Roles: []string{"S"}}
			},
			says: []string{
				"carries groups that are too long to be kept, or cannot be shown, 1 app role (R) and no directory " +
					"roles.",
				"Compared with the token before it, 1 app role (R) came, 1 app role (S) went.",
			},
		},
		{
			name: "the record was lost",
			token: func(token *api.TokenStatus) {
				*token = lacking(*token, api.PermissionsUncertain, time.Hour)
				token.Permissions.CurrentBy = time.Time{}
			},
			changes: []api.PolicyChange{aChange("a", api.EffectUnknown, time.Hour, 2)},
			says: []string{"The record of policy changes could not be read at 11:00 (1h ago): whether permissions " +
				"changed before is not known (ID a).",
				"cannot be told", "When a current token is here is not known."},
		},
		{
			name: "the record cannot be read, and withholds",
			token: func(token *api.TokenStatus) {
				*token = lacking(*token, api.PermissionsStale, time.Hour)
				token.Permissions.Withheld = true
			},
			changes: []api.PolicyChange{ofRecord(api.RecordUnread,
				"chown percept: /var/lib/percept/*; it is read again every minute", true)},
			says: []string{"is withheld: the record of policy changes cannot be read, and it may lack a change that " +
				"was on it ([tokens] lost_record).",
				"The record of policy changes cannot be read, since 11:00 (1h ago): whether permissions changed " +
					"before is not known, and tokens from before are withheld ([tokens] lost_record) (ID unread).",
				"until that is ended", "To mend the record of policy changes: chown percept: /var/lib/percept/*; it " +
					"is read again every minute."},
			hides: []string{"revoked at", "were revoked", "Wait", "withdraw unread", "at the latest"},
		},
		{
			name:  "the record is lost, and a change was noted since",
			token: func(token *api.TokenStatus) { *token = lacking(*token, api.PermissionsUncertain, time.Minute) },
			changes: []api.PolicyChange{aChange("b", api.EffectChanged, time.Minute, 2),
				ofRecord(api.RecordLost, "enter them again, then: perceptctl policy-changes withdraw lost-1", false)},
			says: []string{"The record of policy changes is lost, since 11:00 (1h ago): whether permissions changed " +
				"before is not known (ID lost-1).",
				"To mend the record of policy changes: enter them again, then: perceptctl policy-changes withdraw " +
					"lost-1. Wait: nothing", "withdraw b."},
			hides: []string{"withheld"},
		},
		{
			name: "a date that does not count",
			token: func(token *api.TokenStatus) {
				*token = lacking(*token, api.PermissionsStale, 5*time.Minute)
				token.IssuedFrom, token.IssuedTo = after(-2*time.Minute), after(-2*time.Minute)
			},
			changes: []api.PolicyChange{dated(5*time.Minute, time.Minute)},
			says: []string{"is stale: it was minted before a policy change (at 11:55, which counts as of its note at " +
				"11:59).",
				"It counts as of its note, at 11:59 (1m ago), since this device's clock was not known to be right " +
					"then. The token was minted before that note, and does not count as carrying it."},
			hides: []string{"cannot be told", "time is not sure"},
		},
	}
}

// ofRecord is what stands for the record since an hour.
func ofRecord(is api.RecordState, mend string, withholds bool) api.PolicyChange {
	change := aChange("unread", api.EffectUnknown, time.Hour, 2)
	if is == api.RecordLost {
		change.ID = "lost-1"
	}
	change.RecordedOn, change.Record, change.Mend, change.Withholds = change.At, is, mend, withholds
	return change
}

// dated is a change that happened some time before it was noted, as somebody said whose clock nobody vouches for.
func dated(ago, noted time.Duration) api.PolicyChange {
	change := aChange("d", api.EffectChanged, ago, 2)
	change.RecordedOn, change.Unsure, change.AsOfRecording = noon.Add(-noted), true, true
	return change
}

func TestStories(t *testing.T) {
	t.Parallel()
	for _, test := range scenarios() {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			token := aToken("vision", vault, 9*time.Hour)
			if test.token != nil {
				test.token(&token)
			}
			if test.changes != nil {
				token = judged(token, test.changes...)
			}
			other := api.PolicyChange{ID: "other", Identity: "device", Effect: api.EffectRevoked, At: noon}
			status := api.Status{Now: noon, Tokens: []api.TokenStatus{token}, Changes: append(test.changes, other)}
			s := screen{Screen: term.Screen{Width: 80}}
			story := explain.Of(s.times(), status, token)
			shown := s.explanation(story)
			checkWidth(t, shown, 80, false)
			flat := strings.Join(strings.Fields(shown), " ")
			for _, want := range test.says {
				if !strings.Contains(flat, want) {
					t.Errorf("does not say %q:\n%s", want, shown)
				}
			}
			for _, hidden := range append(test.hides, "other") {
				if strings.Contains(strings.ReplaceAll(flat, "https://other.example", ""), hidden) {
					t.Errorf("says %q:\n%s", hidden, shown)
				}
			}
			for _, p := range story.Sections {
				if !strings.HasSuffix(p.Text, ".") || strings.Contains(p.Text, "..") || strings.Contains(p.Text, "  ") {
					t.Errorf("no sentence: %q", p.Text)
				}
			}
			if _, err := json.Marshal(story); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestManyChanges has more changes than are told one by one, some met and some not, as perceptd judges them.
func TestManyChanges(t *testing.T) {
	t.Parallel()
	token := lacking(aToken("vision", vault, 9*time.Hour), api.PermissionsStale, 8*time.Hour)
	status := api.Status{Now: noon}
	want := make(map[string]api.PermissionState)
	add := func(id string, standing api.PermissionState) {
		status.Changes = append(status.Changes, aChange(id, api.EffectChanged, time.Duration(7+len(want))*time.Hour, 1))
		token.Changes = append(token.Changes, api.TokenChange{ID: id, State: standing})
		want[id] = standing
	}
	add("later", api.PermissionsCurrent)
	add("unmet", api.PermissionsStale)
	add("spreading", api.PermissionsUncertain)
	for i := range 5 {
		add(fmt.Sprint("met-", i), api.PermissionsCurrent)
	}
	status.Changes = append(status.Changes, aChange("another's", api.EffectRevoked, time.Hour, 1))
	story := explain.Of(explain.Times{}, status, token)
	if len(story.Changes) != len(want) {
		t.Errorf("%d changes, want %d", len(story.Changes), len(want))
	}
	for _, change := range story.Changes {
		if change.State != want[change.ID] {
			t.Errorf("%s: %s, want %s", change.ID, change.State, want[change.ID])
		}
	}
	if shown := (screen{Screen: term.Screen{Width: 80}}).explanation(story); !strings.Contains(shown,
		"There are 3 changes before these") {
		t.Errorf("got\n%s", shown)
	}
}

func TestPolicyChangesTable(t *testing.T) {
	t.Parallel()
	unsure := aChange("77aa0011", api.EffectChanged, time.Minute, 1)
	unsure.Identity, unsure.Resource, unsure.Unsure = "vision",
		"https://a-rather-long-name.of-some-department.example.net", true
	unsure.Note, unsure.RecordedOn = "a note", unsure.At
	untouched := aChange("00112233", api.EffectGranted, 30*time.Hour, 0)
	untouched.Touched = 0
	lost := aChange("ffee0011", api.EffectUnknown, time.Hour, 2)
	revoked := aChange("9b2e7c10", api.EffectRevoked, time.Hour, 0)
	unread := ofRecord(api.RecordUnread, "chown percept: x", true)
	got := screen{Screen: term.Screen{Width: 80}}.policyChanges(noon,
		[]api.PolicyChange{unsure, dated(5*time.Minute, time.Minute), revoked, lost, unread, untouched})
	want := `ID        WHEN          EFFECT   IDENTITY  RESOURCE            WAITING   ENDS IN
77aa0011  11:59         changed  vision    https://…ample.net  1 of 2    2d 2h
  a note
  the time is not sure: this device's clock was not known to be right
d         11:55         changed  all       all                 2 of 2    2d 2h
  it counts as of its note, at 11:59: this device's clock was not known to be
  right
9b2e7c10  11:00         revoked  all       all                 0 of 2    2d 2h
ffee0011  11:00         unknown  all       all                 2 of 2    2d 2h
  the record could not be read: what changed before is not known
unread    11:00         unknown  all       all                 2 of 2    2d 2h
  tokens from before are withheld ([tokens] lost_record); to end that: chown
  percept: x
00112233  Nov 22 06:00  granted  all       all                 no token  2d 2h
`
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// TestPolicyChangesOnNarrowScreens tells in words what has no room in columns, and of what a change stands for that was
// joined.
func TestPolicyChangesOnNarrowScreens(t *testing.T) {
	t.Parallel()
	joined := aChange("77aa0011", api.EffectRevoked, 20*time.Hour, 1)
	joined.Identity, joined.Resource, joined.Joined, joined.Note = "vision", "https://vault.azure.net", 3, "a note"
	other := aChange("9b2e7c10", api.EffectGranted, time.Hour, 0)
	other.Touched, other.Joined, other.Unsure, other.AsOfRecording = 0, 511, true, true
	changes := []api.PolicyChange{joined, other}
	for width, want := range map[int]string{
		80: `ID        WHEN          EFFECT   IDENTITY  RESOURCE            WAITING   ENDS IN
77aa0011  Nov 22 16:00  revoked  vision    https://…azure.net  1 of 2    2d 2h
  a note
  it stands for 4 changes, which were joined since the record was full: they
  end, and are withdrawn, as one
9b2e7c10  11:00         granted  all       all                 no token  2d 2h
  it stands for 512 changes, which were joined since the record was full: they
  end, and are withdrawn, as one
  it counts as of its note, at 12:00: this device's clock was not known to be
  right
`,
		60: `ID        WHEN          EFFECT   IDENTITY  RESOURCE
77aa0011  Nov 22 16:00  revoked  vision    https://…zure.net
  waiting: 1 of 2, ends in: 2d 2h
  a note
  it stands for 4 changes, which were joined since the
  record was full: they end, and are withdrawn, as one
9b2e7c10  11:00         granted  all       all
  waiting: no token, ends in: 2d 2h
  it stands for 512 changes, which were joined since the
  record was full: they end, and are withdrawn, as one
  it counts as of its note, at 12:00: this device's clock
  was not known to be right
`,
	} {
		if got := (screen{Screen: term.Screen{Width: width}}).policyChanges(noon, changes); got != want {
			t.Errorf("got\n%swant\n%s", got, want)
		}
	}
	for width := term.LeastWidth; width < 120; width++ {
		checkWidth(t, screen{Screen: term.Screen{Width: width}}.policyChanges(noon, changes), width, false)
	}
	if told := (screen{Screen: term.Screen{Width: 80}}).recorded(noon, joined, api.Status{},
		true); !strings.Contains(told, "it stands for 4 changes") {
		t.Errorf("got\n%s", told)
	}
}

// TestManyTouchedTokens shows a few of many, those that are held back, and those that are current already.
func TestManyTouchedTokens(t *testing.T) {
	t.Parallel()
	status := api.Status{Now: noon}
	change := aChange("1f0c2a34", api.EffectRevoked, time.Minute, 24)
	change.Touched = 25
	for i := range 25 {
		token := aToken(fmt.Sprintf("identity-%d", i), vault, 9*time.Hour)
		if i > 0 {
			token = lacking(token, api.PermissionsStale, time.Minute)
			token.HeldUntil = after(9 * time.Minute)
			token.Life = 28 * 3600
		}
		status.Tokens = append(status.Tokens, judged(token, change))
	}
	shown := screen{Screen: term.Screen{Width: 80}}.recorded(noon, change, status, true)
	checkWidth(t, shown, 80, false)
	flat := strings.Join(strings.Fields(shown), " ")
	for _, want := range []string{
		"24 of 25", "identity-0 " + vault + " current now now", "and 5 more: perceptctl status",
		"more than 31 hours only if", "perceptd asks for none before 12:09 (in 9m):",
	} {
		if !strings.Contains(flat, want) {
			t.Errorf("%q is not in\n%s", want, shown)
		}
	}
}

// FuzzExplain checks that nothing from outside steers the terminal or breaks the layout.
func FuzzExplain(f *testing.F) {
	f.Add("vision", vault, "a note", "an error", 80)
	f.Add("\x1b[2J", "\xff", "one\ntwo", strings.Repeat("x", 200), 40)
	f.Fuzz(func(t *testing.T, identity, resource, note, failure string, width int) {
		id := strings.Join(strings.Fields(note), "") // an ID is a word, which is not cut
		change := aChange(id, api.EffectRevoked, time.Minute, 2)
		token := judged(lacking(aToken(identity, resource, time.Hour), api.PermissionsStale, time.Minute), change)
		token.LastError, token.SHA256 = failure, note
		token.Claims = &api.TokenClaims{Groups: []string{note}}
		change.Note = note
		status := api.Status{Now: noon, Changes: []api.PolicyChange{change}}
		s := screen{Screen: term.Screen{Width: max(term.DefaultWidth, min(width, 300))}}
		shown := s.explanation(explain.Of(s.times(), status, token)) + s.policyChanges(noon, status.Changes) +
			s.recorded(noon,
				change, status, true)
		checkWidth(t, shown, s.Width, false)
		if !utf8.ValidString(shown) {
			t.Error("not UTF-8")
		}
	})
}

// Who asks for a resource in another spelling than it is held in is told that one, also where another identity holds it
// as asked.
func TestOtherSpellingIsNamed(t *testing.T) {
	t.Parallel()
	status := api.Status{
		Identities: []api.IdentityStatus{{Name: "device"}, {Name: "speech"}},
		Tokens: []api.TokenStatus{
			{Identity: "device", Resource: "https://storage.azure.com/"},
			{Identity: "speech", Resource: "https://storage.azure.com"},
		},
	}
	_, err := chooseTokens(status, "https://storage.azure.com", "device")
	hinted, known := errors.AsType[*hintedError](err)
	if !known || hinted.hint != "it is cached for: https://storage.azure.com/" {
		t.Errorf("%v: %+v", err, hinted)
	}
	if chosen, err := chooseTokens(status, "https://storage.azure.com", ""); err != nil || len(chosen) != 1 ||
		chosen[0].Identity != "speech" {
		t.Errorf("%v %+v", err, chosen)
	}
}

// What the record withholds is not told as a revocation, unless there is one as well.
func TestDoctorTellsRecordFromRevocation(t *testing.T) {
	t.Parallel()
	token := lacking(aToken("vision", vault, 9*time.Hour), api.PermissionsStale, time.Hour)
	token.Permissions.Withheld = true
	lost, revoked := ofRecord(api.RecordLost, "mend", true), aChange("r", api.EffectRevoked, time.Hour, 2)
	for want, changes := range map[string][]api.PolicyChange{
		"it is withheld ([tokens] lost_record): the record of policy changes is lost": {lost},
		"it is withheld, as a revocation ordered":                                     {lost, revoked},
	} {
		found := examineTokens(api.Status{Now: noon, Tokens: []api.TokenStatus{judged(token, changes...)},
			Changes: changes})
		if len(found) != 1 || found[0].Is != want {
			t.Errorf("%+v, want %q", found, want)
		}
	}
}

// A token that is not there, though no fetch of its key has failed, is told of with a reason: its call was turned away.
func TestMissingTokenHasAReason(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		failures        int
		failed          string
		is, explanation string
	}{
		{0, "", "there is none yet", "has not been asked for one since"},
		{0, "unreachable: connection refused", "unreachable: connection refused", "has not been asked for one since"},
		{3, "refused: no", "refused: no", "did not give one"},
	} {
		token := api.TokenStatus{State: api.StateMissing, Failures: row.failures, LastError: row.failed}
		all := examineTokens(api.Status{Tokens: []api.TokenStatus{token}})
		if len(all) != 1 || all[0].Is != row.is {
			t.Errorf("%+v: %+v", row, all)
		}
		got := explain.Of(explain.Times{}, api.Status{}, token).Summary
		if !strings.Contains(got, row.explanation) {
			t.Errorf("%+v: %s", row, got)
		}
	}
}

// Where some callers are denied the story does not say that modules get the token, nor that there is nothing to do;
// what cannot be recalled is said once.
func TestExplainWhereSomeAreDenied(t *testing.T) {
	t.Parallel()
	const resource = "https://vault.azure.net"
	for _, row := range []struct {
		rule api.DenyRule
		says string
	}{
		{api.DenyRule{ID: "1f0c2a34", DenyTarget: api.DenyTarget{Module: "vision"}, Origin: api.DenyLocal},
			"When the denial is over: perceptctl deny lift 1f0c2a34."},
		{api.DenyRule{ID: "9b2e7c10", DenyTarget: api.DenyTarget{Module: "vision"}, Origin: api.DenyTwin},
			"What IoT Hub denies is lifted in IoT Hub"},
	} {
		for _, state := range []api.PermissionState{api.PermissionsCurrent, api.PermissionsStale} {
			token := api.TokenStatus{Identity: "vision", Resource: resource, ExpiresIn: 3600,
				Permissions: api.Permissions{State: state}}
			story := explain.Of(explain.Times{}, api.Status{Now: noon, Tokens: []api.TokenStatus{token},
				Deny: &api.DenyStatus{Rules: []api.DenyRule{row.rule}}}, token)
			texts := make(map[string]string)
			for _, section := range story.Sections {
				texts[section.About] += section.Text + "\n"
			}
			modules, toDo := texts["modules"], texts["to do"]
			if !strings.HasPrefix(modules, "Modules that no deny rule names get the token") ||
				strings.Count(modules, explain.NotRecalled) != 1 {
				t.Errorf("%s, %s: modules: %s", row.rule.ID, state, modules)
			}
			if !strings.HasPrefix(toDo, row.says) || strings.Contains(toDo, "Nothing.") {
				t.Errorf("%s, %s: to do: %s", row.rule.ID, state, toDo)
			}
		}
	}
}

// A rule of the hub's is of the identity that set it, which may be a module's, or one that the device had before.
func TestSetBy(t *testing.T) {
	t.Parallel()
	for want, rule := range map[string]api.DenyRule{
		"IoT Hub, version 4 of the twin of h/percept-8/percept": {Origin: api.DenyTwin, Twin: 4,
			By: "h/percept-8/percept"},
		"IoT Hub, the twin of h/percept-8": {Origin: api.DenyTwin, By: "h/percept-8"},
		"IoT Hub, direct method to h/percept-8": {
			Origin: api.DenyMethod, By: "iothub h/percept-8 method percept.deny",
		},
		"IoT Hub, twin version 4": {Origin: api.DenyTwin, Twin: 4},
		"IoT Hub, direct method":  {Origin: api.DenyMethod},
		"uid 0 (pid 7)":           {Origin: api.DenyLocal, By: "uid 0 (pid 7)"},
		"this device":             {Origin: api.DenyLocal},
	} {
		if got := explain.SetBy(rule); got != want {
			t.Errorf("%+v: %s", rule, got)
		}
	}
}
