package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"perceptd/tokencache"
)

// version is the format that is written. Those before it are read as well: in version 1 there are neither lineage nor generation,
// and up to version 2 no on-times, so that moments are known in the boot of at_boot_ns alone, and a date that at_boot_ns stands
// beside is none.
const version = 3

// Bounds on what a record may hold.
const (
	maxGeneration = 1 << 62 // which no record comes to by itself
	maxJoined     = math.MaxInt32

	maxID       = 64
	maxSelector = 1024
	maxResource = 512
	maxNote     = 256
)

// Times are between these.
var (
	earliest = time.Unix(0, 0)
	latest   = time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)
)

// document is the file as it is written.
type document struct {
	Version    int           `json:"version"`
	BootID     string        `json:"boot_id"` // the boot that boot_ns is of
	Boot       time.Duration `json:"boot_ns,omitempty"`
	On         time.Duration `json:"on_ns,omitempty"`
	Lineage    string        `json:"lineage,omitempty"`
	Origins    []origin      `json:"origins,omitempty"`
	Generation uint64        `json:"generation"`
	Changes    []written     `json:"changes"`
}

// origin is a tokencache.Origin.
type origin struct {
	Lineage    string `json:"lineage"`
	Generation uint64 `json:"generation"`
}

func originsOf(all []tokencache.Origin) (told []origin) {
	for _, o := range all {
		told = append(told, origin(o))
	}
	return told
}

func originsIn(told []origin) (all []tokencache.Origin) {
	for _, o := range told {
		all = append(all, tokencache.Origin(o))
	}
	return all
}

type written struct {
	ID       string            `json:"id"`
	Selector *selector         `json:"selector,omitempty"` // absent: all identities
	Resource string            `json:"resource,omitempty"` // absent: all
	At       time.Time         `json:"at"`
	Effect   tokencache.Effect `json:"effect"`
	Note     string            `json:"note,omitempty"`
	NotedOn  time.Time         `json:"noted_on"`

	Vouched bool          `json:"vouched,omitempty"`
	Moment  time.Duration `json:"moment_ns,omitempty"` // on-time, as By; absent: not known
	By      time.Duration `json:"by_ns,omitempty"`
	Issuer  *window       `json:"issuer,omitempty"` // absent: not known
	Checked bool          `json:"checked,omitempty"`
	// In which boot it was noted is not known, since it was read off a file that others could have changed.
	Unplaced bool `json:"unplaced,omitempty"`
	Joined   int  `json:"joined,omitempty"`

	NotLater time.Time `json:"not_later,omitzero"` // by the issuer's clock

	// Present up to version 2 when At was read off a clock that was not known to be right.
	AtBoot *int64 `json:"at_boot_ns,omitempty"`
}

// window is a tokencache.Window. An absent end is not known.
type window struct {
	Earliest time.Time `json:"earliest,omitzero"`
	Latest   time.Time `json:"latest,omitzero"`
}

type selector struct {
	Kind string `json:"kind"`
	ID   string `json:"id,omitempty"`
}

var (
	effects = []tokencache.Effect{tokencache.Changed, tokencache.Granted, tokencache.Revoked, tokencache.Unknown}
	kinds   = []tokencache.SelectorKind{tokencache.SystemAssigned, tokencache.ClientID, tokencache.ObjectID, tokencache.ResourceID}
)

func (r *Record) encode(record tokencache.Record) ([]byte, error) {
	doc := document{Version: version, BootID: record.BootID, Boot: record.Boot, On: record.On, Lineage: record.Lineage, Origins: originsOf(record.Origins), Generation: record.Generation, Changes: allWritten(record.Changes)}
	if err := doc.check(); err != nil {
		return nil, fmt.Errorf("what is to be kept could not be read again: %w", err)
	}
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(doc); err != nil {
		return nil, err
	}
	if text.Len() > maxFile {
		return nil, fmt.Errorf("the record would be larger than %d bytes", maxFile)
	}
	return text.Bytes(), nil
}

func allWritten(changes []tokencache.PolicyChange) []written {
	all := make([]written, len(changes))
	for i, p := range changes {
		all[i] = writtenOf(p)
	}
	return all
}

func writtenOf(p tokencache.PolicyChange) written {
	w := written{
		ID: p.ID, Resource: p.Resource, At: p.At.UTC(), Effect: p.Effect, Note: p.Note, NotedOn: p.RecordedAt.UTC(),
	}
	if !p.AllIdentities {
		w.Selector = selectorOf(p.Selector)
	}
	w.Vouched, w.Moment, w.By, w.Checked, w.Unplaced, w.Joined = p.Vouched, p.Moment, p.By, p.Checked, p.Unplaced, p.Joined
	w.NotLater = keepable(p.NotLater)
	if from, to := keepable(p.Issuer.Earliest), keepable(p.Issuer.Latest); !from.IsZero() || !to.IsZero() {
		w.Issuer = &window{Earliest: from, Latest: to}
	}
	return w
}

// keepable returns t, or that it is not known where it is none that can be read again: one strange time, which a back end told, does
// not cost the other changes.
func keepable(t time.Time) time.Time {
	if !sane(t) {
		return time.Time{}
	}
	return t.UTC()
}

func unlessNever(d time.Duration) *time.Duration {
	if d == tokencache.Never {
		return nil
	}
	return &d
}

func orNever(d *time.Duration) time.Duration {
	if d == nil {
		return tokencache.Never
	}
	return *d
}

func orZero(d *time.Duration) time.Duration {
	if d == nil {
		return 0
	}
	return *d
}

func (r *Record) decode(text []byte) (*tokencache.Record, error) {
	var head struct{ Version *int }
	if err := json.Unmarshal(text, &head); err != nil {
		return nil, fmt.Errorf("it is not JSON: %w", err)
	}
	if head.Version == nil || *head.Version < 1 || *head.Version > version {
		return nil, fmt.Errorf("it is not of version 1 to %d: another release of perceptd wrote it", version)
	}
	var doc document
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&doc); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something stands after its end")
	}
	if err := doc.check(); err != nil {
		return nil, err
	}
	record := &tokencache.Record{
		Instant: tokencache.Instant{On: doc.On, Boot: doc.Boot, BootID: doc.BootID},
		Lineage: doc.Lineage, Origins: originsIn(doc.Origins), Generation: doc.Generation, Changes: make([]tokencache.PolicyChange, len(doc.Changes)),
	}
	for i, w := range doc.Changes {
		record.Changes[i] = w.change(doc.Version)
		if p := &record.Changes[i]; doc.Version < 3 && w.AtBoot != nil && r.id != "" && doc.BootID == r.id {
			p.Moment = max(1, time.Duration(*w.AtBoot)) // on-time begins with this boot, when nothing was kept with any before
			p.By = p.Moment
		}
	}
	return record, nil
}

// change is the policy change as it was written in a document of that version.
func (w *written) change(version int) tokencache.PolicyChange {
	p := tokencache.PolicyChange{
		ID: w.ID, AllIdentities: w.Selector == nil, Resource: w.Resource, At: w.At, Effect: w.Effect,
		Note: w.Note, RecordedAt: w.NotedOn, Vouched: w.Vouched, Moment: w.Moment, By: w.By, Checked: w.Checked, Unplaced: w.Unplaced, NotLater: w.NotLater, Joined: w.Joined,
	}
	if version < 3 {
		p.Vouched = w.AtBoot == nil
	}
	if w.Selector != nil {
		p.Selector, _ = w.Selector.means()
	}
	if w.Issuer != nil {
		p.Issuer = tokencache.Window(*w.Issuer)
	}
	return p
}

// check returns the first thing that is wrong with what is, or is to be, on the disk.
func (doc *document) check() error {
	switch {
	case !fits(doc.BootID, maxID):
		return errors.New("its boot_id is none")
	case doc.Boot < 0 || doc.Boot > maxUptime:
		return errors.New("its boot_ns is no uptime")
	case !onTime(doc.On):
		return errors.New("its on_ns is out of range")
	}
	return checkRecord(doc.Lineage, doc.Origins, doc.Generation, doc.Changes)
}

func checkRecord(lineage string, origins []origin, generation uint64, all []written) error {
	if !fits(lineage, maxID) {
		return errors.New("its lineage is none")
	}
	if generation > maxGeneration {
		return errors.New("its generation is out of range")
	}
	if len(origins) > tokencache.MaxOrigins {
		return errors.New("its origins are too many")
	}
	for _, o := range origins {
		if o.Lineage == "" || !fits(o.Lineage, maxID) || o.Generation > maxGeneration {
			return errors.New("one of its origins is none")
		}
	}
	if n := len(all); n > tokencache.MaxChanges {
		return fmt.Errorf("%d policy changes are more than %d", n, tokencache.MaxChanges)
	}
	seen := make(map[string]bool)
	for i := range all {
		w := &all[i]
		if err := w.check(); err != nil {
			return fmt.Errorf("policy change %d: %w", i+1, err)
		}
		if seen[w.ID] {
			return fmt.Errorf("policy change %d: its id is that of another", i+1)
		}
		seen[w.ID] = true
	}
	return nil
}

func (w *written) check() error {
	switch {
	case w.ID == "" || !fits(w.ID, maxID):
		return errors.New("its id is none")
	case !fits(w.Resource, maxResource):
		return errors.New("its resource is none")
	case !fits(w.Note, maxNote):
		return errors.New("its note is too long, or cannot be printed")
	case !slices.Contains(effects, w.Effect):
		return errors.New("its effect is none that is known")
	case !sane(w.At) || !sane(w.NotedOn):
		return errors.New("its times are outside 1970 to 2200")
	case w.AtBoot != nil && *w.AtBoot < 0:
		return errors.New("its at_boot_ns is before the boot")
	case w.Joined < 0 || w.Joined > maxJoined:
		return errors.New("its joined is out of range")
	case !within(w.Moment, w.By) || w.By < w.Moment:
		return errors.New("its moment_ns or by_ns is out of range")
	case w.Issuer != nil && !known(w.Issuer.Earliest, w.Issuer.Latest):
		return errors.New("its times by the issuer are outside 1970 to 2200")
	case !known(w.NotLater):
		return errors.New("its not_later is outside 1970 to 2200")
	case w.Selector == nil:
		return nil
	}
	if _, ok := w.Selector.means(); !ok {
		return errors.New("its selector is none")
	}
	return nil
}

func selectorOf(s tokencache.Selector) *selector { return &selector{s.Kind.String(), s.ID} }

// means returns what s stands for, if it stands for anything.
func (s *selector) means() (tokencache.Selector, bool) {
	for _, kind := range kinds {
		if kind.String() == s.Kind {
			named := kind != tokencache.SystemAssigned
			return tokencache.Selector{Kind: kind, ID: s.ID}, fits(s.ID, maxSelector) && named == (s.ID != "")
		}
	}
	return tokencache.Selector{}, false
}

// fits reports whether text is printable and no longer than most bytes.
func fits(text string, most int) bool {
	return len(text) <= most && utf8.ValidString(text) && !strings.ContainsFunc(text, func(c rune) bool { return !unicode.IsPrint(c) })
}

func sane(t time.Time) bool { return !t.Before(earliest) && t.Before(latest) }

// known reports whether each is a time that can be, or none.
func known(times ...time.Time) bool {
	for _, t := range times {
		if !t.IsZero() && !sane(t) {
			return false
		}
	}
	return true
}

func within(spans ...time.Duration) bool {
	for _, d := range spans {
		if d < -maxSpan || d > maxSpan {
			return false
		}
	}
	return true
}

// onTime reports whether d can be an on-time, or none.
func onTime(d time.Duration) bool { return d >= 0 && d <= maxSpan }
