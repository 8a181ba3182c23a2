package limit

import (
	"fmt"
	"time"
)

// TurnedAway is a connection for which there was no place, and the key that had taken the places.
type TurnedAway struct {
	Listener string
	Key      Key // of the connection
	Holder   Key // that has most of the places that the connection needed
	Holds    int
	Of       int       // places that Holder, or everybody together, may have
	Count    int64     // connections turned away since the start, this one included
	On       time.Time // by the device's clock

	at         time.Time // by this process's clock
	everyone   bool      // Of is what everybody together may have
	overBudget bool      // its caller connects more often than it may, and places had nothing to do with it
}

// Advice tells the caller that was turned away what to do. It names no other caller.
func (t *TurnedAway) Advice() string {
	if t.everyone {
		return fmt.Sprintf("all connections to the %s are in use: ask again in a moment", t.Listener)
	}
	return fmt.Sprintf("all %d connections that %s may have to the %s are in use: "+
		"keep fewer at once, and close those that are not needed", t.Of, t.Holder, t.Listener)
}

// Error is Advice: a connection was turned away.
func (t *TurnedAway) Error() string { return t.Advice() }

// String says it in a sentence.
func (t *TurnedAway) String() string {
	if t.overBudget {
		return fmt.Sprintf("connections to the %s are turned away: %s connects more often than it may",
			t.Listener, t.Key)
	}
	many := fmt.Sprintf("which is all that it may have (%d)", t.Of)
	if t.everyone {
		many = fmt.Sprintf("of %d for all", t.Of)
	}
	return fmt.Sprintf("connections to the %s are turned away (the last of %s): %s holds %d, %s",
		t.Listener, t.Key, t.Holder, t.Holds, many)
}

const (
	// reportEvery is how often it is reported that connections are turned away.
	reportEvery = time.Minute

	// TroubleTime is how long after the last connection was turned away that is still trouble.
	TroubleTime = 5 * time.Minute
)

// turnedAways counts the connections of one kind of listener that were turned away.
type turnedAways struct {
	count    int64
	last     TurnedAway
	reported time.Time
}

// add counts one, and reports whether that is to be reported: it was not lately.
func (a *turnedAways) add(one *TurnedAway) (report bool) {
	a.count++
	one.Count = a.count
	a.last = *one
	if !a.reported.IsZero() && one.at.Sub(a.reported) < reportEvery {
		return false
	}
	a.reported = one.at
	return true
}

// trouble is a sentence on the last connection that was turned away, or empty when that was long ago.
func (a *turnedAways) trouble(now time.Time) string {
	if a.count == 0 || now.Sub(a.last.at) >= TroubleTime {
		return ""
	}
	return a.last.String()
}
