package server

import (
	"fmt"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/tokencache"
)

// policyChanges answers GET /v1/policy-changes.
func (s *Server) policyChanges(x *exchange) *fault {
	if f := noQuery(x); f != nil {
		return f
	}
	x.body = encode(api.PolicyChanges{Now: s.now(), Changes: policyChanges(s.Agent.Changes())})
	return nil
}

// changeBody is an api.PolicyChangeRequest before its time is read.
type changeBody struct {
	Resource     string     `json:"resource"`
	AllResources bool       `json:"all_resources"`
	Identity     string     `json:"identity"`
	At           *string    `json:"at"`
	Effect       api.Effect `json:"effect"`
	Note         string     `json:"note"`
}

// notePolicyChange answers POST /v1/policy-changes.
func (s *Server) notePolicyChange(x *exchange) *fault {
	body, f := readBody[changeBody](x)
	if f != nil {
		return f
	}
	change := agent.Change{
		Resource: body.Resource, AllResources: body.AllResources, Identity: body.Identity,
		Effect: effectOf(body.Effect), Note: body.Note,
	}
	if body.At != nil {
		if change.At, f = readTime("at", *body.At); f != nil {
			return f
		}
	}
	noted, err := s.Agent.NoteChange(x.caller.String(), change)
	if err != nil {
		return faultOf(err)
	}
	x.body = encode(api.PolicyChangeAnswer{PolicyChange: policyChange(noted), Now: s.now()})
	return nil
}

// withdrawPolicyChange answers DELETE /v1/policy-changes?id=ID.
func (s *Server) withdrawPolicyChange(x *exchange) *fault {
	if f := x.query.parse(x.raw); f != nil {
		return f
	}
	id, ok := x.query.get("id")
	if !ok || id == "" || x.query.count != 1 {
		return badRequest("the id parameter, and no other, says which policy change is withdrawn: GET " + api.PathPolicyChanges + " lists them")
	}
	was, err := s.Agent.WithdrawChange(x.caller.String(), id)
	if err != nil {
		return faultOf(err)
	}
	x.body = encode(api.PolicyChangeAnswer{PolicyChange: policyChange(was), Now: s.now()})
	return nil
}

// readTime reads a time of a body's field.
func readTime(field, text string) (time.Time, *fault) {
	var at time.Time
	if err := at.UnmarshalText([]byte(text)); err != nil {
		return time.Time{}, badRequest(fmt.Sprintf(
			"field %q is %.64q: write a time with its zone as 2026-11-23T14:30:00Z or 2026-11-23T15:30:00+01:00", field, text))
	}
	return at, nil
}

// effectOf returns the effect that is so called, or none, which the agent refuses.
func effectOf(name api.Effect) tokencache.Effect {
	for _, effect := range []tokencache.Effect{tokencache.Granted, tokencache.Revoked, tokencache.Changed} {
		if string(name) == effect.String() {
			return effect
		}
	}
	return 0
}

func policyChanges(all []agent.NotedChange) []api.PolicyChange {
	list := make([]api.PolicyChange, len(all))
	for i, c := range all {
		list[i] = policyChange(c)
	}
	return list
}

func policyChange(c agent.NotedChange) api.PolicyChange {
	p := api.PolicyChange{
		ID: c.ID, Resource: c.Resource, Identity: c.Identity, At: c.At,
		Effect: api.Effect(c.Effect.String()), // the same words
		Note:   c.Note, NotedOn: c.NotedOn, Unsure: c.Unsure, AsOfNote: c.AsOfNote, Joined: c.Joined, EndsOn: c.EndsOn,
		Touched: c.Touched, Waiting: c.Waiting,
	}
	if c.Record != 0 { // which is no revocation, though it may withhold as much
		p.Record, p.Mend = map[agent.RecordState]api.RecordState{agent.RecordLost: api.RecordLost, agent.RecordUnread: api.RecordUnread}[c.Record], c.Mend
		p.Effect, p.Withholds = api.EffectUnknown, c.Effect == tokencache.Revoked
	}
	return p
}
