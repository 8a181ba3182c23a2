package iothub

import (
	"cmp"
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"perceptd/agent/api"
)

// reportSchema is the version of the reported properties' form.
const reportSchema = 1

// The bounds of what is reported, in bytes. IoT Hub takes 32 KB of reported properties, which others of the device may
// use, too, and 4 KB in a value.
const (
	maxReport   = 24 << 10
	minReport   = 2 << 10
	maxReason   = 1 << 10
	maxResource = 512
	maxText     = 256
	maxIdle     = 16 // notes beside an acknowledgement
)

// report is what perceptd reports, as "percept" in the reported properties. Queries compare scalars alone, so that what
// matters in lists is counted in Summary.
type report struct {
	Schema    int            `json:"schema"`
	Version   string         `json:"version"`
	Simulated bool           `json:"simulated"`
	Source    reportedSource `json:"source"`
	Clock     reportedClock  `json:"clock"`
	Config    reportedConfig `json:"config"`
	Summary   reportSummary  `json:"summary"`
	Tokens    []tokenReport  `json:"tokens"`
	Deny      reportedDeny   `json:"deny"`
	Desired   *desiredAck    `json:"desired,omitempty"` // absent: no desired properties were read yet
	Requests  *requestsCount `json:"requests,omitempty"`
}

type reportedSource struct {
	Kind     string `json:"kind"`
	Endpoint string `json:"endpoint"`
}

// reportedClock is api.ClockStatus, with a skew that changes only when it differs by much.
type reportedClock struct {
	Known bool   `json:"known"`
	By    string `json:"by,omitempty"`
	Skew  int64  `json:"skew"` // seconds ahead of the back end's; 0: none, or not known
}

type reportedConfig struct {
	SHA256 string `json:"sha256"`
	Error  string `json:"error,omitempty"` // why the last reload changed nothing
}

// reportSummary counts. All are scalars, which queries compare.
type reportSummary struct {
	Tokens    int  `json:"tokens"`    // valid ones held
	Stale     int  `json:"stale"`     // that were issued before a policy change
	Uncertain int  `json:"uncertain"` // of which that is not known
	Withheld  int  `json:"withheld"`  // that a revocation withholds
	Errors    int  `json:"errors"`    // keys whose token cannot be fetched or refreshed
	Denied    int  `json:"denied"`    // deny rules in force
	Lost      bool `json:"lost"`      // the record of deny rules is lost, and every request is refused
	Missing   bool `json:"missing"`   // deny rules of others than the twin are gone with a lost record
	Aside     bool `json:"setAside"`  // root has set aside what the hub sets
	Trouble   int  `json:"trouble"`   // what needs a person on the device, or its configuration
	LeftOut   int  `json:"leftOut"`   // tokens that Tokens has no room for
}

// tokenReport is one key. Times are by the device's clock, to the minute.
type tokenReport struct {
	Identity    string              `json:"identity"`
	Resource    string              `json:"resource"`
	State       api.TokenState      `json:"state"`
	Issued      string              `json:"issued,omitempty"`
	Expires     string              `json:"expires,omitempty"`
	Permissions api.PermissionState `json:"permissions,omitempty"`
	Withheld    bool                `json:"withheld,omitempty"`
	CurrentBy   string              `json:"currentBy,omitempty"` // at the latest
	Rollover    string              `json:"rollover,omitempty"`  // when a newer token is expected
	Error       string              `json:"error,omitempty"`
	ErrorSince  string              `json:"errorSince,omitempty"`
}

// isTrouble orders what is left out last.
func (t *tokenReport) isTrouble() bool {
	return t.Error != "" || t.Withheld || t.Permissions != "" && t.Permissions != api.PermissionsCurrent
}

type reportedDeny struct {
	Rules      []ruleReport `json:"rules"`
	LeftOut    int          `json:"leftOut"`
	Lost       string       `json:"lost,omitempty"`
	Missing    string       `json:"missing,omitempty"` // which rules are gone since a twin took a lost record's place
	SetAsideOn string       `json:"setAsideOn,omitempty"`
}

type ruleReport struct {
	ID string `json:"id"`
	api.DenyTarget
	Origin api.DenyOrigin `json:"origin"`
	Since  string         `json:"since"`
	Idle   bool           `json:"idle,omitempty"` // what it names is not configured here
}

// desiredAck is what became of a version of the desired properties.
type desiredAck struct {
	Version int64  `json:"version"`
	Status  string `json:"status"`
	Reason  string `json:"reason,omitempty"` // with "refused"
	Denies  int    `json:"denies,omitempty"` // with "refused": entries of its deny that are in force all the same
	NoRoom  int    `json:"noRoom,omitempty"` // entries of deny that have no room, and deny nothing
	// NotKept says that it is in force, and not on this device's disk: a stop or a reboot loses it until then.
	NotKept bool     `json:"notKept,omitempty"`
	Idle    []string `json:"idle,omitempty"` // what of it concerns nothing that is configured here
}

// What became of desired properties.
const (
	ackApplied  = "applied"
	ackRefused  = "refused"
	ackSetAside = "set aside" // root on the device has set aside what the hub sets
)

// requestsCount goes along with what changes, and is no change of its own.
type requestsCount struct {
	api.RequestCounts
	AsOf string `json:"asOf"`
}

// describe returns what is reported of s, shorter than limit bytes as JSON. before is what was reported: times that
// differ by little, and errors that differ in passing things alone, stay as they were, so that no message says what is
// no news.
func describe(s *api.Status, ack *desiredAck, before *report, limit int) *report {
	r := &report{
		Schema: reportSchema, Version: clean(s.Version, maxText), Simulated: s.Simulated,
		Source:  reportedSource{Kind: clean(s.Source.Kind, maxText), Endpoint: clean(s.Source.Endpoint, maxText)},
		Clock:   reportedClock{Known: s.Clock.Known, By: clean(s.Clock.By, maxText), Skew: skewOf(s, before)},
		Config:  reportedConfig{SHA256: s.Config.SHA256, Error: clean(s.Config.Error, maxReason)},
		Summary: reportSummary{Trouble: len(s.Trouble)},
		Tokens:  []tokenReport{}, Deny: describeDeny(s.Deny), Desired: ack.bounded(),
	}
	if s.Deny != nil {
		r.Summary.Denied, r.Summary.Lost = len(s.Deny.InForce()), s.Deny.Lost != ""
		r.Summary.Missing = s.Deny.AreMissing()
		if r.Summary.Aside = !s.Deny.HubSetAsideOn.IsZero(); r.Summary.Aside && r.Desired != nil {
			r.Desired.Status = ackSetAside
		}
	}
	known := make(map[[2]string]*tokenReport)
	if before != nil {
		for i, t := range before.Tokens {
			known[[2]string{t.Identity, t.Resource}] = &before.Tokens[i]
		}
	}
	for i := range s.Tokens {
		t := describeToken(&s.Tokens[i], s.Now, known)
		r.Summary.count(&t, s.Tokens[i].ExpiresIn > 0)
		r.Tokens = append(r.Tokens, t)
	}
	r.shorten(limit)
	return r
}

func (s *reportSummary) count(t *tokenReport, valid bool) {
	if valid {
		s.Tokens++
	}
	switch t.Permissions {
	case api.PermissionsStale:
		s.Stale++
	case api.PermissionsUncertain:
		s.Uncertain++
	}
	if t.Withheld {
		s.Withheld++
	}
	if t.Error != "" {
		s.Errors++
	}
}

// skewStep is by how many seconds a skew differs at least to be news.
const skewStep = 10

func skewOf(s *api.Status, before *report) int64 {
	var skew int64
	if s.Clock.Skew != nil {
		skew = *s.Clock.Skew
	}
	if before != nil && max(skew-before.Clock.Skew, before.Clock.Skew-skew) < skewStep {
		return before.Clock.Skew
	}
	return skew
}

// Trouble that is worth a message: a first failed refresh of a token with much life left is not.
const (
	failuresReported = 2
	shortLife        = int64(time.Hour / time.Second)
)

func describeToken(t *api.TokenStatus, now time.Time, known map[[2]string]*tokenReport) tokenReport {
	r := tokenReport{
		Identity: clean(t.Identity, maxText), Resource: clean(t.Resource, maxResource), State: t.State,
	}
	before := known[[2]string{r.Identity, r.Resource}]
	if before == nil {
		before = &tokenReport{}
	}
	failing := t.LastOutcome == api.OutcomeFailed &&
		(t.ExpiresIn == 0 || t.Failures > failuresReported || t.ExpiresIn < shortLife)
	switch {
	case failing:
		r.Error = steadyText(clean(t.LastError, maxText), before.Error)
		r.ErrorSince = cmp.Or(before.ErrorSince, minute(now))
	case t.State == api.StateRefresh || t.State == api.StateFailing:
		r.State = api.StateFresh
	}
	if t.ExpiresIn == 0 {
		return r
	}
	r.Issued = steadyTime(t.IssuedFrom, before.Issued)
	r.Expires = steadyTime(t.ExpiresOn, before.Expires)
	r.Permissions, r.Withheld = t.Permissions.State, t.Permissions.Withheld
	r.CurrentBy = steadyTime(t.Permissions.CurrentBy, before.CurrentBy)
	r.Rollover = steadyTime(t.Rollover.Expected, before.Rollover)
	return r
}

func describeDeny(s *api.DenyStatus) reportedDeny {
	d := reportedDeny{Rules: []ruleReport{}}
	if s == nil {
		return d
	}
	d.Lost, d.Missing = clean(s.Lost, maxReason), clean(s.Missing, maxReason)
	if !s.HubSetAsideOn.IsZero() {
		d.SetAsideOn = minute(s.HubSetAsideOn)
	}
	for _, rule := range s.Rules {
		target := rule.DenyTarget
		for _, text := range []*string{
			&target.Module, &target.Unit, &target.User, &target.Identity, &target.Resource,
		} {
			*text = clean(*text, maxResource)
		}
		d.Rules = append(d.Rules, ruleReport{
			ID: clean(rule.ID, maxText), DenyTarget: target, Origin: rule.Origin, Since: minute(rule.Since),
			Idle: rule.Idle != "",
		})
	}
	return d
}

// bounded returns a copy of a as it can be reported.
func (a *desiredAck) bounded() *desiredAck {
	if a == nil {
		return nil
	}
	b := desiredAck{Version: a.Version, Status: a.Status, Reason: clean(a.Reason, maxReason), Denies: a.Denies,
		NoRoom: a.NoRoom, NotKept: a.NotKept}
	for _, note := range a.Idle[:min(len(a.Idle), maxIdle)] {
		b.Idle = append(b.Idle, clean(note, maxText))
	}
	return &b
}

// shorten leaves out tokens, those without trouble first, then deny rules and notes, until r has room within limit.
func (r *report) shorten(limit int) {
	size := sizeOf(r)
	order := make([]int, len(r.Tokens)) // what is left out first comes first
	for i := range order {
		order[i] = len(order) - 1 - i
	}
	slices.SortStableFunc(order, func(x, y int) int {
		return rank(r.Tokens[x].isTrouble()) - rank(r.Tokens[y].isTrouble())
	})
	left := make(map[int]bool)
	for _, i := range order {
		if size <= limit {
			break
		}
		size -= sizeOf(r.Tokens[i]) + 1
		left[i] = true
	}
	if len(left) > 0 {
		var kept []tokenReport
		for i, t := range r.Tokens {
			if !left[i] {
				kept = append(kept, t)
			}
		}
		r.Tokens, r.Summary.LeftOut = append([]tokenReport{}, kept...), len(left)
	}
	for size > limit && len(r.Deny.Rules) > 0 {
		last := len(r.Deny.Rules) - 1
		size -= sizeOf(r.Deny.Rules[last]) + 1
		r.Deny.Rules, r.Deny.LeftOut = r.Deny.Rules[:last], r.Deny.LeftOut+1
	}
	if size > limit && r.Desired != nil {
		r.Desired.Idle = nil
		r.Desired.Reason = clean(r.Desired.Reason, maxText)
	}
}

func rank(last bool) int {
	if last {
		return 1
	}
	return 0
}

// escapedSize returns how many bytes encoding/json makes of a rune that can be printed.
func escapedSize(r rune) int {
	switch r {
	case '"', '\\':
		return len(`\"`)
	case '<', '>', '&':
		return len(`\u003c`)
	}
	return utf8.RuneLen(r)
}

// clean returns text as a value of a twin: UTF-8 that can be printed, with at most so many bytes as JSON.
func clean(text string, most int) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == utf8.RuneError {
			return ' '
		}
		return r
	}, text)
	size, end := len(`"…"`), 0 // end is that of what has room with "…" behind it
	for at, r := range text {
		if size += escapedSize(r); size <= most {
			end = at + utf8.RuneLen(r)
		}
	}
	if size-len("…") <= most {
		return text
	}
	return text[:end] + "…"
}

// passing is what differs from one failure to the next of the same kind: IDs of requests, times, ports and counts. It
// is made when it is first used: a device without a hub does without.
var passing = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?i)\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b` +
		`|\b\d{4}-\d\d-\d\d[t ]\d\d:\d\d(?::\d\d)?(?:\.\d+)?z?` +
		`|\b(?:\d+(?:\.\d+)?(?:h|m|s|ms|µs)?)+\b`)
})

// httpStatus is what passing finds and is news: 403 is healed by others than 500.
var httpStatus = regexp.MustCompile(`^[1-5]\d\d$`)

// steadyText returns before where text differs from it in passing things alone.
func steadyText(text, before string) string {
	kind := func(text string) string {
		return passing().ReplaceAllStringFunc(text, func(found string) string {
			if httpStatus.MatchString(found) {
				return found
			}
			return "#"
		})
	}
	if before != "" && kind(text) == kind(before) {
		return before
	}
	return text
}

func minute(t time.Time) string { return t.UTC().Truncate(time.Minute).Format(time.RFC3339) }

// steadyTime returns before where t is within two minutes of it.
func steadyTime(t time.Time, before string) string {
	if t.IsZero() {
		return ""
	}
	if was, err := time.Parse(time.RFC3339, before); err == nil && t.Sub(was).Abs() <= 2*time.Minute {
		return before
	}
	return minute(t)
}

// readReport returns what an earlier report says; nil: it is of another form, or none.
func readReport(percept any) *report {
	text, err := json.Marshal(percept)
	if err != nil {
		return nil
	}
	var r report
	if err := json.Unmarshal(text, &r); err != nil || r.Schema != reportSchema {
		return nil
	}
	return &r
}
