// Package tokencache keeps the token of each key fresh and hands it to callers.
//
// It guarantees that a valid token is served without waiting for the back end; that a key has one fetch under way at a
// time, however many callers ask; that a source sees at most two calls at once and five a second; and that no token is
// served past its expiry. It is made for a back end that caches each token itself for around 24 hours: a refresh that
// brings the same token again is not a failure, and the next one is planned so that few calls find the newer token.
//
// It knows the policy changes on record, and whether each token carries them: current, stale or uncertain. It never
// guesses that a token is current, and after a revocation it serves no token that is not. A token that is not current
// is replaced as soon as the back end hands out the next one, by what was learned of when that is.
//
// A Cache is made with a function that fetches and, if Go's own clock will not do, a Clock. Close it in the end. The
// package knows no network, no file, no log and no Azure.
package tokencache
