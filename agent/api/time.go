package api

import "time"

// Time returns t as times are on the wire: in UTC and whole seconds, which are written as RFC 3339 has them. There are
// no others in the bodies of the /v1 form and the admin socket.
func Time(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }
