package store

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	"perceptd/tokencache"
)

// snapshotVersion is the format of snapshots that is written. Earlier ones are read as well: version 1 has neither
// lineage nor generation of the copied record; versions 1 and 2 have no on-times, issuers, principals, tombstones and
// failures.
const snapshotVersion = 3

const maxSnapshot = 16 << 20 // bytes of the document

// snapshotDocument is a snapshot as it is written: with its tokens' text, which a Snapshot does not write by itself,
// and with a copy of the record, which was taken when the snapshot was. A record of generation 0 without changes is no
// copy.
type snapshotDocument struct {
	Version int             `json:"version"`
	Keys    []entryDocument `json:"keys"`
	tokencache.Snapshot

	Lineage    string              `json:"lineage,omitempty"`
	Origins    []tokencache.Origin `json:"origins,omitempty"`
	Generation uint64              `json:"generation,omitempty"`
	Changes    []changeDocument    `json:"changes,omitempty"`
}

// entryDocument is a SnapshotEntry as it is written. A rollover without a key is of the entry's.
type entryDocument struct {
	tokencache.SnapshotEntry
	Token *tokenDocument `json:"token,omitempty"`
}

// tokenDocument is a token as it is written.
type tokenDocument struct {
	Text string `json:"text"`
	tokencache.Token
	Claims *tokencache.Claims `json:"claims,omitempty"` // absent: the entry's
}

// encodeSnapshot leaves out the keys that could not be read again, and the largest ones where all are too large
// together. So one strange token, or one strange time of it, does not cost the others. The caller clears the result;
// encoding/json, and the tokens themselves, being strings, leave copies that no program can clear.
func encodeSnapshot(m tokencache.Snapshot) ([]byte, error) {
	m = m.Sanitized()
	if err := m.Validate(); err != nil {
		return nil, unreadableAgain(err)
	}
	doc := snapshotDocument{
		Version: snapshotVersion, Snapshot: m, Keys: make([]entryDocument, len(m.Keys)),
		Lineage: m.Record.Lineage, Origins: m.Record.Origins, Generation: m.Record.Generation,
		Changes: changeDocuments(m.Record.Changes),
	}
	for i, r := range m.Keys {
		doc.Keys[i] = entryDocumentOf(r)
	}
	text, err := json.Marshal(doc)
	if excess := len(text) - maxSnapshot; err == nil && excess > 0 {
		clear(text)
		doc.shed(excess)
		text, err = json.Marshal(doc)
	}
	return text, err
}

// shed leaves out the largest keys, of so many bytes in all. No token that is of use is so large.
func (doc *snapshotDocument) shed(excess int) {
	size := make(map[tokencache.Key]int)
	for i := range doc.Keys {
		if text, err := json.Marshal(&doc.Keys[i]); err == nil {
			size[doc.Keys[i].Key] = len(text)
			clear(text)
		}
	}
	slices.SortStableFunc(doc.Keys, func(a, b entryDocument) int { return cmp.Compare(size[b.Key], size[a.Key]) })
	for excess > 0 && len(doc.Keys) > 0 {
		excess -= size[doc.Keys[0].Key]
		doc.Keys = doc.Keys[1:]
	}
}

func entryDocumentOf(r tokencache.SnapshotEntry) entryDocument {
	r.Rollovers = slices.Clone(r.Rollovers)
	for i := range r.Rollovers {
		if of := &r.Rollovers[i].Key; *of == r.Key {
			*of = tokencache.Key{}
		}
	}
	doc := entryDocument{SnapshotEntry: r}
	if !r.Token.Text.IsZero() {
		doc.Token = &tokenDocument{Token: r.Token, Text: r.Token.Text.Reveal()}
		if !reflect.DeepEqual(r.Token.Claims, r.Claims) {
			doc.Token.Claims = &r.Token.Claims
		}
	}
	return doc
}

// decodeSnapshot quotes nothing of text in its errors, since it has tokens.
func decodeSnapshot(text []byte) (*tokencache.Snapshot, error) {
	version, err := versionOf(text)
	switch {
	case err != nil:
		return nil, errors.New("it is not JSON")
	case version < 1 || version > snapshotVersion:
		return nil, otherVersion(snapshotVersion)
	}
	var doc snapshotDocument
	if decodeStrictly(text, &doc) != nil {
		return nil, fmt.Errorf("it is not what perceptd writes as version %d", version)
	}
	m := doc.Snapshot
	m.Record = tokencache.Record{
		Instant: m.Taken(), Lineage: doc.Lineage, Origins: doc.Origins, Generation: doc.Generation,
	}
	if m.Record.Changes, err = policyChanges(doc.Changes, version); err != nil {
		return nil, err
	}
	for i := range doc.Keys {
		r, err := doc.Keys[i].entry()
		if err != nil {
			return nil, fmt.Errorf("key %d: %w", i+1, err)
		}
		m.Keys = append(m.Keys, r)
	}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	m.OnRecord = max(m.OnRecord, len(m.Record.Changes)) // up to version 2 it is not told
	return &m, nil
}

func (doc *entryDocument) entry() (tokencache.SnapshotEntry, error) {
	r := doc.SnapshotEntry
	if r.Key == (tokencache.Key{}) {
		return r, errors.New("its key is none")
	}
	if r.ReceivedOnTime == 0 { // without the boots before that one, it is earlier than it was: on the safe side
		r.ReceivedOnTime = max(0, r.ReceivedBoot)
	}
	for i := range r.Rollovers {
		if of := &r.Rollovers[i].Key; *of == (tokencache.Key{}) {
			*of = r.Key
		}
	}
	if t := doc.Token; t != nil {
		if t.Text == "" {
			return r, errors.New("its token is none")
		}
		r.Token = t.Token
		r.Token.Text, r.Token.Claims = tokencache.NewSecret(t.Text), r.Claims
		if t.Claims != nil {
			r.Token.Claims = *t.Claims
		}
	}
	return r, nil
}

// recordVersion is the format of the record that is written. Earlier ones are read as well: version 1 has neither
// lineage nor generation; versions 1 and 2 have no on-times, so that a change's moment is known only in the boot of its
// at_boot_ns, and the date beside an at_boot_ns is not one.
const recordVersion = 3

// recordDocument is the record as it is written.
type recordDocument struct {
	Version int `json:"version"`
	tokencache.Record
	Changes   []changeDocument `json:"changes"`
	DenyRules bool             `json:"deny_rules,omitempty"` // there are deny rules, in files of their own
	// DenyRecord is which record of them was there last; absent: not known.
	DenyRecord *tokencache.Origin `json:"deny_record,omitempty"`
}

// changeDocument is a policy change as it is written.
type changeDocument struct {
	tokencache.PolicyChange
	Selector *tokencache.Selector `json:"selector,omitempty"` // absent: all identities

	// AtBoot is there up to version 2, where At was read off a clock that was not known to be right.
	AtBoot *int64 `json:"at_boot_ns,omitempty"`
}

func changeDocuments(all []tokencache.PolicyChange) []changeDocument {
	docs := make([]changeDocument, len(all))
	for i, p := range all {
		docs[i].PolicyChange = p
		if !p.AllIdentities {
			docs[i].Selector = &p.Selector
		}
	}
	return docs
}

// policyChanges returns the changes in a document of that version.
func policyChanges(docs []changeDocument, version int) ([]tokencache.PolicyChange, error) {
	if docs == nil {
		return nil, nil
	}
	all := make([]tokencache.PolicyChange, 0, len(docs))
	for i, doc := range docs {
		if doc.AtBoot != nil && *doc.AtBoot < 0 {
			return nil, fmt.Errorf("policy change %d: %w", i+1, errors.New("its at_boot_ns is before the boot"))
		}
		p := doc.PolicyChange
		p.AllIdentities = doc.Selector == nil
		if doc.Selector != nil {
			p.Selector = *doc.Selector
		}
		if version < 3 {
			p.Vouched = doc.AtBoot == nil
		}
		all = append(all, p)
	}
	return all, nil
}

func (r *PolicyChanges) encode(record tokencache.Record) ([]byte, error) {
	record = record.Sanitized()
	if err := record.Validate(); err != nil {
		return nil, unreadableAgain(err)
	}
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	doc := recordDocument{Version: recordVersion, Record: record, Changes: changeDocuments(record.Changes),
		DenyRules: r.denyRules.Load(), DenyRecord: r.denied.Load()}
	if err := e.Encode(doc); err != nil {
		return nil, err
	}
	if text.Len() > maxChangesFile {
		return nil, fmt.Errorf("the record would be larger than %d bytes", maxChangesFile)
	}
	return text.Bytes(), nil
}

func (r *PolicyChanges) decode(text []byte) (*tokencache.Record, error) {
	version, err := versionOf(text)
	switch {
	case err != nil:
		return nil, fmt.Errorf("it is not JSON: %w", err)
	case version < 1 || version > recordVersion:
		return nil, otherVersion(recordVersion)
	}
	var doc recordDocument
	if err := decodeStrictly(text, &doc); err != nil {
		return nil, err
	}
	if doc.DenyRules {
		r.denyRules.Store(true)
	}
	if doc.DenyRecord != nil {
		r.denied.Store(doc.DenyRecord)
	}
	record := doc.Record
	if record.Changes, err = policyChanges(doc.Changes, version); err != nil {
		return nil, err
	}
	for i, from := range doc.Changes {
		if p := &record.Changes[i]; version < 3 && from.AtBoot != nil && r.id != "" && doc.BootID == r.id {
			// On-time begins with this boot, since nothing was kept with any before.
			p.Moment = max(1, time.Duration(*from.AtBoot))
			p.By = p.Moment
		}
	}
	if err := record.Validate(); err != nil {
		return nil, err
	}
	return &record, nil
}

// versionOf returns the version of a document; 0: it has none.
func versionOf(text []byte) (int, error) {
	var head struct{ Version int }
	err := json.Unmarshal(text, &head)
	return head.Version, err
}

func otherVersion(newest int) error {
	return fmt.Errorf("it is not of version 1 to %d: another release of perceptd wrote it", newest)
}

// decodeStrictly refuses fields that no release up to this one has written.
func decodeStrictly(text []byte, doc any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	return d.Decode(doc)
}

func unreadableAgain(why error) error {
	return fmt.Errorf("what is to be kept could not be read again: %w", why)
}
