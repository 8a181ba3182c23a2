package server

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/source"
	"perceptd/tokencache"
)

// However long the claims are that the back end gives, a client takes the status: every key has a token, and another one before it.
func TestTheLargestStatusIsAnAnswer(t *testing.T) {
	t.Parallel()
	claims := func(size int) tokencache.Claims {
		payload := make(map[string]any)
		for _, name := range []string{"groups", "roles", "wids"} {
			payload[name] = []string{strings.Repeat("x", size)}
		}
		for _, name := range []string{"iss", "aud", "appid", "oid", "tid", "xms_mirid"} {
			payload[name] = strings.Repeat("x", size)
		}
		text, err := json.Marshal(payload)
		if err != nil {
			t.Fatal(err)
		}
		return source.Claims(tokencache.NewSecret("a." + base64.RawURLEncoding.EncodeToString(text) + ".c"))
	}
	if huge := claims(10_000); len(huge.Omitted) != 9 || huge.ObjectID+huge.Issuer != "" || huge.Groups != nil {
		t.Errorf("%d bytes are kept of claims that are too long", len(encode(claimsOf(huge))))
	}
	largest := claims(1000)
	lists := claims(8<<10 - len(`"",`))
	if largest.Groups, largest.Roles, largest.WIDs = lists.Groups, lists.Roles, lists.WIDs; largest.Groups == nil || largest.Issuer == "" {
		t.Fatalf("claims that are just short enough are not kept: %v", lists.Omitted)
	}
	long, now := strings.Repeat(`"`, 512), time.Now()
	key := agent.KeyStatus{Identity: long, Refused: now, Status: tokencache.Status{
		Key: tokencache.Key{Resource: long}, SHA256: strings.Repeat("0", 64), ReceivedOn: now, ExpiresOn: now, Left: time.Hour, NextRefresh: now,
		LastFetch: now, LastOutcome: tokencache.Failed, LastError: &tokencache.FetchError{Detail: long}, Claims: largest, Before: &largest,
		Expected: now, HeldUntil: now, Minted: tokencache.Minting{Earliest: now, Latest: now},
		Permissions: tokencache.Permissions{Standing: tokencache.Stale, Changed: now, CurrentBy: now, Likely: now, Withheld: true},
	}}
	change := agent.NotedChange{Identity: long, Noted: tokencache.Noted{PolicyChange: tokencache.PolicyChange{
		ID: long[:64], Resource: long, Note: long[:256], At: now, NotedOn: now, Effect: tokencache.Revoked, Joined: 1,
	}, EndsOn: now}}
	var status api.Status
	for range tokencache.MaxKeys {
		status.Tokens, status.Trouble = append(status.Tokens, tokenStatus(key)), append(status.Trouble, long)
	}
	for range tokencache.MaxChanges {
		status.Changes = append(status.Changes, policyChange(change))
	}
	if text := encode(status); len(text) > api.MaxAnswer || len(text) < api.MaxAnswer/2 {
		t.Errorf("it has %d bytes", len(text))
	}
}
