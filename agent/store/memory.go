package store

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"reflect"
	"slices"
	"time"
	"unicode/utf8"

	"perceptd/tokencache"
)

// memoryVersion is the format of a cache's memory that is written. Those before it are read as well: in version 1 the copy of
// the record has neither lineage nor generation, and up to version 2 nothing has on-times, no claims name their issuer, there
// are neither principals nor bygones, and nothing tells of failures.
const memoryVersion = 3

// Bounds on what a cache's memory may hold: those of what a back end may answer, and of what a cache remembers.
const (
	maxMemory  = 16 << 20 // bytes of the document
	maxText    = 64 << 10
	maxClaim   = 1024
	maxListed  = 2048
	maxOwn     = 8 // rollovers of one key
	maxHistory = 512
	maxTries   = math.MaxInt32

	maxUptime = 30 * 365 * 24 * time.Hour
	maxSpan   = time.Duration(math.MaxInt64/2 + 1) // of boot times, either way; the difference of two is a duration still
)

// memory is a cache's memory as it is written. Times are absent where they are not known.
type memory struct {
	Version      int           `json:"version"`
	Source       string        `json:"source,omitempty"`
	BootID       string        `json:"boot_id"` // the boot that boot times (…_ns) are of
	Boot         time.Duration `json:"boot_ns"`
	On           time.Duration `json:"on_ns,omitempty"`
	Wall         time.Time     `json:"wall,omitzero"`
	Synchronised bool          `json:"synchronised"`
	Keys         []remembered  `json:"keys"`
	Rollovers    []seen        `json:"rollovers"`
	Principals   []principals  `json:"principals,omitempty"`
	Bygones      []bygone      `json:"bygones,omitempty"`
	Paused       time.Duration `json:"paused_ns,omitempty"`
	Failing      *failing      `json:"failing,omitempty"`
	Static       bool          `json:"static_counts,omitempty"`
	CountedOn    time.Duration `json:"counted_on_ns,omitempty"`

	// A copy of the record. One of generation 0 without changes is none.
	Lineage    string    `json:"lineage,omitempty"`
	Origins    []origin  `json:"origins,omitempty"`
	Generation uint64    `json:"generation,omitempty"`
	Changes    []written `json:"changes,omitempty"`
	OnRecord   int       `json:"on_record,omitempty"` // how many there were; more than Changes: there is no copy
}

// key is a tokencache.Key.
type key struct {
	Selector selector `json:"selector"`
	Resource string   `json:"resource"`
}

type remembered struct {
	Key         key            `json:"key"`
	Token       *token         `json:"token,omitempty"`
	Nominal     time.Duration  `json:"nominal_ns"`
	ReceivedOn  time.Time      `json:"received_on,omitzero"`
	Deadline    time.Duration  `json:"deadline_ns"`
	Next        *time.Duration `json:"next_ns,omitempty"`        // absent: never
	Asked       *time.Duration `json:"asked_ns,omitempty"`       // absent: never
	ReceivedAt  time.Duration  `json:"received_on_ns,omitempty"` // on-time, as the two that follow
	IssuedFrom  time.Duration  `json:"issued_from_on_ns,omitempty"`
	IssuedTo    time.Duration  `json:"issued_to_on_ns,omitempty"`
	Blind       bool           `json:"blind,omitempty"`
	Earliest    time.Time      `json:"minted_earliest,omitzero"`
	Latest      time.Time      `json:"minted_latest,omitzero"`
	Life        time.Duration  `json:"life_ns"`
	Given       time.Duration  `json:"given_ns,omitempty"`
	Born        time.Duration  `json:"born_ns"`
	Received    time.Duration  `json:"received_ns,omitempty"` // up to version 2, a boot time
	Shown       time.Duration  `json:"shown_ns"`
	Answered    time.Duration  `json:"answered_ns"`
	Tries       int            `json:"tries,omitempty"`
	Claims      claims         `json:"claims"`
	Before      *claims        `json:"before,omitempty"`
	Unconfirmed bool           `json:"unconfirmed,omitempty"`
	Presumed    bool           `json:"presumed,omitempty"`
	Rollovers   []seen         `json:"rollovers,omitempty"`
	Withheld    []string       `json:"withheld,omitempty"` // the IDs of the changes that withhold the token
	Failing     *failing       `json:"failing,omitempty"`
	Claim       *claim         `json:"claim,omitempty"`
}

type token struct {
	Text      string    `json:"text"`
	ExpiresOn time.Time `json:"expires_on,omitzero"`
	NotBefore time.Time `json:"not_before,omitzero"`
	Claims    *claims   `json:"claims,omitempty"` // absent: the key's
}

type claims struct {
	Issuer    string    `json:"iss,omitempty"` // absent up to version 2
	Audience  string    `json:"aud,omitempty"`
	ClientID  string    `json:"appid,omitempty"`
	ObjectID  string    `json:"oid,omitempty"`
	TenantID  string    `json:"tid,omitempty"`
	IssuedAt  time.Time `json:"iat,omitzero"`
	NotBefore time.Time `json:"nbf,omitzero"`
	Groups    []string  `json:"groups,omitempty"`
	Roles     []string  `json:"roles,omitempty"`
	WIDs      []string  `json:"wids,omitempty"`
	Omitted   []string  `json:"omitted,omitempty"` // absent up to version 2
}

type seen struct {
	Of      *key    `json:"of,omitempty"` // absent: the key that it stands under
	After   float64 `json:"after"`
	By      float64 `json:"by"`
	Watched float64 `json:"watched"`
}

// encodeMemory leaves out the keys that could not be read again, and the largest where all are too large together, so that one
// strange token, or one strange time of it, does not cost the others. The caller clears what it is given; encoding/json and the tokens
// themselves, being strings, leave copies that no program can clear.
func encodeMemory(m tokencache.Snapshot) ([]byte, error) {
	doc := memory{
		Version: memoryVersion, Source: m.Source, BootID: m.BootID, Boot: m.Boot, On: m.On, Wall: m.Wall.UTC(), Synchronised: m.Synchronised,
		Keys: make([]remembered, 0, len(m.Keys)), Rollovers: seenOf(m.Rollovers, maxHistory, tokencache.Key{}),
		Principals: principalsOf(m.Principals), Bygones: bygonesOf(m.Tombstones),
		Paused: m.Paused, Failing: failingOf(m.Failing), Static: m.Static, CountedOn: m.CountedOn,
	}
	for _, r := range m.Keys {
		if w := rememberedOf(r); w.check() == nil {
			doc.Keys = append(doc.Keys, w)
		}
	}
	origins := originsOf(m.Record.Origins)
	if checkRecord(m.Record.Lineage, origins, m.Record.Generation, nil) == nil {
		doc.Lineage, doc.Origins, doc.Generation = m.Record.Lineage, origins, m.Record.Generation
	}
	if copied := allWritten(m.Record.Changes); checkRecord(m.Record.Lineage, origins, m.Record.Generation, copied) == nil {
		doc.Changes = copied
	} // else they are on record all the same, and the tokens and their marks are worth keeping
	doc.OnRecord = m.OnRecord
	if err := doc.check(); err != nil {
		return nil, fmt.Errorf("what is to be kept could not be read again: %w", err)
	}
	text, err := json.Marshal(doc)
	if excess := len(text) - maxMemory; err == nil && excess > 0 {
		clear(text)
		doc.shed(excess)
		text, err = json.Marshal(doc)
	}
	return text, err
}

// shed leaves out the largest keys, of so many bytes in all: no token that is of use is so large, and the others are kept.
func (doc *memory) shed(excess int) {
	size := make(map[key]int)
	for i := range doc.Keys {
		if text, err := json.Marshal(&doc.Keys[i]); err == nil {
			size[doc.Keys[i].Key] = len(text)
			clear(text)
		}
	}
	slices.SortStableFunc(doc.Keys, func(a, b remembered) int { return cmp.Compare(size[b.Key], size[a.Key]) })
	for excess > 0 && len(doc.Keys) > 0 {
		excess -= size[doc.Keys[0].Key]
		doc.Keys = doc.Keys[1:]
	}
}

func rememberedOf(r tokencache.SnapshotEntry) remembered {
	w := remembered{
		Key: keyOf(r.Key), Nominal: r.Nominal, ReceivedOn: r.ReceivedOn.UTC(), Deadline: r.Deadline, Next: unlessNever(r.Next),
		Asked: unlessNever(r.Asked), ReceivedAt: r.ReceivedAt, IssuedFrom: r.IssuedFrom, IssuedTo: r.IssuedTo, Blind: r.Blind, Earliest: r.Issued.Earliest.UTC(), Latest: r.Issued.Latest.UTC(), Life: r.Life, Given: r.Given, Born: r.IssuedAt,
		Received: r.Received, Shown: r.Shown, Answered: r.Answered, Tries: r.Tries, Claims: claimsOf(r.Claims),
		Unconfirmed: r.Unconfirmed, Presumed: r.Presumed, Rollovers: seenOf(r.Rollovers, maxOwn, r.Key), Withheld: r.Withheld,
		Failing: failingOf(r.Failing), Claim: claimOf(r.Claim),
	}
	if r.Before != nil {
		before := claimsOf(*r.Before)
		w.Before = &before
	}
	if !r.Token.Text.IsZero() {
		w.Token = &token{Text: r.Token.Text.Reveal(), ExpiresOn: r.Token.ExpiresOn.UTC(), NotBefore: r.Token.NotBefore.UTC()}
		if own := claimsOf(r.Token.Claims); !reflect.DeepEqual(own, w.Claims) {
			w.Token.Claims = &own
		}
	}
	return w
}

func keyOf(k tokencache.Key) key { return key{*selectorOf(k.Selector), k.Resource} }

func claimsOf(c tokencache.Claims) claims {
	c.IssuedAt, c.NotBefore = c.IssuedAt.UTC(), c.NotBefore.UTC()
	for _, list := range []*[]string{&c.Groups, &c.Roles, &c.WIDs, &c.Omitted} {
		if len(*list) == 0 {
			*list = nil // written the same, so that both compare as the same
		}
	}
	return claims(c)
}

// seenOf returns the latest of told that are sound. What stands under the key need not name it.
func seenOf(told []tokencache.Rollover, most int, under tokencache.Key) []seen {
	all := make([]seen, 0, len(told))
	for _, r := range told {
		w := seen{After: r.After, By: r.By, Watched: r.Watched}
		if r.Key != under {
			of := keyOf(r.Key)
			w.Of = &of
		}
		if w.check() == nil {
			all = append(all, w)
		}
	}
	return all[max(0, len(all)-most):]
}

// decodeMemory quotes nothing of text in its errors, since there are tokens in it.
func decodeMemory(text []byte) (*tokencache.Snapshot, error) {
	var head struct{ Version *int }
	if json.Unmarshal(text, &head) != nil {
		return nil, errors.New("it is not JSON")
	}
	if head.Version == nil || *head.Version < 1 || *head.Version > memoryVersion {
		return nil, fmt.Errorf("it is not of version 1 to %d: another release of perceptd wrote it", memoryVersion)
	}
	var doc memory
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if d.Decode(&doc) != nil {
		return nil, fmt.Errorf("it is not what perceptd writes as version %d", *head.Version)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something stands after its end")
	}
	if err := doc.check(); err != nil {
		return nil, err
	}
	m := tokencache.Snapshot{
		Source: doc.Source, BootID: doc.BootID, Boot: doc.Boot, On: doc.On, Wall: doc.Wall, Synchronised: doc.Synchronised,
		Rollovers: told(doc.Rollovers, tokencache.Key{}), Paused: doc.Paused, Failing: doc.Failing.failing(), Static: doc.Static, CountedOn: doc.CountedOn,
		Record: tokencache.Record{
			Instant: tokencache.Instant{On: doc.On, Boot: doc.Boot, BootID: doc.BootID},
			Lineage: doc.Lineage, Origins: originsIn(doc.Origins), Generation: doc.Generation,
		},
	}
	for _, w := range doc.Keys {
		m.Keys = append(m.Keys, w.remembered())
	}
	for _, w := range doc.Principals {
		m.Principals = append(m.Principals, w.principals())
	}
	for _, w := range doc.Bygones {
		m.Tombstones = append(m.Tombstones, w.bygone())
	}
	for _, w := range doc.Changes {
		m.Record.Changes = append(m.Record.Changes, w.change(doc.Version))
	}
	m.OnRecord = max(doc.OnRecord, len(doc.Changes)) // up to version 2 it is not told
	return &m, nil
}

func (w *remembered) remembered() tokencache.SnapshotEntry {
	of := w.Key.key()
	r := tokencache.SnapshotEntry{
		Key: of, Nominal: w.Nominal, ReceivedOn: w.ReceivedOn, Deadline: w.Deadline, Next: orNever(w.Next),
		Asked: orNever(w.Asked), ReceivedAt: w.ReceivedAt, IssuedFrom: w.IssuedFrom, IssuedTo: w.IssuedTo, Blind: w.Blind, Issued: tokencache.IssueWindow{Earliest: w.Earliest, Latest: w.Latest}, Life: w.Life, Given: w.Given, IssuedAt: w.Born, Received: w.Received,
		Shown: w.Shown, Answered: w.Answered, Tries: w.Tries, Claims: tokencache.Claims(w.Claims),
		Before: (*tokencache.Claims)(w.Before), Unconfirmed: w.Unconfirmed, Presumed: w.Presumed, Rollovers: told(w.Rollovers, of),
		Withheld: w.Withheld,
		Failing:  w.Failing.failing(), Claim: w.Claim.claim(),
	}
	if r.ReceivedAt == 0 { // without the boots before that one, it is earlier than it was: on the safe side
		r.ReceivedAt = max(0, w.Received)
	}
	if t := w.Token; t != nil {
		r.Token = tokencache.Token{
			Text: tokencache.NewSecret(t.Text), ExpiresOn: t.ExpiresOn, NotBefore: t.NotBefore, Claims: r.Claims,
		}
		if t.Claims != nil {
			r.Token.Claims = tokencache.Claims(*t.Claims)
		}
	}
	return r
}

func (k *key) key() tokencache.Key {
	s, _ := k.Selector.means()
	return tokencache.Key{Selector: s, Resource: k.Resource}
}

func told(all []seen, under tokencache.Key) []tokencache.Rollover {
	var rollovers []tokencache.Rollover
	for _, w := range all {
		r := tokencache.Rollover{Key: under, After: w.After, By: w.By, Watched: w.Watched}
		if w.Of != nil {
			r.Key = w.Of.key()
		}
		rollovers = append(rollovers, r)
	}
	return rollovers
}

// check returns the first thing that is wrong with what is, or is to be, kept.
func (doc *memory) check() error {
	switch {
	case len(doc.Keys) > tokencache.MaxKeys:
		return fmt.Errorf("%d keys are more than %d", len(doc.Keys), tokencache.MaxKeys)
	case !fits(doc.Source, maxID):
		return errors.New("its source is none")
	case !fits(doc.BootID, maxID):
		return errors.New("its boot_id is none")
	case doc.Boot < 0 || doc.Boot > maxUptime:
		return errors.New("its boot_ns is no uptime")
	case !onTime(doc.On) || !onTime(doc.CountedOn):
		return errors.New("its on_ns or counted_on_ns is out of range")
	case !known(doc.Wall):
		return errors.New("its wall is outside 1970 to 2200")
	case doc.Paused < 0 || doc.Paused > maxSpan:
		return errors.New("its pause is none")
	}
	if err := doc.Failing.check(); err != nil {
		return err
	}
	if err := checkSeen(doc.Rollovers, maxHistory); err != nil {
		return err
	}
	if doc.OnRecord < 0 || doc.OnRecord > tokencache.MaxChanges {
		return errors.New("its on_record is out of range")
	}
	if err := checkRecord(doc.Lineage, doc.Origins, doc.Generation, doc.Changes); err != nil {
		return err
	}
	if err := doc.checkPrincipals(); err != nil {
		return err
	}
	there := make(map[tokencache.Key]bool)
	for i := range doc.Keys {
		w := &doc.Keys[i]
		if err := w.check(); err != nil {
			return fmt.Errorf("key %d: %w", i+1, err)
		}
		if k := w.Key.key(); there[k] {
			return fmt.Errorf("key %d: it is there twice", i+1)
		} else {
			there[k] = true
		}
	}
	return nil
}

func (w *remembered) check() error {
	switch {
	case w.Given < 0 || w.Given > maxSpan || w.Life < 0 || w.Life > maxSpan || w.Nominal < 0 || w.Nominal > maxSpan:
		return errors.New("its token's life is none")
	case !within(w.Deadline, w.Born, w.Received, w.Shown, w.Answered, orZero(w.Next), orZero(w.Asked)):
		return errors.New("a boot time of it is out of range")
	case !onTime(w.ReceivedAt) || !within(w.IssuedFrom, w.IssuedTo):
		return errors.New("an on-time of it is out of range")
	case !known(w.ReceivedOn, w.Earliest, w.Latest):
		return errors.New("its times are outside 1970 to 2200")
	case w.Tries < 0 || w.Tries > maxTries:
		return errors.New("its tries are out of range")
	}
	if len(w.Withheld) > tokencache.MaxChanges {
		return fmt.Errorf("%d changes withhold its token", len(w.Withheld))
	}
	for _, id := range w.Withheld {
		if id == "" || !fits(id, maxID) {
			return errors.New("a change that withholds its token has no id")
		}
	}
	if err := w.Key.check(); err != nil {
		return err
	}
	for _, c := range []*claims{&w.Claims, w.Before} {
		if err := c.check(); err != nil {
			return err
		}
	}
	if err := w.Token.check(); err != nil {
		return err
	}
	if err := w.Failing.check(); err != nil {
		return err
	}
	if err := w.Claim.check(); err != nil {
		return err
	}
	return checkSeen(w.Rollovers, maxOwn)
}

func (k *key) check() error {
	if _, ok := k.Selector.means(); !ok {
		return errors.New("its selector is none")
	}
	if !fits(k.Resource, maxResource) {
		return errors.New("its resource is none")
	}
	return nil
}

func (t *token) check() error {
	switch {
	case t == nil:
		return nil
	case t.Text == "" || len(t.Text) > maxText || !headerSafe(t.Text):
		return errors.New("its token is none")
	case !known(t.ExpiresOn, t.NotBefore):
		return errors.New("its token's times are outside 1970 to 2200")
	}
	return t.Claims.check()
}

// check bounds a claim's length only: it is as the issuer wrote it.
func (c *claims) check() error {
	if c == nil {
		return nil
	}
	if !known(c.IssuedAt, c.NotBefore) {
		return errors.New("its claims' times are outside 1970 to 2200")
	}
	texts := []string{c.Issuer, c.Audience, c.ClientID, c.ObjectID, c.TenantID}
	for _, list := range [][]string{c.Groups, c.Roles, c.WIDs, c.Omitted} {
		if len(list) > maxListed {
			return fmt.Errorf("a claim of it lists more than %d", maxListed)
		}
		texts = append(texts, list...)
	}
	for _, text := range texts {
		if len(text) > maxClaim || !utf8.ValidString(text) {
			return errors.New("a claim of it is too long, or no text")
		}
	}
	return nil
}

func checkSeen(all []seen, most int) error {
	if len(all) > most {
		return fmt.Errorf("%d rollovers are more than %d", len(all), most)
	}
	for i := range all {
		if err := all[i].check(); err != nil {
			return fmt.Errorf("rollover %d: %w", i+1, err)
		}
	}
	return nil
}

// check allows a share to be somewhat outside a life: of a short one, a call took a part.
func (w *seen) check() error {
	for _, share := range []float64{w.After, w.By, w.Watched} {
		if !(share >= -1 && share <= 2) {
			return errors.New("a share of it is out of range")
		}
	}
	if w.After >= w.By {
		return errors.New("it ends before it begins")
	}
	if w.Of == nil {
		return nil
	}
	return w.Of.check()
}

func headerSafe(text string) bool {
	for i := range len(text) {
		if text[i] <= ' ' || text[i] >= 0x7f {
			return false
		}
	}
	return true
}
