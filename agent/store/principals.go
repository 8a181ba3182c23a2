package store

import (
	"encoding/hex"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	"perceptd/tokencache"
)

// Bounds on what is kept of principals and bygones: what a cache remembers.
const (
	maxSelectors = tokencache.MaxKeys
	maxFormer    = 8
	maxBygones   = 2 * tokencache.MaxKeys
)

// principals is a tokencache.Principals as it is written. Boot times are absent where there is none.
type principals struct {
	Selector selector       `json:"selector"`
	Current  principal      `json:"current"`
	Former   []principal    `json:"former,omitempty"`
	Since    *time.Duration `json:"since_ns,omitempty"`
	Shown    *time.Duration `json:"shown_ns,omitempty"`
	Told     *time.Duration `json:"told_ns,omitempty"`
	Untold   int            `json:"untold,omitempty"`
	By       string         `json:"by,omitempty"` // a resource
}

// claim is a tokencache.Claim.
type claim struct {
	By   principal     `json:"by"`
	From time.Duration `json:"from_ns"`
}

// claimOf returns nil also for what could not be read again: it is made anew, which takes longer.
func claimOf(of *tokencache.Claim) *claim {
	if of == nil {
		return nil
	}
	w := &claim{By: principal(of.By), From: of.From}
	if w.check() != nil {
		return nil
	}
	return w
}

func (w *claim) claim() *tokencache.Claim {
	if w == nil {
		return nil
	}
	return &tokencache.Claim{By: tokencache.Principal(w.By), From: w.From}
}

func (w *claim) check() error {
	switch {
	case w == nil:
		return nil
	case w.By == principal{}:
		return errors.New("a claim to be the current principal is nobody's")
	case !within(w.From):
		return errors.New("a boot time of it is out of range")
	}
	return w.By.check()
}

type principal struct {
	ObjectID string `json:"oid,omitempty"`
	TenantID string `json:"tid,omitempty"`
	ClientID string `json:"appid,omitempty"`

	Simulated bool `json:"simulated,omitempty"`
}

// bygone is a tokencache.Tombstone.
type bygone struct {
	SHA256     string         `json:"sha256"`
	Received   time.Duration  `json:"received_ns"`
	ReceivedOn time.Time      `json:"received_on,omitzero"`
	ExpiresOn  time.Time      `json:"expires_on,omitzero"`
	Given      time.Duration  `json:"given_ns,omitempty"`
	Deadline   *time.Duration `json:"deadline_ns,omitempty"`
	Came       time.Duration  `json:"came_on_ns,omitempty"`
	Unlearnt   bool           `json:"unlearnt,omitempty"`

	ReceivedAt time.Duration `json:"received_on_ns,omitempty"` // on-time, as the two that follow
	IssuedFrom time.Duration `json:"issued_from_on_ns,omitempty"`
	IssuedTo   time.Duration `json:"issued_to_on_ns,omitempty"`
	Blind      bool          `json:"blind,omitempty"`
}

// principalsOf leaves out what could not be read again.
func principalsOf(told []tokencache.Principals) (all []principals) {
	for _, p := range told {
		w := principals{
			Selector: *selectorOf(p.Selector), Current: principal(p.Current), Since: unlessNever(p.Since), Shown: unlessNever(p.Shown),
			Told: unlessNever(p.Told), Untold: min(p.Untold, maxTries), By: p.By,
		}
		for _, f := range p.Former {
			w.Former = append(w.Former, principal(f))
		}
		if w.check() == nil {
			all = append(all, w)
		}
	}
	return all
}

func (w *principals) principals() tokencache.Principals {
	s, _ := w.Selector.means()
	p := tokencache.Principals{
		Selector: s, Current: tokencache.Principal(w.Current), Since: orNever(w.Since), Shown: orNever(w.Shown),
		Told: orNever(w.Told), Untold: w.Untold, By: w.By,
	}
	for _, f := range w.Former {
		p.Former = append(p.Former, tokencache.Principal(f))
	}
	return p
}

func (w *principals) check() error {
	if _, ok := w.Selector.means(); !ok {
		return errors.New("its selector is none")
	}
	if len(w.Former) > maxFormer {
		return fmt.Errorf("%d former principals are more than %d", len(w.Former), maxFormer)
	}
	if !within(orZero(w.Since), orZero(w.Shown), orZero(w.Told)) {
		return errors.New("a boot time of it is out of range")
	}
	if w.Untold < 0 || w.Untold > maxTries || !fits(w.By, maxResource) {
		return errors.New("what is open of its switches is out of range")
	}
	for _, p := range append([]principal{w.Current}, w.Former...) {
		if err := p.check(); err != nil {
			return err
		}
	}
	return nil
}

func (p principal) check() error {
	for _, claim := range []string{p.ObjectID, p.TenantID, p.ClientID} {
		if len(claim) > maxClaim || !utf8.ValidString(claim) {
			return errors.New("a claim of it is too long, or no text")
		}
	}
	return nil
}

// bygonesOf leaves out what could not be read again.
func bygonesOf(told []tokencache.Tombstone) (all []bygone) {
	for _, r := range told {
		w := bygone{
			SHA256: r.SHA256, Received: r.Received, ReceivedOn: r.ReceivedOn.UTC(), ExpiresOn: r.ExpiresOn.UTC(), Given: r.Given,
			Deadline: unlessNever(r.Deadline), Came: r.Came, Unlearnt: r.Unlearnt, ReceivedAt: r.ReceivedAt, IssuedFrom: r.IssuedFrom, IssuedTo: r.IssuedTo, Blind: r.Blind,
		}
		w.ReceivedOn, w.ExpiresOn = keepable(w.ReceivedOn), keepable(w.ExpiresOn)
		if w.check() == nil {
			all = append(all, w)
		}
	}
	return all
}

func (w *bygone) bygone() tokencache.Tombstone {
	return tokencache.Tombstone{
		SHA256: w.SHA256, Received: w.Received, ReceivedOn: w.ReceivedOn, ExpiresOn: w.ExpiresOn, Given: w.Given, Deadline: orNever(w.Deadline), Came: w.Came, Unlearnt: w.Unlearnt,
		ReceivedAt: w.ReceivedAt, IssuedFrom: w.IssuedFrom, IssuedTo: w.IssuedTo, Blind: w.Blind,
	}
}

func (w *bygone) check() error {
	switch sum, err := hex.DecodeString(w.SHA256); {
	case err != nil || len(sum) != 32:
		return errors.New("its digest is none")
	case !within(w.Received, w.Given, orZero(w.Deadline)) || w.Given < 0:
		return errors.New("a boot time of it is out of range")
	case !onTime(w.ReceivedAt) || !onTime(w.Came) || !within(w.IssuedFrom, w.IssuedTo):
		return errors.New("an on-time of it is out of range")
	case !known(w.ReceivedOn, w.ExpiresOn):
		return errors.New("its times are outside 1970 to 2200")
	}
	return nil
}

// checkPrincipals returns the first thing that is wrong with what is kept of principals and bygones.
func (doc *memory) checkPrincipals() error {
	if len(doc.Principals) > maxSelectors || len(doc.Bygones) > maxBygones {
		return fmt.Errorf("%d selectors or %d bygones are more than %d", len(doc.Principals), len(doc.Bygones), maxBygones)
	}
	there := make(map[selector]bool)
	for i := range doc.Principals {
		w := &doc.Principals[i]
		if err := w.check(); err != nil {
			return fmt.Errorf("principals %d: %w", i+1, err)
		}
		if there[w.Selector] {
			return fmt.Errorf("principals %d: its selector is there twice", i+1)
		}
		there[w.Selector] = true
	}
	for i := range doc.Bygones {
		if err := doc.Bygones[i].check(); err != nil {
			return fmt.Errorf("bygone %d: %w", i+1, err)
		}
	}
	return nil
}
