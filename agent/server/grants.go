package server

import (
	"errors"
	"fmt"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/grants"
)

// whoAmI answers GET /v1/whoami, also to a caller that could not be proved: this path says why.
func (s *Server) whoAmI(req *request) *apiError {
	if e := noQuery(req); e != nil {
		return e
	}
	answer := api.WhoAmI{
		Proved: req.unattested == nil, Caller: callerOf(&req.caller), Grants: []api.Grant{}, Now: api.Time(s.now()),
	}
	if req.unattested != nil {
		answer.Unattested = unattestedOf(req.unattested)
		req.body = encode(answer)
		return nil
	}
	if why := s.Agent.WhyNothing(req.caller); why != nil {
		answer.Refused, answer.Code = why.Detail, why.Code
	}
	for _, g := range s.Agent.GrantsFor(req.caller) {
		grant := grantForCaller(&g)
		for _, resource := range grant.Resources {
			if s.isDenied(req.caller, grants.Request{Identity: grant.Identity, Resource: resource}) {
				grant.Denied = append(grant.Denied, resource)
			}
		}
		answer.Grants = append(answer.Grants, grant)
	}
	answer.Denials = s.Agent.DenialsOf(req.caller)
	req.body = encode(answer)
	return nil
}

// isDenied reports whether deny rules take a token away that a grant allows.
func (s *Server) isDenied(caller grants.Caller, r grants.Request) bool {
	_, refusal := s.Agent.Decide(caller, r)
	return refusal != nil && (refusal.Code == api.CodeDenied || refusal.Code == api.CodeDenyRulesLost)
}

func unattestedOf(err error) *api.Unattested {
	var why *attest.Error
	if errors.As(err, &why) {
		return &api.Unattested{What: why.What, Why: why.Why, Hint: why.Hint}
	}
	return &api.Unattested{What: err.Error()}
}

func callerOf(c *grants.Caller) api.Caller {
	caller := api.Caller{Module: c.Module, Unit: c.Unit, Groups: emptyIfNil(c.Groups), PID: c.PID, Nested: c.Nested}
	if c.UID != grants.NoID {
		caller.UID, caller.GID = &c.UID, &c.GID
	}
	if c.Container != nil {
		caller.Container = &api.Container{
			ID: c.Container.ID, Name: c.Container.Name, Image: c.Container.Image, Digest: c.Container.Digest,
			RepoDigests: c.Container.RepoDigests, EdgeModule: c.Container.EdgeModule,
			StartedOn: api.Time(c.Container.StartedOn),
		}
	}
	if !c.HasUser() {
		return caller // names of this device's users are not theirs
	}
	if account, err := user.LookupId(strconv.FormatUint(uint64(c.UID), 10)); err == nil {
		caller.User = account.Username
	}
	if group, err := user.LookupGroupId(strconv.FormatUint(uint64(c.GID), 10)); err == nil {
		caller.Group = group.Name
	}
	return caller
}

// grantForCaller is a grant as one that it decides about may know it. Of a faulty one that may be for another caller it
// has the place alone, without the folder, so that an administrator finds it.
func grantForCaller(g *grants.Ref) api.Grant {
	grant := grantOf(g)
	grant.Place = grants.WithoutFolder(g.Place)
	switch {
	case g.Fault == "":
		grant.Place = ""
	case g.Unclear != 0:
		return api.Grant{Number: grant.Number, Place: grant.Place, Caller: "not understood", Resources: []string{},
			Fault: "whom it is for is not understood: an administrator mends it"}
	}
	return grant
}

func grantOf(g *grants.Ref) api.Grant {
	return api.Grant{
		Number: g.Index + 1, Place: g.Place, Caller: g.For(),
		Identity: g.Identity, Resources: emptyIfNil(g.Resources), Prefetch: g.Prefetch, Fault: g.Fault,
	}
}

// grants answers GET /v1/grants.
func (s *Server) grants(req *request) *apiError {
	if e := noQuery(req); e != nil {
		return e
	}
	answer := api.Grants{Grants: []api.Grant{}, Now: api.Time(s.now()), NoConfiguration: s.Agent.WhyNoRules()}
	if status := s.Agent.DenyStatus(); len(status.Rules) > 0 || status.IsLost() || status.AreMissing() {
		answer.Deny = &status
	}
	for _, g := range s.Agent.Grants() {
		grant := grantOf(&g)
		for _, resource := range grant.Resources {
			ids, all := s.Agent.DeniedOfGrant(g, resource)
			switch {
			case all:
				grant.Denied = append(grant.Denied, resource)
			case len(ids) > 0:
				grant.MayBeDenied = append(grant.MayBeDenied, resource)
			}
			grant.DeniedBy = append(grant.DeniedBy, ids...)
		}
		slices.Sort(grant.DeniedBy)
		grant.DeniedBy = slices.Compact(grant.DeniedBy)
		answer.Grants = append(answer.Grants, grant)
	}
	req.body = encode(answer)
	return nil
}

// checkGrants answers GET /v1/grants/check: the decision that a caller would meet, without one.
func (s *Server) checkGrants(req *request) *apiError {
	if e := req.query.parse(req.raw); e != nil {
		return e
	}
	who, request, e := readCheck(&req.query)
	if e != nil {
		return e
	}
	d, refusal := s.Agent.Decide(who, request)
	if refusal != nil && refusal.Code == api.CodeBadRequest {
		return errorOf(refusal)
	}
	answer := api.Decision{
		Allowed: d.Allowed, Identity: d.Identity, Reason: d.Reason, Considered: []api.ConsideredGrant{},
	}
	if refusal != nil {
		answer.Code = refusal.Code
	}
	answer.NearMiss = agent.NearMissOf(d.NearMiss, false)
	if d.Denial != nil {
		answer.Suggestion = agent.SuggestionOf(d.Denial.Suggestion, false)
	}
	if d.Grant != nil {
		g := grantOf(d.Grant)
		answer.Grant = &g
	}
	for i := range d.Evaluations {
		e := &d.Evaluations[i]
		answer.Considered = append(answer.Considered,
			api.ConsideredGrant{Grant: grantOf(&e.Ref), Decides: e.Decides, Why: e.Why})
	}
	req.body = encode(answer)
	return nil
}

// readCheck reads the parameters of GET /v1/grants/check. A service has a user and groups as well, so that
// unit, uid and gid may stand together, and a module's container has an image.
func readCheck(q *query) (grants.Caller, grants.Request, *apiError) {
	who := grants.Caller{UID: grants.NoID, GID: grants.NoID}
	var request grants.Request
	var known []grants.Match
	fail := func(detail string) (grants.Caller, grants.Request, *apiError) {
		return grants.Caller{}, grants.Request{}, badRequest(detail)
	}
	for _, p := range q.list[:q.count] {
		switch p.name {
		case "resource":
			request.Resource = api.FullResource(p.value)
		case "identity":
			request.Identity = p.value
		case "module":
			who.Module = p.value
			known = append(known, grants.Match{Module: p.value})
		case "unit":
			who.Unit = grants.UnitName(p.value)
			known = append(known, grants.Match{Unit: who.Unit})
		case "container_image":
			who.Container = grants.ContainerOf(p.value)
			known = append(known, grants.Match{Image: p.value})
		case "uid":
			id, ok := parseID(p.value)
			if !ok {
				return fail(fmt.Sprintf("uid is %q: it must be a number", p.value))
			}
			who.UID = id
			known = append(known, grants.Match{UID: &id})
		case "gid": // its own, and then the others
			for i, one := range strings.Split(p.value, ",") {
				id, ok := parseID(one)
				if !ok {
					return fail(fmt.Sprintf(
						"gid is %q: it must be a number, or several with commas between them", p.value))
				}
				if i == 0 {
					who.GID = id
				} else {
					who.Groups = append(who.Groups, id)
				}
				known = append(known, grants.Match{GID: &id})
			}
		default:
			return fail(fmt.Sprintf("query parameter %q is not known here: "+
				"resource, identity, module, unit, container_image, uid and gid are", p.name))
		}
	}
	for _, m := range known {
		if err := m.Check(); err != nil {
			return fail(err.Error())
		}
	}
	inside := who.Module != "" || who.Container != nil
	outside := who.Unit != "" || who.UID != grants.NoID || who.GID != grants.NoID
	switch {
	case len(known) == 0:
		return fail("nothing says who would be calling: give module, unit, container_image, uid or gid")
	case inside && outside:
		return fail("unit, uid and gid may stand together, and so may module and container_image: " +
			"in a container the others say nothing")
	}
	return who, request, nil
}

// parseID reads a uid or gid.
func parseID(text string) (uint32, bool) {
	id, err := strconv.ParseUint(text, 10, 32)
	return uint32(id), err == nil && uint32(id) != grants.NoID
}
