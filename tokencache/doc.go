// Package tokencache keeps the token of each key fresh and hands it to whoever asks.
//
// It guarantees that a valid token is served without waiting for the back end; that however many
// callers ask, a key has one fetch under way at a time; that a source sees at most two calls at once
// and five a second; and that no token is served past its expiry. It is made for a back end that
// itself caches each token for around 24 hours: a refresh that brings the same token again is no
// failure, and the next one is planned so that few calls are spent on finding the newer one.
//
// It knows the policy changes on record, and how each token stands to them: current, stale or uncertain.
// No token is called current on a guess, and none that is not is served after a revocation. One that is
// not current is followed by its successor as soon as the back end hands it out, by what was learnt of
// when that is.
//
// Whoever makes a Cache gives it a function that fetches and, where Go's own clock will not do, a
// Clock; and closes it in the end. The package knows no network, no file, no log and no Azure.
package tokencache
