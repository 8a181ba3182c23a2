package agent

import (
	"time"

	"perceptd/agent/api"
	"perceptd/tokencache"
)

// permissionsOf returns what the cache knows of a token's permissions as it is on the wire.
func permissionsOf(p tokencache.Permissions) api.Permissions {
	return api.Permissions{
		State: p.State, Changed: api.Time(p.Changed), CurrentBy: api.Time(p.CurrentBy), Likely: api.Time(p.Likely),
		Withheld: p.Withheld,
	}
}

func claimsOf(c tokencache.Claims) api.TokenClaims {
	return api.TokenClaims{
		Issuer: c.Issuer, Audience: c.Audience, ClientID: c.ClientID, ObjectID: c.ObjectID, TenantID: c.TenantID,
		Groups: c.Groups, Roles: c.Roles, WIDs: c.WIDs, Omitted: c.Omitted,
	}
}

func tokenStatusOf(key cachedKey) api.TokenStatus {
	status := api.TokenStatus{
		Identity:    key.identity,
		Resource:    key.Key.Resource,
		State:       key.State,
		Prefetch:    key.Prefetch,
		SHA256:      key.SHA256,
		ReceivedOn:  api.Time(key.ReceivedOn),
		ExpiresOn:   api.Time(key.ExpiresOn),
		ExpiresIn:   int64(key.Left / time.Second),
		NextRefresh: api.Time(key.NextRefresh),
		LastFetch:   api.Time(key.LastFetch),
		LastOutcome: key.LastOutcome,
		Failures:    key.Failures,
		Fetches:     key.Fetches,
		Served:      key.Served,
		Life:        int64(key.Life / time.Second),
		Former:      key.Former,
		HeldUntil:   api.Time(key.HeldUntil),
		Refused:     api.Time(key.refused),
		Rollover: api.RolloverStatus{
			Pattern:  key.Pattern.Kind,
			Seen:     key.Seen,
			Age:      int64(key.Pattern.Age / time.Second),
			Expected: api.Time(key.Expected),
		},
	}
	status.Changes, status.MoreChanges = []api.TokenChange{}, key.MoreChanges
	for _, v := range key.Changes {
		status.Changes = append(status.Changes, api.TokenChange(v))
	}
	if key.Left > 0 {
		claims := claimsOf(key.Claims)
		status.Unconfirmed = key.Unconfirmed
		status.Permissions = permissionsOf(key.Permissions)
		status.IssuedFrom, status.IssuedTo = api.Time(key.Issued.Earliest), api.Time(key.Issued.Latest)
		status.Claims = &claims
	}
	if ended := key.Ended; !ended.From.IsZero() {
		status.Ended = &api.EndedStretch{From: api.Time(ended.From), To: api.Time(ended.To), State: ended.State,
			Withheld: ended.Withheld}
	}
	if key.Before != nil {
		before := claimsOf(*key.Before)
		status.Before = &before
	}
	if key.LastError != nil {
		status.LastError = key.LastError.Error()
	}
	return status
}

// describeChange returns a policy change on record as it is on the wire. What stands for the record itself is no
// revocation there, though it may withhold as much.
func (a *Agent) describeChange(r tokencache.RecordedChange) api.PolicyChange {
	c := api.PolicyChange{
		ID: r.ID, Resource: r.Resource, Identity: a.rules.Load().nameOf(r.PolicyChange), At: api.Time(r.At),
		Effect: r.Effect, Note: r.Note, RecordedOn: api.Time(r.RecordedAt), EndsOn: api.Time(r.EndsOn),
		Unsure: r.Unsure, AsOfRecording: r.AsOfRecording, Joined: r.Joined, Touched: r.Touched, Waiting: r.Waiting,
	}
	if c.Record, c.Mend = a.changeSaver.recordState(r.PolicyChange); c.Record != "" {
		c.Effect, c.Withholds = api.EffectUnknown, r.Effect == tokencache.Revoked
	}
	return c
}

func clockStatusOf(c tokencache.ClockStatus) api.ClockStatus {
	status := api.ClockStatus{Known: c.Trusted}
	if c.Counted {
		skew := int64(c.Skew / time.Second)
		status.Skew = &skew
	}
	return status
}
