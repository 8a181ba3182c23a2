package store

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"perceptd/agent/deny"
)

const (
	denyName     = "deny-rules.json"
	denyCopyName = "deny-rules.copy.json"
	maxDenyFile  = 1 << 20 // bytes
)

// DenyRules is the record of deny rules on the disk, in two files as PolicyChanges is. Where only files are left that
// others could have changed, what is in them denies, and the record counts as lost: something may have been taken out.
type DenyRules struct {
	twoFiles
	changes *PolicyChanges
}

// OpenDenyRules returns the record in the folder of the policy changes, whose record notes that there is one.
func OpenDenyRules(changes *PolicyChanges) *DenyRules {
	return &DenyRules{
		twoFiles: twoFiles{folder: changes.folder, name: denyName, copy: denyCopyName}, changes: changes,
	}
}

// Load returns the record; nil where there never was one, as far as the record of policy changes says, which was loaded
// before. The error says what is wrong with the files. Beside a record it is about one of the two.
//
// Without a record, a *SpoiltError says that what is there is no record, or that it is gone. Any other error says that
// it cannot be read now: Save refuses to overwrite it until Load has read it.
func (r *DenyRules) Load() (*deny.Record, error) {
	r.from = idOf(r.folder)
	record, fault := r.load(denyName)
	copied, copyFault := r.load(denyCopyName)
	switch {
	case isLoose(fault) && isLoose(copyFault):
		both := deny.Newest(*record, *copied)
		record = suspect(&both, fault)
	case isLoose(fault) && copied != nil:
		record = copied
	case isLoose(copyFault) && record != nil:
	case record == nil && copied != nil:
		record, fault = copied, cmp.Or(fault, fmt.Errorf("%s is gone", denyName))
		if isLoose(copyFault) {
			record = suspect(copied, copyFault)
		}
	case copied == nil && record != nil:
		copyFault = cmp.Or(copyFault, fmt.Errorf("%s is gone", denyCopyName))
		if isLoose(fault) {
			record = suspect(record, fault)
		}
	case record != nil:
		newest := deny.Newest(*record, *copied)
		record = &newest
	}
	r.settle(record != nil, &fault, &copyFault)
	switch why := cmp.Or(r.unread, fault, copyFault); {
	case record != nil:
		r.changes.NoteDenyRules()
		return record, why
	case why != nil:
		return nil, why
	case r.changes.HaveDenyRules():
		return nil, &SpoiltError{Name: denyName, Why: errGone}
	}
	return nil, nil
}

// LoadOther returns, where another folder took the place of the one that Load read, what Load would there, and that one
// did. A folder in which there is no record is no loss. Where the record cannot be read now, the next call tries it
// again.
func (r *DenyRules) LoadOther() (record *deny.Record, isOther bool, err error) {
	before := r.from
	if !r.isElsewhere() {
		return nil, false, nil
	}
	switch record, err = r.Load(); {
	case record == nil && errors.Is(err, errGone):
		err = nil
	case r.unread != nil:
		r.from = before
	}
	return record, true, err
}

// suspect returns record as one from which something may have been taken.
func suspect(record *deny.Record, why error) *deny.Record {
	lost := *record
	lost.Lost = cmp.Or(lost.Lost, fmt.Sprintf("others could have changed the record of deny rules: %v", why))
	return &lost
}

func (r *DenyRules) load(name string) (*deny.Record, error) {
	text, err := r.folder.Read(name, othersMayChange, maxDenyFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil && !isLoose(err):
		return nil, err
	}
	record, why := decodeDeny(text)
	if why != nil {
		return nil, &SpoiltError{Name: name, Why: why}
	}
	return record, err
}

// Save puts record on the disk. When it returns nil, that outlives a power cut. When it returns an error, the record
// before does, or the new one.
func (r *DenyRules) Save(record deny.Record) error {
	if err := r.mayWrite(); err != nil {
		return err
	}
	text, err := encodeDeny(record)
	if err != nil {
		return err
	}
	if err := r.replaceBoth(text); err != nil {
		return err
	}
	r.changes.noteDenied(record.Named())
	return nil
}

// denyVersion is the format that is written.
const denyVersion = 1

type denyDocument struct {
	Version int `json:"version"`
	deny.Record
}

func encodeDeny(record deny.Record) ([]byte, error) {
	if err := record.Validate(); err != nil {
		return nil, unreadableAgain(err)
	}
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(denyDocument{Version: denyVersion, Record: record}); err != nil {
		return nil, err
	}
	if text.Len() > maxDenyFile {
		return nil, fmt.Errorf("the record would be larger than %d bytes", maxDenyFile)
	}
	return text.Bytes(), nil
}

func decodeDeny(text []byte) (*deny.Record, error) {
	version, err := versionOf(text)
	switch {
	case err != nil:
		return nil, fmt.Errorf("it is not JSON: %w", err)
	case version < 1 || version > denyVersion:
		return nil, otherVersion(denyVersion)
	}
	var doc denyDocument
	if err := decodeStrictly(text, &doc); err != nil {
		return nil, err
	}
	if err := doc.Validate(); err != nil {
		return nil, err
	}
	return &doc.Record, nil
}

// DenyHandoffPrefix begins the names by which systemd holds the record of deny rules. Those of Handoff begin so too,
// and have a number next.
const DenyHandoffPrefix = HandoffPrefix + "deny-"

// DenyHandoff hands the record of deny rules over to the next process, as Handoff does a snapshot.
type DenyHandoff struct {
	Handoff Handoff // with its Store and Discard
	last    uint64  // number of what was handed over last
}

// Take returns what earlier processes handed over in files, as Handoff.Take does, in no order.
func (h *DenyHandoff) Take(files map[string]*os.File, unusable func(name string, why error)) (all []deny.Record) {
	for name, file := range files {
		h.Handoff.held = append(h.Handoff.held, name)
		number, err := strconv.ParseUint(strings.TrimPrefix(name, DenyHandoffPrefix), 10, 63)
		var record *deny.Record
		if err == nil {
			h.last = max(h.last, number)
			record, err = readDocument(file, decodeDeny)
		}
		if err != nil {
			unusable(name, err)
			continue
		}
		all = append(all, *record)
	}
	return all
}

// Save hands record over in the place of what was handed over before. Where that does not work, nothing older stays
// there: the next process would take it for the latest.
func (h *DenyHandoff) Save(record deny.Record) error {
	err := h.save(record)
	if err == nil {
		return nil
	}
	h.Handoff.held = slices.DeleteFunc(h.Handoff.held, func(name string) bool { return h.Handoff.Discard(name) == nil })
	return err
}

func (h *DenyHandoff) save(record deny.Record) error {
	text, err := encodeDeny(record)
	if err != nil {
		return err
	}
	file, err := writeSealedMemfd(frame(text))
	if err != nil {
		return err
	}
	defer file.Close()
	h.last++
	return h.Handoff.hold(file, DenyHandoffPrefix+strconv.FormatUint(h.last, 10))
}
