package tokencache

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Bounds of what a snapshot and a record may hold: those of what a back end may answer, of what people may enter, and
// of what a cache remembers. Lengths are in bytes.
const (
	MaxID       = 64  // of a policy change, a lineage, a boot and a source
	MaxResource = 512 // Entra's own limit for an App ID URI is 255
	MaxNote     = 256

	maxSelectorID = 1024
	maxText       = 64 << 10 // of a token
	maxClaim      = 1024
	maxListed     = 2048 // of one claim
	maxDetail     = 512  // of what is kept of a failure's words

	maxCount      = math.MaxInt32
	maxGeneration = 1 << 62 // which no record comes to by itself
	maxUptime     = 30 * 365 * 24 * time.Hour

	// maxSpan bounds boot times, either way: the difference of two is still a duration.
	maxSpan = time.Duration(math.MaxInt64/2 + 1)
)

// Validate returns the first thing in m that no cache of ours has written: m is not to be read, and not to be kept.
func (m *Snapshot) Validate() error {
	switch {
	case len(m.Keys) > MaxKeys:
		return fmt.Errorf("%d keys are more than %d", len(m.Keys), MaxKeys)
	case !printable(m.Source, MaxID):
		return errors.New("its source is none")
	case !printable(m.BootID, MaxID):
		return errors.New("its boot_id is none")
	case m.Boot < 0 || m.Boot > maxUptime:
		return errors.New("its boot_ns is no uptime")
	case !onTimes(m.On, m.CountedOn):
		return errors.New("its on_ns or counted_on_ns is out of range")
	case !Plausible(m.Wall):
		return errors.New("its wall is outside 1970 to 2200")
	case m.Paused < 0 || m.Paused > maxSpan:
		return errors.New("its pause is none")
	}
	if err := m.Failing.Validate(); err != nil {
		return err
	}
	if err := validateRollovers(m.Rollovers, sourceHistory); err != nil {
		return err
	}
	if m.OnRecord < 0 || m.OnRecord > MaxChanges {
		return errors.New("its on_record is out of range")
	}
	if err := m.Record.validateChanges(); err != nil {
		return err
	}
	if err := m.validatePrincipals(); err != nil {
		return err
	}
	there := make(map[Key]bool)
	for i := range m.Keys {
		r := &m.Keys[i]
		if err := r.Validate(); err != nil {
			return fmt.Errorf("key %d: %w", i+1, err)
		}
		if there[r.Key] {
			return fmt.Errorf("key %d: it is there twice", i+1)
		}
		there[r.Key] = true
	}
	return nil
}

func (m *Snapshot) validatePrincipals() error {
	if len(m.Principals) > MaxKeys || len(m.Tombstones) > maxTombstones {
		return fmt.Errorf("%d selectors or %d bygones are more than %d",
			len(m.Principals), len(m.Tombstones), maxTombstones)
	}
	there := make(map[Selector]bool)
	for i := range m.Principals {
		p := &m.Principals[i]
		if err := p.Validate(); err != nil {
			return fmt.Errorf("principals %d: %w", i+1, err)
		}
		if there[p.Selector] {
			return fmt.Errorf("principals %d: its selector is there twice", i+1)
		}
		there[p.Selector] = true
	}
	for i := range m.Tombstones {
		if err := m.Tombstones[i].Validate(); err != nil {
			return fmt.Errorf("bygone %d: %w", i+1, err)
		}
	}
	return nil
}

// Validate is as that of Snapshot.
func (r *SnapshotEntry) Validate() error {
	switch {
	case !lives(r.Given, r.Life, r.Nominal):
		return errors.New("its token's life is none")
	case !spans(r.Deadline, r.IssuedAt, r.ReceivedBoot, r.Shown, r.Answered),
		!spans(time.Duration(or(0, r.Next)), time.Duration(or(0, r.Asked))):
		return errors.New("a boot time of it is out of range")
	case !onTimes(r.ReceivedOnTime) || !spans(r.IssuedFrom, r.IssuedTo):
		return errors.New("an on-time of it is out of range")
	case !Plausible(r.ReceivedWall, r.Earliest, r.Latest):
		return errors.New("its times are outside 1970 to 2200")
	case !counts(r.Tries):
		return errors.New("its tries are out of range")
	}
	if len(r.Withheld) > MaxChanges {
		return fmt.Errorf("%d changes withhold its token", len(r.Withheld))
	}
	for _, id := range r.Withheld {
		if id == "" || !printable(id, MaxID) {
			return errors.New("a change that withholds its token has no id")
		}
	}
	if err := r.Key.validate(); err != nil {
		return err
	}
	for _, c := range []*Claims{&r.Claims, r.Before} {
		if err := c.validate(); err != nil {
			return err
		}
	}
	if err := r.Token.validate(); err != nil {
		return err
	}
	if err := r.Failing.Validate(); err != nil {
		return err
	}
	if err := r.Claim.Validate(); err != nil {
		return err
	}
	return validateRollovers(r.Rollovers, keyHistory)
}

func (k Key) validate() error {
	if !k.Selector.valid() {
		return errors.New("its selector is none")
	}
	if !printable(k.Resource, MaxResource) {
		return errors.New("its resource is none")
	}
	return nil
}

// valid reports whether s selects an identity, if there is one like it.
func (s Selector) valid() bool {
	switch s.Kind {
	case SystemAssigned:
		return s.ID == ""
	case ClientID, ObjectID, ResourceID:
		return s.ID != "" && printable(s.ID, maxSelectorID)
	}
	return false
}

// validate allows there to be no token.
func (t *Token) validate() error {
	switch text := t.Text.Reveal(); {
	case t.Text.IsZero():
		return nil
	case len(text) > maxText || strings.ContainsFunc(text, func(c rune) bool { return c <= ' ' || c >= 0x7f }):
		return errors.New("its token is none")
	case !Plausible(t.ExpiresOn, t.NotBefore):
		return errors.New("its token's times are outside 1970 to 2200")
	}
	return t.Claims.validate()
}

// validate bounds the length of a claim only: it is as the issuer wrote it.
func (c *Claims) validate() error {
	if c == nil {
		return nil
	}
	if !Plausible(c.IssuedAt, c.NotBefore) {
		return errors.New("its claims' times are outside 1970 to 2200")
	}
	texts := []string{c.Issuer, c.Audience, c.ClientID, c.ObjectID, c.TenantID}
	for _, list := range [][]string{c.Groups, c.Roles, c.WIDs, c.Omitted} {
		if len(list) > maxListed {
			return fmt.Errorf("a claim of it lists more than %d", maxListed)
		}
		texts = append(texts, list...)
	}
	return validateClaims(texts...)
}

func validateClaims(texts ...string) error {
	for _, text := range texts {
		if len(text) > maxClaim || !utf8.ValidString(text) {
			return errors.New("a claim of it is too long, or no text")
		}
	}
	return nil
}

func validateRollovers(all []Rollover, most int) error {
	if len(all) > most {
		return fmt.Errorf("%d rollovers are more than %d", len(all), most)
	}
	for i := range all {
		if err := all[i].validate(); err != nil {
			return fmt.Errorf("rollover %d: %w", i+1, err)
		}
	}
	return nil
}

// validate allows a share to be somewhat outside a life: of a short one, a call took a part.
func (r *Rollover) validate() error {
	for _, share := range []float64{r.After, r.By, r.Watched} {
		if !(share >= -1 && share <= 2) {
			return errors.New("a share of it is out of range")
		}
	}
	if r.After >= r.By {
		return errors.New("it ends before it begins")
	}
	return r.Key.validate()
}

// Validate is as that of Snapshot. There may be no failure.
func (f *BackOff) Validate() error {
	if f == nil {
		return nil
	}
	_, kind := meaning(kindWords, f.Kind)
	_, extent := meaning(extentWords, f.Extent)
	switch {
	case !kind || !extent || !printable(f.Detail, maxDetail):
		return errors.New("a failure of it is none")
	case f.Failures < 1 || !counts(f.Failures, f.Waits, f.Asks):
		return errors.New("a failure's counts are out of range")
	case !spans(f.Until, f.Callers):
		return errors.New("a failure's boot times are out of range")
	}
	return nil
}

// Validate is as that of Snapshot. There may be no claim.
func (c *Claim) Validate() error {
	switch {
	case c == nil:
		return nil
	case c.By.IsZero():
		return errors.New("a claim to be the current principal is nobody's")
	case !spans(c.From):
		return errors.New("a boot time of it is out of range")
	}
	return c.By.validate()
}

// Validate is as that of Snapshot.
func (p *Principals) Validate() error {
	switch {
	case !p.Selector.valid():
		return errors.New("its selector is none")
	case len(p.Former) > maxFormer:
		return fmt.Errorf("%d former principals are more than %d", len(p.Former), maxFormer)
	case !spans(time.Duration(or(0, p.Since)), time.Duration(or(0, p.Shown)), time.Duration(or(0, p.Told))):
		return errors.New("a boot time of it is out of range")
	case !counts(p.Untold) || !printable(p.By, MaxResource):
		return errors.New("what is open of its switches is out of range")
	}
	for _, who := range append([]Principal{p.Current}, p.Former...) {
		if err := who.validate(); err != nil {
			return err
		}
	}
	return nil
}

func (p Principal) validate() error { return validateClaims(p.ObjectID, p.TenantID, p.ClientID) }

// Validate is as that of Snapshot.
func (t *Tombstone) Validate() error {
	switch sum, err := hex.DecodeString(t.SHA256); {
	case err != nil || len(sum) != 32:
		return errors.New("its digest is none")
	case !spans(t.ReceivedBoot, t.Given, time.Duration(or(0, t.Deadline))) || t.Given < 0:
		return errors.New("a boot time of it is out of range")
	case !onTimes(t.ReceivedOnTime, t.Came) || !spans(t.IssuedFrom, t.IssuedTo):
		return errors.New("an on-time of it is out of range")
	case !Plausible(t.ReceivedWall, t.ExpiresOn):
		return errors.New("its times are outside 1970 to 2200")
	}
	return nil
}

// Validate is as that of Snapshot.
func (r *Record) Validate() error {
	switch {
	case !printable(r.BootID, MaxID):
		return errors.New("its boot_id is none")
	case r.Boot < 0 || r.Boot > maxUptime:
		return errors.New("its boot_ns is no uptime")
	case !onTimes(r.On):
		return errors.New("its on_ns is out of range")
	}
	return r.validateChanges()
}

// validateChanges looks at all of r but when it was taken.
func (r *Record) validateChanges() error {
	if !printable(r.Lineage, MaxID) {
		return errors.New("its lineage is none")
	}
	if r.Generation > maxGeneration {
		return errors.New("its generation is out of range")
	}
	if len(r.Origins) > MaxOrigins {
		return errors.New("its origins are too many")
	}
	for _, o := range r.Origins {
		if o.Lineage == "" || !printable(o.Lineage, MaxID) || o.Generation > maxGeneration {
			return errors.New("one of its origins is none")
		}
	}
	if n := len(r.Changes); n > MaxChanges {
		return fmt.Errorf("%d policy changes are more than %d", n, MaxChanges)
	}
	there := make(map[string]bool)
	for i := range r.Changes {
		p := &r.Changes[i]
		if err := p.Validate(); err != nil {
			return fmt.Errorf("policy change %d: %w", i+1, err)
		}
		if there[p.ID] {
			return fmt.Errorf("policy change %d: its id is that of another", i+1)
		}
		there[p.ID] = true
	}
	return nil
}

// Validate is as that of Snapshot.
func (p *PolicyChange) Validate() error {
	switch {
	case p.ID == "" || !printable(p.ID, MaxID):
		return errors.New("its id is none")
	case !printable(p.Resource, MaxResource):
		return errors.New("its resource is none")
	case !printable(p.Note, MaxNote):
		return errors.New("its note is too long, or cannot be printed")
	case !slices.Contains([]Effect{Changed, Granted, Revoked, Unknown}, p.Effect):
		return errors.New("its effect is none that is known")
	case p.At.IsZero() || p.RecordedAt.IsZero() || !Plausible(p.At, p.RecordedAt):
		return errors.New("its times are outside 1970 to 2200")
	case !counts(p.Joined):
		return errors.New("its joined is out of range")
	case !spans(p.Moment, p.By) || p.By < p.Moment:
		return errors.New("its moment_ns or by_ns is out of range")
	case !Plausible(p.Issuer.Earliest, p.Issuer.Latest):
		return errors.New("its times by the issuer are outside 1970 to 2200")
	case !Plausible(p.NotLater):
		return errors.New("its not_later is outside 1970 to 2200")
	case !p.AllIdentities && !p.Selector.valid():
		return errors.New("its selector is none")
	}
	return nil
}

// Sanitized returns m as it is kept: without what Validate refuses in it, as far as the rest is of use without that.
// So one strange token, or one strange time from a back end, does not cost the others. Times are in UTC.
func (m Snapshot) Sanitized() Snapshot {
	m.Wall = m.Wall.UTC()
	m.Failing = m.Failing.sanitized()
	m.Rollovers = sanitizedRollovers(m.Rollovers, sourceHistory)
	m.Keys = sound(m.Keys, SnapshotEntry.sanitized, (*SnapshotEntry).Validate)
	m.Principals = sound(m.Principals, Principals.sanitized, (*Principals).Validate)
	m.Tombstones = sound(m.Tombstones, Tombstone.sanitized, (*Tombstone).Validate)
	m.Record = m.Record.Sanitized()
	if m.Record.validateChanges() == nil {
		return m
	}
	// They are on record all the same, and the tokens and their marks are worth keeping.
	if m.Record.Changes = nil; m.Record.validateChanges() != nil {
		m.Record = Record{Instant: m.Record.Instant}
	}
	return m
}

// sound returns those of all that are valid when they are sanitized; nil: none.
func sound[T any](all []T, sanitized func(T) T, validate func(*T) error) (kept []T) {
	for _, t := range all {
		if t = sanitized(t); validate(&t) == nil {
			kept = append(kept, t)
		}
	}
	return kept
}

func (r SnapshotEntry) sanitized() SnapshotEntry {
	r.ReceivedWall, r.Earliest, r.Latest = r.ReceivedWall.UTC(), r.Earliest.UTC(), r.Latest.UTC()
	r.Token.ExpiresOn, r.Token.NotBefore = r.Token.ExpiresOn.UTC(), r.Token.NotBefore.UTC()
	r.Token.Claims, r.Claims = r.Token.Claims.sanitized(), r.Claims.sanitized()
	if r.Before != nil {
		r.Before = new(r.Before.sanitized())
	}
	r.Rollovers = sanitizedRollovers(r.Rollovers, keyHistory)
	r.Failing = r.Failing.sanitized()
	if r.Claim.Validate() != nil {
		r.Claim = nil // it is made anew, which takes longer
	}
	return r
}

func (c Claims) sanitized() Claims {
	c.IssuedAt, c.NotBefore = c.IssuedAt.UTC(), c.NotBefore.UTC()
	for _, list := range []*[]string{&c.Groups, &c.Roles, &c.WIDs, &c.Omitted} {
		if len(*list) == 0 {
			*list = nil // written the same, so that both compare as the same
		}
	}
	return c
}

// sanitizedRollovers returns the latest of all that are sound.
func sanitizedRollovers(all []Rollover, most int) []Rollover {
	all = sound(all, func(r Rollover) Rollover { return r }, (*Rollover).validate)
	return all[max(0, len(all)-most):]
}

// sanitized returns nil also for failures that are none: what they slow down is asked for a little sooner.
func (f *BackOff) sanitized() *BackOff {
	if f == nil {
		return nil
	}
	of := *f
	of.Detail = printed(f.Detail, maxDetail)
	if of.Validate() != nil {
		return nil
	}
	return &of
}

func (p Principals) sanitized() Principals {
	p.Untold = min(p.Untold, maxCount)
	return p
}

func (t Tombstone) sanitized() Tombstone {
	t.ReceivedWall, t.ExpiresOn = unlessStrange(t.ReceivedWall), unlessStrange(t.ExpiresOn)
	return t
}

// Sanitized returns r as it is kept: without the strange times of a back end, and with all of its changes. Validate
// refuses what else is wrong with it.
func (r Record) Sanitized() Record {
	r.Changes = slices.Clone(r.Changes)
	for i := range r.Changes {
		p := &r.Changes[i]
		p.At, p.RecordedAt, p.NotLater = p.At.UTC(), p.RecordedAt.UTC(), unlessStrange(p.NotLater)
		p.Issuer = Window{Earliest: unlessStrange(p.Issuer.Earliest), Latest: unlessStrange(p.Issuer.Latest)}
	}
	return r
}

// unlessStrange returns t, or that it is not known where it is a time that nobody means.
func unlessStrange(t time.Time) time.Time {
	if !Plausible(t) {
		return time.Time{}
	}
	return t.UTC()
}

// printable reports whether text can be printed and is no longer than most bytes.
func printable(text string, most int) bool {
	strange := func(c rune) bool { return !unicode.IsPrint(c) }
	return len(text) <= most && utf8.ValidString(text) && !strings.ContainsFunc(text, strange)
}

// printed is the beginning of text, without what cannot be printed.
func printed(text string, most int) string {
	blanked := strings.Map(func(c rune) rune {
		if !unicode.IsPrint(c) || c == unicode.ReplacementChar {
			return ' '
		}
		return c
	}, text)
	return strings.ToValidUTF8(blanked[:min(len(blanked), most)], "")
}

func counts(numbers ...int) bool {
	return !slices.ContainsFunc(numbers, func(n int) bool { return n < 0 || n > maxCount })
}

func lives(all ...time.Duration) bool {
	return !slices.ContainsFunc(all, func(d time.Duration) bool { return d < 0 || d > maxSpan })
}

func spans(all ...time.Duration) bool {
	return !slices.ContainsFunc(all, func(d time.Duration) bool { return d < -maxSpan || d > maxSpan })
}

// onTimes reports whether each can be an on-time, or none.
func onTimes(all ...time.Duration) bool { return lives(all...) }
