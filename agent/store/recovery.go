package store

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"perceptd/tokencache"
)

// Recovery is what a start begins with, of all that was kept.
type Recovery struct {
	// Record is the policy changes on the disk; nil: none were read. Then Unread is why they, or a copy of them, cannot
	// be read now: PolicyChanges.Load or Tokens.LoadAgain may read them later. Lost is why they never will be: what was
	// there is spoilt, or it is gone although there are tokens. Without either there was nothing.
	Record       *tokencache.Record
	Unread, Lost error
	// Snapshot is the newest snapshot whose tokens are of use; nil: there is none. One that was taken in this boot is
	// newer than those of earlier boots.
	Snapshot *tokencache.Snapshot
	// Unopened are the other snapshots with tokens of use, from files that earlier starts could not open. They help
	// with keys that Snapshot has no token for.
	Unopened []*tokencache.Snapshot
	// Copies are all snapshots that were read, of whatever source, for the copies of the record and the marks on tokens
	// in them.
	Copies []tokencache.Snapshot
	// On is for tokencache.Options.
	On time.Duration

	// UnreadTokens is why a file of tokens, which may have a copy of the record, cannot be read now. Tokens.LoadAgain
	// may read it later.
	UnreadTokens error

	// RecordFault and TokensFault are what else is wrong with the files, for the log.
	RecordFault, TokensFault error
}

// Source is whose tokens a snapshot has. Anything may have answered at another address.
type Source struct {
	Name      string                       // the form of its endpoint, and its address
	Former    string                       // as releases before wrote it: without the address
	Simulated func(tokencache.Secret) bool // reports whether a simulated back end made that token
}

// Has reports whether the tokens of m are of s. What was kept without an address counts as of s, unless a simulated
// back end made a token in it: that was at another address. Each token is looked at, since claims as earlier releases
// kept them do not name the issuer.
func (s Source) Has(m *tokencache.Snapshot) bool {
	simulated := func(r tokencache.SnapshotEntry) bool { return s.Simulated(r.Token.Text) }
	return m.Source == s.Name || m.Source == s.Former && !slices.ContainsFunc(m.Keys, simulated)
}

var errGone = errors.New("it is gone")

// unreadCopy returns why a record cannot be read now that seems to be lost, while a copy of it may be read later. The
// error is not a *SpoiltError.
func unreadCopy(lost, copies error) error {
	return fmt.Errorf("%v; a copy of it may be where it cannot be read now: %w", lost, copies)
}

// mayHaveTokens reports whether there may be a file of tokens: also where none can be read now.
func mayHaveTokens(folder Folder) bool {
	return slices.ContainsFunc(append(unopenedNames(), tokensName), func(name string) bool {
		return mayBeThere(folder, name)
	})
}

// Recover reads the record and the file of tokens. handedOver is what earlier processes handed over, the latest first.
// tokens may be nil: then there is no file. ours reports whether the tokens of a snapshot are of use. bootID names this
// boot.
func Recover(
	record *PolicyChanges, tokens *Tokens, handedOver []tokencache.Snapshot,
	ours func(*tokencache.Snapshot) bool, bootID string,
) Recovery {
	var b Recovery
	var err error
	b.Record, err = record.Load()
	_, spoilt := errors.AsType[*SpoiltError](err)
	b.Copies = handedOver
	before := len(handedOver) // that Snapshot knew of
	if tokens != nil {
		var saved *tokencache.Snapshot
		if saved, b.TokensFault = tokens.Load(); saved != nil {
			b.Copies = append(b.Copies, *saved)
		}
		before = len(b.Copies)
		later, fault := tokens.LoadUnopened()
		b.Copies, b.TokensFault = append(b.Copies, later...), errors.Join(b.TokensFault, fault)
		b.UnreadTokens = tokens.whyUnread()
	}
	unopened := b.TokensFault
	if tokens == nil && mayHaveTokens(record.folder) {
		unopened = errors.New(tokensName + " is there, and not the key that it is sealed with")
	}
	switch {
	case b.Record != nil:
		b.RecordFault = err
	case (spoilt || err == nil) && b.UnreadTokens != nil:
		b.Unread = unreadCopy(cmp.Or(err, errGone), b.UnreadTokens)
	case spoilt:
		b.Lost = err
	case err != nil:
		b.Unread = err
	case unopened != nil: // a first start finds no tokens
		b.Lost = fmt.Errorf("%w, and a copy of it may be where none can be read: %w", errGone, unopened)
	}
	var taken []tokencache.Instant
	if b.Record != nil {
		taken = append(taken, b.Record.Instant)
	}
	for _, m := range b.Copies {
		taken = append(taken, m.Taken())
		if m.DenyRules {
			record.NoteDenyRules()
		}
	}
	boot := record.boot()
	b.On = tokencache.OnAtBoot(bootID, boot, taken...)
	now := tokencache.Instant{On: b.On + boot, Boot: boot, BootID: bootID}
	for i := range b.Copies {
		m := &b.Copies[i]
		if ours(m) && (b.Snapshot == nil || m.Taken().In(now).On > b.Snapshot.Taken().In(now).On) {
			b.Snapshot = m
		}
	}
	for i := range b.Copies[before:] {
		if m := &b.Copies[before+i]; m != b.Snapshot && ours(m) {
			b.Unopened = append(b.Unopened, m)
		}
	}
	return b
}
