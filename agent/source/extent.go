package source

import (
	"crypto/tls"
	"errors"
	"net"
	"time"

	"perceptd/tokencache"
)

// extentOf tells how much a failed round trip says: where no connection came about, whatever was asked for would have failed.
func extentOf(err error) tokencache.Extent {
	var (
		cert  *tls.CertificateVerificationError
		alert tls.AlertError
		dns   *net.DNSError
		op    *net.OpError
		slow  net.Error // to connect: the fetch's own deadline is looked at before
	)
	switch {
	case errors.As(err, &cert), errors.As(err, &alert), errors.As(err, &dns),
		errors.As(err, &op) && op.Op == "dial",
		errors.As(err, &slow) && slow.Timeout():
		return tokencache.OfSource
	}
	return tokencache.OfKey
}

// overError says that the life of the token in an answer is over.
type overError struct {
	ago  time.Duration // since its end, as the back end counted it
	on   time.Time     // its end, by the issuer's clock; zero: not told
	text string
}

func (e *overError) Error() string { return e.text }

// unusable is the failure of an answer that cannot be used, which was received at the wall time now.
func (at place) unusable(err error, now time.Time) *tokencache.FetchError {
	failed := malformed("the answer of %s cannot be used: %v", at.dial, err)
	var over *overError
	if errors.As(err, &over) {
		told := over.on.IsZero() || now.Sub(over.on) <= tokencache.JustExpired
		failed.JustExpired = told && over.ago <= tokencache.JustExpired
	}
	return failed
}
