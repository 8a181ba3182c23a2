package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"perceptd/tokencache"
)

// recordVersion is the format of the record that is written. Those before it are read as well: in version 1 there are neither
// lineage nor generation, and up to version 2 no on-times, so that moments are known in the boot of at_boot_ns alone, and a date
// that at_boot_ns stands beside is none.
const recordVersion = 3

// recordDocument is the record as it is written.
type recordDocument struct {
	Version int `json:"version"`
	tokencache.Record
	Changes []changeDocument `json:"changes"`
}

// changeDocument is a policy change as it is written.
type changeDocument struct {
	tokencache.PolicyChange
	Selector *tokencache.Selector `json:"selector,omitempty"` // absent: all identities

	// Present up to version 2 when At was read off a clock that was not known to be right.
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

// policyChanges returns what was written in a document of that version.
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

func (r *Record) encode(record tokencache.Record) ([]byte, error) {
	record = record.Sanitized()
	if err := record.Validate(); err != nil {
		return nil, unreadableAgain(err)
	}
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(recordDocument{Version: recordVersion, Record: record, Changes: changeDocuments(record.Changes)}); err != nil {
		return nil, err
	}
	if text.Len() > maxFile {
		return nil, fmt.Errorf("the record would be larger than %d bytes", maxFile)
	}
	return text.Bytes(), nil
}

func (r *Record) decode(text []byte) (*tokencache.Record, error) {
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
	record := doc.Record
	if record.Changes, err = policyChanges(doc.Changes, version); err != nil {
		return nil, err
	}
	for i, from := range doc.Changes {
		if p := &record.Changes[i]; version < 3 && from.AtBoot != nil && r.id != "" && doc.BootID == r.id {
			p.Moment = max(1, time.Duration(*from.AtBoot)) // on-time begins with this boot, when nothing was kept with any before
			p.By = p.Moment
		}
	}
	if err := record.Validate(); err != nil {
		return nil, err
	}
	return &record, nil
}

// versionOf returns the version of a document; 0: it tells none.
func versionOf(text []byte) (int, error) {
	var head struct{ Version int }
	err := json.Unmarshal(text, &head)
	return head.Version, err
}

func otherVersion(newest int) error {
	return fmt.Errorf("it is not of version 1 to %d: another release of perceptd wrote it", newest)
}

// decodeStrictly refuses what no release before this one has written.
func decodeStrictly(text []byte, doc any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	return d.Decode(doc)
}

func unreadableAgain(why error) error {
	return fmt.Errorf("what is to be kept could not be read again: %w", why)
}
