package tokencache

import (
	"math"
	"time"
)

const (
	defaultNominal = 24 * time.Hour
	longestNominal = 28*time.Hour + 5*time.Minute // 28 h are known; tokens are dated back by 5 minutes

	shortLived  = 2 * time.Hour   // below this, half of the life leaves too little slack
	lastMinutes = 5 * time.Minute // before an expiry every retry counts; the SDKs' own margin

	refreshFloor = 30 * time.Second // tokens that live no longer are fetched when a caller asks
	nextTryFloor = 5 * time.Minute  // a shorter wait is not worth a call: then the expiry itself is tried
	afterExpiry  = time.Second      // a back end may roll over only when the token has expired
	backoffFloor = time.Second
	backoffTop   = 5 * time.Minute
	longTop      = time.Hour // where only an administrator heals it
	urgentTop    = 5 * time.Second
	noToken      = time.Duration(longAgo) // what is left of a token that is not there: no expiry is near
	retryAfter   = 5 * time.Minute        // the longest Retry-After that is obeyed
)

// jitter returns d ±10 % for a roll in [0, 1), so that the devices of a fleet do not all ask at once.
func jitter(d time.Duration, roll float64) time.Duration {
	return time.Duration(float64(d) * (0.9 + 0.2*roll))
}

// firstRefresh returns how long after its receipt a token with that much life left is first refreshed: when the back
// end advises it, else at half of its life, or at 80 % of a short one.
func firstRefresh(left, advised time.Duration, roll float64) time.Duration {
	wait := jitter(left/2, roll)
	switch {
	case advised > 0 && advised < left:
		wait = advised
	case left < shortLived:
		wait = jitter(left*8/10, roll)
	}
	return max(wait, refreshFloor)
}

// nextTry returns how long to wait after the back end gave the held token again. Each try halves what is left. So a
// token costs about eight of them, and the last comes just after the expiry.
func nextTry(left time.Duration, roll float64) time.Duration {
	if wait := jitter(left/2, roll); wait >= nextTryFloor {
		return wait
	}
	return left + afterExpiry
}

// doubled returns first, doubled with each further of n times (at least one), but no more than top.
func doubled(first time.Duration, n int, top time.Duration) time.Duration {
	if doublings := n - 1; doublings < 16 {
		return min(top, first<<doublings)
	}
	return top
}

// backoff returns how long to wait after that many failures in a row (at least one). left is the life left of the held
// token, negative after its expiry. The wait doubles from 1 s to 5 minutes with full jitter. It is 5 s at most around
// an expiry, and never so long that the last minutes are missed.
func backoff(failures int, left time.Duration, roll float64) time.Duration {
	top := backoffTop
	if left > -lastMinutes && left < lastMinutes {
		top = urgentTop
	}
	top = doubled(backoffFloor, failures, top)
	return untilLastMinutes(max(backoffFloor, time.Duration(roll*float64(top))), left)
}

// longBackoff is backoff for what only an administrator can heal: from 1 s doubling to 30 to 60 minutes, also around an
// expiry.
func longBackoff(failures int, left time.Duration, roll float64) time.Duration {
	top := doubled(backoffFloor, failures, longTop)
	return untilLastMinutes(max(backoffFloor, top/2+time.Duration(roll*float64(top/2))), left)
}

// untilLastMinutes shortens a wait that would leave a token with that much life left too little of it.
func untilLastMinutes(wait, left time.Duration) time.Duration {
	if left < lastMinutes {
		return wait
	}
	return min(wait, max(backoffFloor, left-lastMinutes))
}

// askWait returns how long callers' misses cause no fetch after asks of theirs failed in a row, the last with err.
func askWait(err *FetchError, asks int, left time.Duration) time.Duration {
	switch {
	case asks == 0:
		return 0
	case err.lasts():
		return doubled(askFirst, asks, askLongTop)
	case err.Kind == Throttled:
		return doubled(askFirst, asks, askThrottleTop)
	case left.Abs() < lastMinutes:
		return doubled(askFirst, asks, urgentTop)
	case err.extent() == OfSource:
		return doubled(askFirst, asks, askSourceTop)
	}
	return doubled(askFirst, asks, askTop)
}

// watchStep is how long to wait between probes of a stale token while its rollover is not expected.
const watchStep = time.Hour

// probeInterval returns how long to wait between probes of a stale token while its rollover may come at any moment
// until its expiry. Probing more often towards the expiry finds the rollover soonest for the calls it takes. The best
// interval is inversely proportional to the root of the odds that it comes just then, and these grow as the life left
// shrinks.
func probeInterval(left time.Duration, roll float64) time.Duration {
	step := time.Duration(float64(probeScale) * math.Sqrt(max(0, left.Hours())))
	return jitter(min(max(step, probeFloor), probeTop), roll)
}

const (
	probeScale = 225 * time.Second // for the root of an hour left
	probeFloor = 2 * time.Minute
	probeTop   = 20 * time.Minute
)
