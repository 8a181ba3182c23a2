package tokencache

import (
	"testing"
	"time"
)

func TestIssuedBefore(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	byExpiry := func(expires time.Time) Token { return Token{ExpiresOn: expires} }
	byClaim := func(issued, expires time.Time) Token {
		return Token{ExpiresOn: expires, Claims: Claims{IssuedAt: issued}}
	}
	issued := func(t Token) IssueWindow { return issueWindowOf(t, t.ExpiresOn.Sub(noon), true) } // as received at noon
	const hour = time.Hour
	for _, row := range []struct {
		name        string
		t, o        Token
		life, oLife time.Duration
		want        bool
	}{
		{"earlier expiry, same life", byExpiry(noon), byExpiry(noon.Add(time.Second)), 24 * time.Hour, 24 * time.Hour,
			true},
		{"later expiry, longer life", byExpiry(noon.Add(time.Hour)), byExpiry(noon), 28 * time.Hour, 24 * time.Hour,
			true},
		{"the same", byExpiry(noon), byExpiry(noon), 24 * time.Hour, 24 * time.Hour, false},
		{"dates decide", byClaim(noon, noon.Add(2*hour)), byClaim(noon.Add(-hour), noon.Add(20*hour)), 24 * hour,
			24 * hour, false},
		{"the earlier date", byClaim(noon.Add(-hour), noon.Add(20*hour)), byClaim(noon, noon.Add(2*hour)), 24 * hour,
			24 * hour, true},
		{"a date on one side, that of the other by its expiry", byClaim(noon, noon.Add(24*hour)),
			byExpiry(noon.Add(25 * hour)), 24 * hour, 24 * hour, true},
		{"a date that is none, later than the expiry", byClaim(noon.Add(30*hour), noon.Add(24*hour)),
			byClaim(noon.Add(hour), noon.Add(25*hour)), 24 * hour, 24 * hour, true},
		{"a date that is none, later than the receipt", byClaim(noon.Add(12*hour), noon.Add(24*hour)),
			byClaim(noon.Add(hour), noon.Add(25*hour)), 12 * hour, 24 * hour, true},
	} {
		if got := issuedBefore(row.t, issued(row.t), row.life, row.o, issued(row.o), row.oLife); got != row.want {
			t.Errorf("%s: %v, want %v", row.name, got, row.want)
		}
	}
}

func TestIssueWindowOf(t *testing.T) {
	t.Parallel()
	issued := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	token := func(dated time.Time, notBefore time.Time, life time.Duration) Token {
		return Token{ExpiresOn: issued.Add(life), NotBefore: notBefore, Claims: Claims{IssuedAt: dated}}
	}
	back := issued.Add(-backdated)
	for _, row := range []struct {
		name     string
		token    Token
		left     time.Duration
		from, to time.Duration // from issued
		unsure   bool
	}{
		{"as Entra dates them", token(back, time.Time{}, 24*time.Hour), 20 * time.Hour, -issueSlack, issueSlack, false},
		{"by not_before alone", token(time.Time{}, back, 24*time.Hour), 20 * time.Hour, -issueSlack, issueSlack, false},
		{"28 hours", token(back, time.Time{}, 28*time.Hour), 20 * time.Hour, -issueSlack, issueSlack, false},
		{"more left than that life allows", token(back, time.Time{}, 24*time.Hour), 24*time.Hour + time.Minute,
			-backdated, issueSlack, false},
		{"not dated back", token(issued, time.Time{}, 24*time.Hour), 20 * time.Hour, 0, backdated + issueSlack, false},
		{"opaque", token(time.Time{}, time.Time{}, 24*time.Hour), 20 * time.Hour, 24*time.Hour - longestNominal,
			4 * time.Hour, false},
		{"dated after its expiry", token(issued.Add(48*time.Hour), time.Time{}, 24*time.Hour), 20 * time.Hour,
			24*time.Hour - longestNominal, 4 * time.Hour, false},
		{"opaque, its life not counted", token(time.Time{}, time.Time{}, 24*time.Hour), 20 * time.Hour,
			24*time.Hour - longestNominal, 24 * time.Hour, true},
		{"dated two minutes after its receipt: two clocks", token(issued.Add(2*time.Minute), time.Time{}, 24*time.Hour),
			24 * time.Hour, 2 * time.Minute, 7*time.Minute + issueSlack, false},
		{"dated later than its receipt", token(issued.Add(121*time.Second), time.Time{}, 24*time.Hour), 24 * time.Hour,
			24*time.Hour - longestNominal, 0, false},
		{"dated so that no life is left, and received just before its end",
			token(issued.Add(24*time.Hour-time.Second), time.Time{},
				24*time.Hour), time.Minute, 24*time.Hour - longestNominal, 24*time.Hour - time.Minute, false},
		{"dated later than a receipt that nobody knows", token(back, time.Time{}, 24*time.Hour), 30 * time.Hour,
			-backdated, issueSlack, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			got := issueWindowOf(row.token, row.left, !row.unsure)
			if from, to := got.Earliest.Sub(issued), got.Latest.Sub(issued); from != row.from || to != row.to {
				t.Errorf("from %v to %v after the minting, want %v to %v", from, to, row.from, row.to)
			}
		})
	}
}

func TestLifeOf(t *testing.T) {
	t.Parallel()
	now := time.Now()
	lived := func(t Token, left time.Duration) time.Duration { return lifeOf(t, issueWindowOf(t, left, true), left) }
	dated := Token{ExpiresOn: now, Claims: Claims{IssuedAt: now.Add(-28*time.Hour - backdated)}}
	if got := lived(dated, time.Hour); got != 28*time.Hour {
		t.Errorf("dated: %v", got)
	}
	if got := lived(Token{ExpiresOn: now}, time.Hour); got != 24*time.Hour {
		t.Errorf("opaque: %v", got)
	}
	if got := lived(Token{ExpiresOn: now}, 26*time.Hour); got != 26*time.Hour {
		t.Errorf("opaque and long: %v", got)
	}
	short := Token{ExpiresOn: now, Claims: Claims{IssuedAt: now.Add(-70 * time.Minute)}}
	if got := lived(short, 40*time.Minute); got != 65*time.Minute {
		t.Errorf("short: %v", got)
	}
}
