package source

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"perceptd/tokencache"
)

// Beside expires_in alone, a token's own exp is judged by the cache, and only while the device's clock is known to be
// right.
func TestOwnExpiryByAClockThatIsKnown(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		known bool
		ahead time.Duration // of the device's clock
		exp   time.Duration // from now, by the issuer's clock
		token bool
	}{
		{"good", true, 0, 24 * time.Hour, true},
		{"an hour ago, by a clock that is known", true, 0, -time.Hour, false},
		{"an hour ago, by one that is not", false, 0, -time.Hour, true},
		{"good, on a device three days ahead", false, 72 * time.Hour, 24 * time.Hour, true},
		{"good, on a device years behind", false, -3 * 365 * 24 * time.Hour, 24 * time.Hour, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			exp := time.Now().Add(test.exp).Unix()
			text := makeJWT(object{"exp": exp, "iat": exp - 86700, "nbf": exp - 86700})
			wall := func() time.Time { return time.Now().Add(test.ahead) }
			m := imds(t, func(w http.ResponseWriter, _ *http.Request) {
				fmt.Fprint(w, goodAnswer(time.Now()).with(object{"access_token": text, "expires_on": nil,
					"not_before": nil}))
			})
			m.transport.wall = wall
			cache := tokencache.New(tokencache.Options{Fetch: m.Fetch, Clock: tokencache.Clock{
				Wall: wall, Synchronised: func() bool { return test.known },
			}})
			t.Cleanup(cache.Close)
			got, err := cache.Get(t.Context(), system, tokencache.Need{})
			if !test.token {
				wantFailure(t, err, tokencache.Malformed, "expired")
				return
			}
			if err != nil || got.Left < 23*time.Hour {
				t.Errorf("%v left, %v", got.Left, err)
			}
		})
	}
}

// By the cache's own hand: a clock that is days ahead, and that nobody vouches for, keeps nobody from a token of an
// endpoint that tells the expiry alone.
func TestTokenOnADeviceThatIsAhead(t *testing.T) {
	t.Parallel()
	m := imds(t, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, goodAnswer(time.Now()).with(object{"expires_in": nil}))
	})
	m.transport.wall = func() time.Time { return time.Now().Add(72 * time.Hour) }
	for _, known := range []bool{false, true} {
		m.transport.clockTrusted = func() bool { return known }
		cache := tokencache.New(tokencache.Options{Fetch: m.Fetch, Clock: tokencache.Clock{
			Wall: m.transport.wall, Synchronised: func() bool { return known },
		}})
		t.Cleanup(cache.Close)
		got, err := cache.Get(t.Context(), system, tokencache.Need{})
		if known {
			wantFailure(t, err, tokencache.Malformed, "is the clock right?")
		} else if err != nil || got.Left <= 0 || got.Left > presumedLife {
			t.Errorf("%v left, %v", got.Left, err)
		}
	}
}
