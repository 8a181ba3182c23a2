package iothub

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/iothub/link"
)

// MessageMethod is the ID of the journal's line about a direct method. It never changes.
const MessageMethod = "6f0d2c9b1e8a4f57b3c49a7d50e1f286"

const (
	// refreshTime is less than the 30 s for which IoT Hub waits unless the caller says otherwise.
	refreshTime = 25 * time.Second

	maxPayload = 128 << 10 // IoT Hub sends no more
	allBurst   = 400       // calls at once of all methods but percept.deny, and then
	allSecond  = 40        // a second
)

// method is a direct method.
type method struct {
	name   string
	sets   bool // it changes what the device does, and is refused while root has set the hub aside
	apart  bool // it is not counted with the others, which so cannot delay it
	burst  int  // calls at once, and then
	second int  // a second
	atOnce int  // calls under way; the link has 16 of all methods
	run    func(m *methods, ctx context.Context, c *methodCall) (any, error)
}

// theMethods leave room for percept.deny among the calls that the link has under way.
var theMethods = []method{
	{name: api.MethodStatus, burst: 200, second: 20, atOnce: 16, run: (*methods).showStatus},
	{name: api.MethodExplain, burst: 200, second: 20, atOnce: 16, run: (*methods).explain},
	{name: api.MethodPolicyChanged, sets: true, burst: 100, second: 5, atOnce: 8, run: (*methods).policyChanged},
	{name: api.MethodRefresh, sets: true, burst: 20, second: 1, atOnce: 4, run: (*methods).refresh},
	{name: api.MethodDeny, sets: true, apart: true, burst: 200, second: 20, atOnce: 16, run: (*methods).deny},
}

// methods answers direct methods.
type methods struct {
	agent  *agent.Agent
	status func() api.Status // the whole status
	log    *zap.Logger       // bounded

	all    *rate.Limiter
	each   []*rate.Limiter // of theMethods
	places []chan struct{} // taken by calls under way, of theMethods
}

// methodCall is one call of a method.
type methodCall struct {
	hub     string // this device's identity at the hub that calls
	by      string // who calls, for the agent's log and records
	payload []byte // a JSON object, or nothing
	about   []zap.Field
}

func newMethods(a *agent.Agent, status func() api.Status, log *zap.Logger) *methods {
	m := &methods{
		agent: a, status: status, log: log,
		all: rate.NewLimiter(allSecond, allBurst),
	}
	for _, method := range theMethods {
		m.each = append(m.each, rate.NewLimiter(rate.Limit(method.second), method.burst))
		m.places = append(m.places, make(chan struct{}, method.atOnce))
	}
	return m
}

// serve answers a call of the method name, to the identity that this device has at the hub: a status as HTTP's, and
// what goes out as JSON. ctx ends with the connection.
func (m *methods) serve(
	ctx context.Context, as link.Identity, name string, payload json.RawMessage,
) (status int, answer any) {
	hub := as.String()
	c := &methodCall{hub: hub, by: fmt.Sprintf("iothub %s method %.64q", hub, name)} // any text may be a name
	answer, err := m.call(ctx, name, payload, c)
	status, code := 200, api.Code("")
	if err != nil {
		var e api.MethodError
		status, e = methodError(answer, err)
		answer, code = e, e.Error.Code
	}
	m.logCall(c, status, code)
	return status, answer
}

// call runs a method. With an error that says that something is not kept, the answer is what was done all the same.
func (m *methods) call(
	ctx context.Context, name string, payload []byte, c *methodCall,
) (answer any, err error) {
	defer func() {
		if v := recover(); v != nil { // the value may hold what the method had in its hands
			m.log.Error("direct method panicked", zap.String("type", fmt.Sprintf("%T", v)), zap.StackSkip("stack", 1))
			answer, err = nil, fmt.Errorf("panic")
		}
	}()
	at := methodNamed(name)
	if at < 0 || !theMethods[at].apart {
		if err := allow(m.all, "direct methods"); err != nil {
			return nil, err
		}
	}
	if at < 0 {
		return nil, unknownMethod(name)
	}
	method := &theMethods[at]
	c.by = fmt.Sprintf("iothub %s method %s", c.hub, method.name)
	if err := allow(m.each[at], method.name); err != nil {
		return nil, err
	}
	if method.sets && m.agent.IsHubSetAside(c.hub) {
		return nil, &agent.Error{Code: api.CodeHubSetAside, Detail: "root on this device has set aside what IoT Hub " +
			"sets, so that " + method.name + " does nothing here until perceptctl deny heed-hub takes that back; " +
			"percept.status and percept.explain answer"}
	}
	if c.payload, err = methodPayload(payload); err != nil {
		return nil, err
	}
	select {
	case m.places[at] <- struct{}{}:
		defer func() { <-m.places[at] }()
	default:
		return nil, &agent.Error{Code: api.CodeBusy, RetryAfter: time.Second, Detail: fmt.Sprintf(
			"%d calls of %s are under way, which is all that can be: call again", method.atOnce, method.name)}
	}
	return method.run(m, ctx, c)
}

// methodNamed returns the place of a method in theMethods; -1: there is none of that name.
func methodNamed(name string) int {
	for i := range theMethods {
		if strings.EqualFold(theMethods[i].name, name) {
			return i
		}
	}
	return -1
}

func unknownMethod(name string) error {
	var names []string
	for _, method := range theMethods {
		names = append(names, method.name)
	}
	return &agent.Error{Code: api.CodeUnknownMethod, Choices: names, Detail: fmt.Sprintf(
		"there is no direct method %.64q: there are %s", name, strings.Join(names, ", "))}
}

// allow takes one out of a budget. name is what the error calls it.
func allow(limiter *rate.Limiter, name string) error {
	r := limiter.Reserve()
	wait := r.Delay()
	if wait == 0 {
		return nil
	}
	r.Cancel()
	return &agent.Error{Code: api.CodeBusy, RetryAfter: wait, Detail: fmt.Sprintf(
		"%s are called too often: %d at once, and then %v a second", name, limiter.Burst(), limiter.Limit())}
}

// methodPayload returns the JSON object that a payload is, or nothing where it is null or nothing.
func methodPayload(payload []byte) ([]byte, error) {
	if len(payload) > maxPayload {
		return nil, badPayload(fmt.Errorf("it is longer than %d bytes", maxPayload))
	}
	payload = bytes.Trim(payload, " \t\r\n")
	if string(payload) == "null" {
		return nil, nil
	}
	return payload, nil
}

func badPayload(err error) error {
	return &agent.Error{Code: api.CodeBadRequest, Detail: "the payload is not what this method takes: " + err.Error()}
}

// readPayload reads a payload strictly: what is left out has a meaning, and what is empty is refused.
func readPayload[T any](c *methodCall) (T, error) {
	value, err := api.Decode[T](c.payload)
	if err == nil {
		err = api.CheckFilled(c.payload)
	}
	if err != nil {
		return value, badPayload(err)
	}
	return value, nil
}

// methodError returns the status and answer for an error, beside which done may say what was done all the same.
func methodError(done any, err error) (int, api.MethodError) {
	why, known := errors.AsType[*agent.Error](err)
	var status int
	if known {
		status = api.StatusOf[why.Code]
	}
	switch {
	case status != 0:
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		status, why = 503, &agent.Error{Code: api.CodeUnreachable,
			Detail: "the call ended before there was an answer: call again"}
	default: // what went wrong could hold a secret
		status, why = 500, &agent.Error{Code: api.CodeInternal, Detail: "perceptd has a fault: its log says where"}
	}
	message := why.Detail
	if next := methodNext[why.Code]; next != "" {
		message += "; " + next
	}
	e := api.MethodError{Error: api.MethodProblem{Code: why.Code, Message: message, Choices: why.Choices,
		RetryAfter: int64(math.Ceil(why.RetryAfter.Seconds()))}}
	if why.Code == api.CodeNotKept {
		switch done := done.(type) {
		case api.PolicyChangeAnswer:
			e.PolicyChange = &done
		case api.DenyAnswer:
			e.DenyRule = &done
		}
	}
	return status, e
}

// methodNext says to a caller in the cloud what to do next about what the agent refuses, as perceptctl does on the
// device.
var methodNext = map[api.Code]string{
	api.CodeUnknownDenyRule:  "percept.deny without a payload lists the rules",
	api.CodeTooManyDenyRules: "percept.deny without a payload lists them",
	api.CodeTooManyChanges:   "percept.status lists them",
}

// logCall writes one line for a call.
func (m *methods) logCall(c *methodCall, status int, code api.Code) {
	fields := append([]zap.Field{zap.String("by", c.by), zap.Int("status", status)}, c.about...)
	if code != "" {
		fields = append(fields, zap.String("code", string(code)))
	}
	m.log.Info("direct method answered", append(fields, zap.String("message_id", MessageMethod))...)
}

func (m *methods) showStatus(_ context.Context, c *methodCall) (any, error) {
	if _, err := readPayload[struct{}](c); err != nil {
		return nil, err
	}
	return statusAnswer(m.status()), nil
}

func (m *methods) explain(_ context.Context, c *methodCall) (any, error) {
	r, err := readPayload[api.ExplainRequest](c)
	if err != nil {
		return nil, err
	}
	return explainAnswer(m.status(), r)
}

func (m *methods) policyChanged(_ context.Context, c *methodCall) (any, error) {
	r, err := readPayload[api.PolicyChangeRequest](c)
	if err != nil {
		return nil, err
	}
	r.Resource = api.FullResource(r.Resource)
	change, err := m.agent.RecordChange(c.by, r)
	return api.PolicyChangeAnswer{PolicyChange: change, Now: m.status().Now}, err
}

func (m *methods) refresh(ctx context.Context, c *methodCall) (any, error) {
	r, err := readPayload[api.RefreshRequest](c)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, refreshTime)
	defer cancel()
	c.about = []zap.Field{zap.String("identity", fmt.Sprintf("%.64s", r.Identity)),
		zap.String("resource", fmt.Sprintf("%.256s", r.Resource)), zap.Bool("now", r.Now), zap.Bool("forget", r.Forget)}
	refresh := m.agent.Refresh
	if r.Forget {
		refresh = m.agent.Forget
	}
	results, err := refresh(ctx, r.Identity, api.FullResource(r.Resource), r.Now)
	answer := api.RefreshAnswer{RefreshResponse: api.RefreshResponse{Results: results}}
	answer.LeftOut = fit(sizeOf(answer), api.MaxMethodAnswer, listOf("results", &answer.Results))
	return answer, err
}

// deny adds a rule, lifts one, or lists them. A rule acts before there is an answer.
func (m *methods) deny(_ context.Context, c *methodCall) (any, error) {
	r, err := readPayload[api.DenyMethodRequest](c)
	if err != nil {
		return nil, err
	}
	if err := api.CheckFilled(c.payload, false); err != nil {
		return nil, badPayload(err)
	}
	var rule api.DenyRule
	switch {
	case r == api.DenyMethodRequest{}:
		list := api.DenyRulesAnswer{DenyRules: api.DenyRules{Now: m.status().Now, DenyStatus: m.agent.DenyStatus()}}
		list.LeftOut = fit(sizeOf(list), api.MaxMethodAnswer, listOf("rules", &list.Rules))
		return list, nil
	case r.Lift == "":
		r.Resource = api.FullResource(r.Resource)
		rule, err = m.agent.Deny(c.by, api.DenySide{Origin: api.DenyMethod, Hub: c.hub}, r.DenyRequest)
	case r.DenyRequest == api.DenyRequest{}:
		rule, err = m.agent.LiftDeny(c.by, api.DenySide{Origin: api.DenyMethod, Hub: c.hub}, r.Lift)
	default:
		return nil, badPayload(errors.New("it names a rule to lift, and what to deny besides: send one of them"))
	}
	return api.DenyAnswer{DenyRule: rule, Now: m.status().Now}, err
}
