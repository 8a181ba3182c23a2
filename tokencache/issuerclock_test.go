package tokencache

import (
	"testing"
	"time"
)

// What is handed out bounds the issuer's clock from below by its date, unless that is none.
func TestDateThatIsNoneBoundsNoClock(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for _, row := range []struct {
		name   string
		issued time.Time
		sure   bool
		want   time.Time
	}{
		{"a date", noon.Add(-time.Hour), true, noon.Add(-time.Hour)},
		{"later than the receipt", noon.Add(time.Hour), true, time.Time{}},
		{"later than the expiry", noon.Add(25 * time.Hour), false, time.Time{}},
		{"none", time.Time{}, true, time.Time{}},
	} {
		var k issuerClock
		f := Fetched{Token: Token{ExpiresOn: noon.Add(24 * time.Hour), Claims: Claims{IssuedAt: row.issued}},
			Left: 24 * time.Hour, Counted: row.sure}
		k.learn(f, issueWindowOf(f.Token, f.Left, row.sure), noon, 0, 0)
		if !k.floor.Equal(row.want) {
			t.Errorf("%s: %v, want %v", row.name, k.floor, row.want)
		}
	}
}
