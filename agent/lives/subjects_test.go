package lives

import (
	"os"
	"slices"
	"testing"
	"time"

	"perceptd/tokencache"
)

// subject is what a life is about: the conditions that show it are drawn in each such life, and meet seldom in others.
// All else is drawn as ever. Mutations name what the lives are about that notice them.
type subject string

const (
	anything       subject = "anything"
	aboutFull      subject = "full record"   // there are more policy changes than a record has room for
	aboutPipelines subject = "pipelines"     // policy changes follow each other, before one has spread
	aboutSpellings subject = "spellings"     // two resources are spellings of one
	aboutLies      subject = "lying clocks"  // the clock is wrong while it is vouched for
	aboutShort     subject = "short lives"   // the back end tells lives that are too short
	aboutBoots     subject = "boots"         // the device boots often
	aboutOutages   subject = "outages"       // the back end fails often
	aboutRenewals  subject = "principals"    // identities are made anew
	aboutGuesses   subject = "guessed dates" // policy changes are dated by a clock that is wrong, and not vouched for
	// a start sees the record alone, which goes on while the copy beside the tokens has what that lacks
	aboutForks subject = "forks"
)

var subjects = []subject{anything, aboutFull, aboutPipelines, aboutSpellings, aboutLies, aboutShort, aboutBoots,
	aboutOutages, aboutRenewals, aboutGuesses, aboutForks}

func aboutOf(t *testing.T) subject {
	about := subject(os.Getenv(aboutVariable))
	switch {
	case about == "":
		return anything
	case !slices.Contains(subjects, about):
		t.Fatalf("%s: lives are about one of %q, and not about %q", aboutVariable, subjects, about)
	}
	return about
}

// shape has a device and the weights of what happens to it be as s needs them.
func (s subject) shape(d drawing, v *device, weights *[kinds]int) {
	switch s {
	case aboutPipelines:
		v.rolls = choose(d, atHalfLife, atRandom)
	case aboutSpellings:
		v.keys, v.alternates, v.spelled = max(v.keys, 2*v.identities), false, true
		weights[change] += 4
	case aboutLies:
		v.vouched, v.ahead, v.drift = true, 0, 0
		weights[clockSet] += 6
	case aboutShort:
		v.form = choose(d, counted, misdated, misdated)
	case aboutBoots:
		weights[reboot] += 3
		weights[powerCut] += 3
	case aboutOutages:
		weights[backFault] += 8
	case aboutRenewals:
		weights[anew] += 6
	case aboutGuesses:
		v.vouched, v.ahead, v.form = false, choose(d, 40*time.Minute, 2*time.Hour, 3*day), choose(d, counted, uncounted,
			uncounted)
	case aboutForks:
		v.keyless = false
		for _, k := range []kind{reboot, powerCut, clockSet, diskFault, gone} { // what is drawn of these is enough
			weights[k] = 0
		}
	}
}

// events draws what happens in a life about s, and not in every other.
func (s subject) events(d drawing, v device) (all []event) {
	changes := func(times int, begin, lasts time.Duration, effects ...tokencache.Effect) {
		for range times {
			all = append(all, event{
				kind: change, on: begin + d.upTo(lasts), effect: choose(d,
					effects...), identity: d.IntN(v.identities + 1), resource: d.IntN(v.keys + 1),
			})
		}
	}
	begin := 10*time.Minute + d.upTo(v.lasts/2)
	switch s {
	case aboutFull:
		filled := event{kind: pipeline, on: begin, effect: choose(d, tokencache.Granted, tokencache.Changed),
			every: 30*time.Second + d.upTo(30*time.Second)}
		filled.identity, filled.resource = d.IntN(v.identities+1), d.IntN(v.keys+1)
		filled.span = time.Duration(tokencache.MaxChanges+d.IntN(200)) * filled.every
		all = append(all, filled)
		changes(10, begin, v.lasts-begin, tokencache.Revoked, tokencache.Revoked, tokencache.Granted)
	case aboutPipelines:
		changes(3, begin, time.Hour, tokencache.Revoked)
		all = append(all, event{kind: pipeline, on: begin, effect: tokencache.Granted,
			every: d.upTo(v.spread/2) + v.spread/3, span: 12*time.Hour + d.upTo(20*time.Hour)})
	case aboutShort:
		changes(4, begin, v.lasts-begin, tokencache.Revoked)
		for range 4 {
			all = append(all, event{kind: backFault, on: begin + d.upTo(v.lasts-begin), back: tellsShort,
				span: time.Minute + d.upTo(2*time.Hour)})
		}
	case aboutGuesses:
		changes(8, begin, v.lasts-begin, tokencache.Revoked, tokencache.Changed)
		for i := range all {
			all[i].dated, all[i].ago = true, d.upTo(choose(d, time.Minute, 12*time.Hour))
		}
	case aboutForks:
		boot := func(on time.Duration) {
			all = append(all, event{kind: choose(d, reboot, powerCut), on: on,
				span: 2*time.Minute + d.upTo(time.Minute), vouched: v.vouched, offset: v.ahead})
		}
		all = append(all, event{kind: diskFault, on: begin, disk: recordStuck, span: 10 * time.Minute})
		changes(3, begin, 8*time.Minute, tokencache.Granted, tokencache.Changed)
		boot(begin + 9*time.Minute)
		all = append(all, event{kind: diskFault, on: begin + 10*time.Minute, disk: noKey, span: time.Hour})
		changes(2, begin+15*time.Minute, 30*time.Minute, tokencache.Revoked)
		boot(begin + 70*time.Minute)
	}
	return all
}
