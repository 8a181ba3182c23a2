package iothub

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
)

// isDenied reports whether a deny rule keeps vision from a token.
func (j *joined) isDenied(t *testing.T) bool {
	t.Helper()
	_, err := j.agent.Token(j.ctx, vision, agent.Request{Request: grants.Request{Resource: vault}})
	refusal, is := errors.AsType[*agent.Error](err)
	if err != nil && (!is || refusal.Code != api.CodeDenied) {
		t.Errorf("vision: %v", err)
	}
	return err != nil
}

// awaitDenied waits until vision is denied, or is so no more.
func (j *joined) awaitDenied(t *testing.T, denied bool) {
	t.Helper()
	j.await(t, fmt.Sprint("denied: ", denied), func(api.HubStatus) bool { return j.isDenied(t) == denied })
}

// update changes percept in the desired properties, and waits for nothing.
func (j *joined) update(t *testing.T, percept string) int64 {
	t.Helper()
	version, err := j.hub.UpdateDesired(joinedID, []byte(`{"percept":`+percept+`}`))
	if err != nil {
		t.Fatal(err)
	}
	return version
}

// awaitAck waits until the hub has what became of a version, and returns it.
func (j *joined) awaitAck(t *testing.T, version int64) (ack map[string]any) {
	t.Helper()
	if err := j.hub.WaitReported(j.ctx, joinedID, func(reported map[string]any) bool {
		percept, _ := reported["percept"].(map[string]any)
		ack, _ = percept["desired"].(map[string]any)
		return fmt.Sprint(ack["version"]) == fmt.Sprint(version)
	}); err != nil {
		t.Fatalf("version %d: %v, reported %v", version, err, j.hub.Reported(joinedID))
	}
	return ack
}

// oftenReported has reports be sent at once.
func oftenReported(o *Options) { o.ReportEvery, o.ReportSpread = time.Millisecond, time.Nanosecond }

// What is added to deny is denied as soon as the notification is there, while twins cannot be read; all else waits.
func TestTwinDeniesBeforeItIsRead(t *testing.T) {
	t.Parallel()
	j := join(t, nil)
	j.await(t, "the first twin", func(s api.HubStatus) bool { return s.Desired.Version == 1 })
	if j.isDenied(t) {
		t.Error("vision is denied at first")
	}
	j.hub.Faults.DropTwinAnswers.Store(true)
	j.update(t, `{"deny":[{"module":"vision"}],"logLevel":"error"}`)
	j.awaitDenied(t, true)
	if s := j.Status(); s.Desired.Version != 1 || j.level.Level().String() != "info" {
		t.Errorf("%+v, level %v", s.Desired, j.level.Level())
	}
	// It is to be lifted. A rule that comes after that shows that the notification of it is through.
	j.update(t, `{"deny":null}`)
	j.update(t, `{"deny":[{"module":"other"}]}`)
	j.await(t, "the other rule", func(api.HubStatus) bool { return len(j.agent.DenyStatus().Rules) == 2 })
	if !j.isDenied(t) {
		t.Error("a notification lifted what is denied")
	}
	j.hub.Faults.DropTwinAnswers.Store(false)
	j.hub.Drop(joinedID)
	j.awaitDenied(t, false)
}

// A hub that throttles reads of twins is shown, since when, until the twin is read.
func TestThrottledTwinIsShown(t *testing.T) {
	t.Parallel()
	j := join(t, nil)
	j.await(t, "the first twin", func(s api.HubStatus) bool { return s.Desired.Version == 1 })
	j.hub.Faults.ThrottleTwin.Store(1000)
	version := j.update(t, `{"deny":[{"module":"vision"}],"logLevel":"error"}`)
	s := j.await(t, "the refusal", func(s api.HubStatus) bool { return s.TwinError != "" })
	if !s.Connected || !strings.Contains(s.TwinError, "429") || s.TwinErrorSince.IsZero() ||
		s.Desired.Version >= version {
		t.Errorf("%+v", s)
	}
	j.awaitDenied(t, true)
	j.hub.Faults.ThrottleTwin.Store(0)
	s = j.await(t, "the twin", func(s api.HubStatus) bool { return s.Desired.Version == version && s.TwinError == "" })
	if !s.TwinErrorSince.IsZero() {
		t.Errorf("%+v", s)
	}
}

// What became of each version is reported, with the reason.
func TestTwinIsAcknowledged(t *testing.T) {
	t.Parallel()
	j := join(t, oftenReported)
	j.await(t, "the first twin", func(s api.HubStatus) bool { return s.Desired.Version == 1 })
	applied := j.update(t, `{"deny":[{"module":"vision"},{"module":"none"}]}`)
	ack := j.awaitAck(t, applied)
	idle, _ := ack["idle"].([]any)
	if ack["status"] != "applied" || ack["reason"] != nil || len(idle) != 1 ||
		!strings.HasPrefix(fmt.Sprint(idle[0]), "percept.deny[1]: ") {
		t.Errorf("%v", ack)
	}
	// A sound entry beside what is wrong denies, and nothing is lifted.
	refused := j.update(t, `{"deny":[{"module":"log"},{"unit":7}]}`)
	ack = j.awaitAck(t, refused)
	if ack["status"] != "refused" || ack["reason"] != "percept.deny[1].unit: it is a number, and must be a text" {
		t.Errorf("%v", ack)
	}
	_, err := j.agent.Token(j.ctx, logger, agent.Request{Request: grants.Request{Resource: vault}})
	if !j.isDenied(t) || err == nil {
		t.Errorf("vision or log is served: %v", err)
	}
	deleted := j.update(t, "null")
	if ack = j.awaitAck(t, deleted); ack["status"] != "applied" || ack["reason"] != nil || ack["idle"] != nil ||
		j.isDenied(t) {
		t.Errorf("%v, denied %v", ack, j.isDenied(t))
	}
}

// Whatever a hub sends as a notification, the twin is read and counts, and the connection is there again.
func TestHostileNotifications(t *testing.T) {
	t.Parallel()
	j := join(t, nil)
	j.await(t, "the first twin", func(s api.HubStatus) bool { return s.Desired.Version == 1 })
	const topic = "$iothub/twin/PATCH/properties/desired/?$version="
	for name, text := range hostile() {
		if len(text) > 1<<20 {
			text = text[:1<<20] // of which the link takes no more than a part
		}
		if err := j.hub.WaitListening(j.ctx, joinedID); err != nil {
			t.Fatal(err)
		}
		if err := j.hub.SendRaw(joinedID, topic+"7", text); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	for _, version := range []string{"", "-1", "x", "99999999999999999999", "0", "9007199254740993"} {
		if err := j.hub.WaitListening(j.ctx, joinedID); err != nil {
			t.Fatal(err)
		}
		if err := j.hub.SendRaw(joinedID, topic+version, []byte(`{"percept":{"logLevel":"error"},`+
			`"$version":1e99}`)); err != nil {
			t.Fatalf("%q: %v", version, err)
		}
	}
	if err := j.hub.WaitListening(j.ctx, joinedID); err != nil {
		t.Fatal(err)
	}
	if got := j.desire(t, `{"deny":[{"identity":"vision"}]}`); got.Refused != "" || !j.isDenied(t) {
		t.Errorf("%+v", got)
	}
}

// A device that was registered anew has a twin whose version begins at 1 again: it counts.
func TestTwinOfADeviceThatIsRegisteredAnew(t *testing.T) {
	t.Parallel()
	j := join(t, nil)
	for range 3 {
		j.desire(t, `{"deny":[{"module":"other"}]}`)
		j.desire(t, `{"deny":[{"module":"vision"}]}`)
	}
	if !j.isDenied(t) {
		t.Error("vision is served")
	}
	j.hub.Delete(joinedID)
	j.register(t)
	j.Reload()
	s := j.await(t, "the new twin", func(s api.HubStatus) bool { return s.Connected && s.Desired.Version == 1 })
	if s.Desired.Applied != 1 || s.Desired.Refused != "" || j.isDenied(t) {
		t.Errorf("%+v, denied %v", s.Desired, j.isDenied(t))
	}
	if got := j.desire(t, `{"deny":[{"module":"vision"}]}`); got.Version != 2 || !j.isDenied(t) {
		t.Errorf("%+v", got)
	}
}
