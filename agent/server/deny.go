package server

import (
	"net/http"

	"perceptd/agent/api"
)

// denyRules answers GET /v1/deny.
func (s *Server) denyRules(req *request) *apiError {
	if e := noQuery(req); e != nil {
		return e
	}
	req.body = encode(s.denyRulesNow())
	return nil
}

func (s *Server) denyRulesNow() api.DenyRules {
	return api.DenyRules{Now: api.Time(s.now()), DenyStatus: s.Agent.DenyStatus()}
}

// deny answers POST /v1/deny.
func (s *Server) deny(req *request) *apiError {
	text, e := readText(req)
	if e != nil {
		return e
	}
	body, e := decodeBody[api.DenyRequest](text)
	if e != nil {
		return e
	}
	if err := api.CheckFilled(text, false); err != nil {
		return badBody(err)
	}
	body.Resource = api.FullResource(body.Resource)
	rule, err := s.Agent.Deny(req.caller.String(), api.DenySide{Origin: api.DenyLocal}, body)
	return s.answerDeny(req, rule, err)
}

// liftDeny answers DELETE /v1/deny?id=ID.
func (s *Server) liftDeny(req *request) *apiError {
	id, e := readID(req, "deny rule is lifted", api.PathDeny)
	if e != nil {
		return e
	}
	was, err := s.Agent.LiftDeny(req.caller.String(), api.DenySide{Origin: api.DenyLocal}, id)
	return s.answerDeny(req, was, err)
}

// answerDeny answers with a rule that was added, or lifted. So does the error that it is not on the disk.
func (s *Server) answerDeny(req *request, rule api.DenyRule, err error) *apiError {
	answer := api.DenyAnswer{DenyRule: rule, Now: api.Time(s.now())}
	if err != nil {
		e := errorOf(err)
		if e.code == api.CodeNotKept {
			e.rule = &answer
		}
		return e
	}
	req.body = encode(answer)
	return nil
}

// setHubAside answers DELETE /v1/deny/hub.
func (s *Server) setHubAside(req *request) *apiError {
	if e := noQuery(req); e != nil {
		return e
	}
	const what = "setting aside what IoT Hub denies"
	return s.answerRoot(req, what, "perceptctl deny lift --from-hub", s.Agent.SetHubAside)
}

// heedHub answers POST /v1/deny/hub.
func (s *Server) heedHub(req *request) *apiError {
	if _, e := readBody[struct{}](req); e != nil {
		return e
	}
	return s.answerRoot(req, "heeding IoT Hub again", "perceptctl deny heed-hub", s.Agent.HeedHub)
}

// forgetLostDeny answers DELETE /v1/deny/lost.
func (s *Server) forgetLostDeny(req *request) *apiError {
	if e := noQuery(req); e != nil {
		return e
	}
	const what = "ending the denial that a lost record causes"
	return s.answerRoot(req, what, "perceptctl deny forget-lost", s.Agent.ForgetLostDenyRules)
}

// answerRoot does what only root on this device may, and answers with the deny rules after it. what is that in words,
// and command has root do it. In a container, and in a pid namespace of its own, uid 0 is not that root.
func (s *Server) answerRoot(req *request, what, command string, do func(by string) error) *apiError {
	if req.caller.UID != 0 || !req.caller.HasUser() {
		return &apiError{
			status: http.StatusForbidden, code: api.CodeNotRoot,
			detail: what + " is for root on this device, and not from a container or a pid namespace of its own: " +
				"sudo " +
				command,
		}
	}
	if err := do(req.caller.String()); err != nil {
		return errorOf(err)
	}
	req.body = encode(s.denyRulesNow())
	return nil
}
