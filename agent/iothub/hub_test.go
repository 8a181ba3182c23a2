package iothub

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/iothub/hubtest"
	"perceptd/agent/iothub/link"
	"perceptd/tokencache"
	"perceptd/tokencache/tokencachetest"
)

// joined is an agent that is joined to a hub on loopback.
type joined struct {
	*Hub
	agent   *agent.Agent
	hub     *hubtest.Hub
	level   zap.AtomicLevel
	logs    *observer.ObservedLogs
	ctx     context.Context // ends before the test would
	changed chan struct{}
	file    string // the device's connection string
}

const joinedID = "percept-7"

// join connects an agent to a hub.
func join(t *testing.T, set func(*Options)) *joined {
	t.Helper()
	hub, err := hubtest.Start(hubtest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hub.Close)
	j := &joined{
		hub: hub, level: zap.NewAtomicLevelAt(zapcore.InfoLevel), changed: make(chan struct{}, 1),
		file: filepath.Join(t.TempDir(), "iothub"),
	}
	j.register(t)
	core, logs := observer.New(zapcore.DebugLevel)
	j.logs = logs
	source := &tokencachetest.Source{Life: 24 * time.Hour}
	if j.agent, err = agent.New(agent.Options{Fetch: source.Fetch, Rules: edge(), Log: zap.New(core)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(j.agent.Close)
	var cancel context.CancelFunc
	j.ctx, cancel = context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	o := Options{
		Link: link.Options{
			Credentials: link.SharedKeyFile{Path: j.file}, RootCAs: hub.RootCAs(), Address: hub.MQTTAddress(),
			MaxBackoff: 50 * time.Millisecond, OperationTimeout: 5 * time.Second,
		},
		Agent: j.agent, Level: j.level, Log: zap.New(core), Changed: func() { poke(j.changed) },
	}
	o.Status = func() api.Status {
		s := j.agent.Status()
		s.Now = api.Time(time.Now())
		return s
	}
	if set != nil {
		set(&o)
	}
	j.Hub = New(o)
	t.Cleanup(j.Close)
	return j
}

// register registers the device, anew if it is, and puts its connection string where it is read.
func (j *joined) register(t *testing.T) {
	t.Helper()
	if err := os.WriteFile(j.file, []byte(j.hub.CreateDevice(joinedID)), 0o600); err != nil {
		t.Fatal(err)
	}
}

// await waits until the status is so.
func (j *joined) await(t *testing.T, what string, reached func(api.HubStatus) bool) api.HubStatus {
	t.Helper()
	for {
		s := j.Status()
		if reached(s) {
			return s
		}
		select {
		case <-j.changed:
		case <-j.ctx.Done():
			t.Fatalf("waited too long for %s: %+v", what, s)
		}
	}
}

// desire sets percept in the desired properties, and waits until it is in force, or refused.
func (j *joined) desire(t *testing.T, percept string) api.DesiredStatus {
	t.Helper()
	version, err := j.hub.UpdateDesired(joinedID, []byte(`{"percept":`+percept+`}`))
	if err != nil {
		t.Fatal(err)
	}
	return j.await(t, percept, func(s api.HubStatus) bool { return s.Desired.Version == version }).Desired
}

func (j *joined) changes() (all []string) {
	for _, c := range j.agent.Changes() {
		all = append(all, fmt.Sprint(c.Effect, " ", c.Resource))
	}
	return slices.Sorted(slices.Values(all))
}

// What the twin says is in force while it says so, whole.
func TestHubPutsTheTwinInForce(t *testing.T) {
	t.Parallel()
	j := join(t, nil)
	s := j.await(t, "the first twin", func(s api.HubStatus) bool { return s.Connected && s.Desired.Version == 1 })
	if s.Hub != "hub.test" || s.Device != joinedID || s.Transport != "mqtt" || s.Desired.Applied != 1 ||
		s.Desired.ReadOn.IsZero() || s.Events != nil {
		t.Errorf("%+v", s)
	}
	at := time.Now().UTC().Format(time.RFC3339)
	got := j.desire(t, `{"policyChanges":[{"resource":"vault.azure.net","at":"`+at+`","effect":"changed"},`+
		`{"resource":"api://elsewhere","at":"`+at+`","effect":"changed"}],`+
		`"prefetch":[{"resource":"`+storage+`"},{"resource":"api://none"}],"logLevel":"error"}`)
	if got.Refused != "" || got.Applied != got.Version || len(got.Idle) != 2 {
		t.Errorf("%+v", got)
	}
	if want := []string{"changed " + vault}; !slices.Equal(j.changes(), want) || j.level.Level() != zapcore.ErrorLevel {
		t.Errorf("on record %q, level %v", j.changes(), j.level.Level())
	}
	before := got
	for percept, says := range map[string]string{
		`{"logLevel":"loud"}`: "percept.logLevel", `{"denied":[]}`: "percept.denied",
		`{"policyChanges":[{"resource":"` + vault + `","at":"` + time.Now().Add(time.Hour).UTC().Format(time.RFC3339) +
			`","effect":"revoked"}],"logLevel":"debug"}`: " ahead, on ",
	} {
		j.desire(t, "null")
		j.desire(t, `{"policyChanges":[{"resource":"`+vault+`","at":"`+at+`","effect":"changed"}],"logLevel":"error"}`)
		if _, err := j.hub.ReplaceDesired(joinedID, []byte(`{"percept":`+percept+`}`)); err != nil {
			t.Fatal(err)
		}
		refused := j.await(t, "the refusal", func(s api.HubStatus) bool { return s.Desired.Refused != "" }).Desired
		if !strings.Contains(refused.Refused, says) || refused.Applied != refused.Version-1 ||
			refused.Applied <= before.Applied {
			t.Errorf("%s: %+v", percept, refused)
		}
		if !slices.Equal(j.changes(), []string{"changed " + vault}) || j.level.Level() != zapcore.ErrorLevel {
			t.Errorf("%s: half of it is in force: %q %v", percept, j.changes(), j.level.Level())
		}
	}
	if got := j.desire(t, "null"); got.Refused != "" || got.Applied != got.Version || len(j.changes()) > 0 ||
		j.level.Level() != zapcore.InfoLevel {
		t.Errorf("%+v, %q, %v", got, j.changes(), j.level.Level())
	}
}

// What was read and reported as one device is not shown as another's, nor reported to it, while the hub is away and
// after.
func TestMoveToAnotherIdentity(t *testing.T) {
	t.Parallel()
	j := join(t, oftenReported)
	version := j.desire(t, `{"deny":[{"module":"vision"}]}`).Version
	j.await(t, "a report", func(s api.HubStatus) bool { return !s.Reported.IsZero() })
	before := j.Status()
	text := j.hub.CreateDevice("percept-8")
	j.hub.Stop()
	if err := os.WriteFile(j.file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	j.Reload()
	j.await(t, "the other identity", func(s api.HubStatus) bool { return s.Device == "percept-8" })
	j.desired.again() // as a reload does
	if moved := j.Status(); moved.Connected || moved.Since.Before(before.Since) || moved.Desired.Version != 0 ||
		!moved.Desired.ReadOn.IsZero() || !moved.Reported.IsZero() || moved.ReportError != "" {
		t.Errorf("as the other identity, of whose twin nothing is known: %+v", moved)
	}
	if !j.isDenied(t) {
		t.Error("what the former identity's twin denies is lifted before the new one's was read")
	}
	if err := j.hub.Resume(); err != nil {
		t.Fatal(err)
	}
	s := j.await(t, "the new twin", func(s api.HubStatus) bool { return s.Desired.Version > 0 && !s.Reported.IsZero() })
	if s.Device != "percept-8" || s.Desired.Version != 1 || s.Desired.Applied != 1 || version == 1 {
		t.Errorf("%+v", s)
	}
	j.awaitDenied(t, false)
	if err := j.hub.WaitReported(j.ctx, "percept-8", func(reported map[string]any) bool {
		percept, _ := reported["percept"].(map[string]any)
		desired, _ := percept["desired"].(map[string]any)
		if desired != nil && fmt.Sprint(desired["version"]) != "1" {
			t.Errorf("it acknowledges %v", desired)
		}
		return desired != nil
	}); err != nil {
		t.Error(err)
	}
}

// A reload applies the last document again: what is configured may be other than it was.
func TestReloadAppliesTheTwinAgain(t *testing.T) {
	t.Parallel()
	j := join(t, nil)
	at := time.Now().UTC().Format(time.RFC3339)
	got := j.desire(t, `{"policyChanges":[{"resource":"api://new","at":"`+at+`","effect":"changed"}]}`)
	if len(got.Idle) != 1 || len(j.changes()) > 0 {
		t.Errorf("%+v, %q", got, j.changes())
	}
	rules := edge()
	rules.Grants[0].Resources = append(rules.Grants[0].Resources, "api://new")
	if _, err := j.agent.Apply(rules); err != nil {
		t.Fatal(err)
	}
	j.Reload()
	j.await(t, "it to be in force", func(s api.HubStatus) bool { return len(s.Desired.Idle) == 0 })
	if !slices.Equal(j.changes(), []string{"changed api://new"}) {
		t.Errorf("%q", j.changes())
	}
}

// While a policy change of the twin waits for a disk that hangs, what later documents deny and lift is in force at
// once. None is acknowledged before it is on the disk, and then the last one is.
func TestTheTwinIsInForceWhileTheDiskHangs(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	free := sync.OnceFunc(func() { close(release) })
	hung := make(chan struct{}, 1)
	var hangs atomic.Bool
	var slow *agent.Agent
	j := join(t, func(o *Options) {
		oftenReported(o)
		var err error
		slow, err = agent.New(agent.Options{Fetch: (&tokencachetest.Source{Life: time.Hour}).Fetch, Rules: edge(),
			SaveRecord: func(tokencache.Record) error {
				if hangs.Load() {
					poke(hung)
					<-release
				}
				return nil
			}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(slow.Close)
		o.Agent = slow
		o.Status = func() api.Status { s := slow.Status(); s.Now = api.Time(time.Now()); return s }
	})
	t.Cleanup(free)
	acknowledged := func(version int64) func(map[string]any) bool {
		return func(reported map[string]any) bool {
			percept, _ := reported["percept"].(map[string]any)
			desired, _ := percept["desired"].(map[string]any)
			return fmt.Sprint(desired["version"]) == fmt.Sprint(version)
		}
	}
	if err := j.hub.WaitReported(j.ctx, joinedID, acknowledged(1)); err != nil {
		t.Fatal(err)
	}
	hangs.Store(true)
	change := `"policyChanges":[{"allResources":true,"at":"` + time.Now().UTC().Format(time.RFC3339) +
		`","effect":"changed"}]`
	first := j.desire(t, `{`+change+`,"deny":[{"module":"vision"}]}`)
	<-hung
	denied := func() (all []string) {
		rules := slow.DenyStatus()
		for _, rule := range rules.InForce() {
			all = append(all, rule.Module)
		}
		return all
	}
	var last api.DesiredStatus
	for _, step := range []struct {
		deny string
		want []string
	}{
		{`[]`, nil}, {`[{"module":"speech"}]`, []string{"speech"}}, {`[{"module":"vision"}]`, []string{"vision"}},
	} {
		last = j.desire(t, `{`+change+`,"deny":`+step.deny+`}`)
		if got := denied(); last.Applied != last.Version || !slices.Equal(got, step.want) {
			t.Errorf("deny %s: %+v, denied are %q", step.deny, last, got)
		}
	}
	for _, early := range []int64{first.Version, last.Version} {
		if acknowledged(early)(j.hub.Reported(joinedID)) {
			t.Errorf("version %d is acknowledged, and not on the disk", early)
		}
	}
	free()
	if err := j.hub.WaitReported(j.ctx, joinedID, acknowledged(last.Version)); err != nil {
		t.Error(err)
	}
}

// A document is put in force apart from the link: a disk that hangs keeps neither a connection from being kept nor the
// hub from being closed.
func TestHubIsClosedWhileTheDiskHangs(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	var hung atomic.Bool
	j := join(t, func(o *Options) {
		slow, err := agent.New(agent.Options{Fetch: (&tokencachetest.Source{Life: time.Hour}).Fetch, Rules: edge(),
			SaveRecord: func(tokencache.Record) error {
				hung.Store(true)
				<-release
				return nil
			}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(slow.Close)
		o.Agent = slow
	})
	t.Cleanup(func() { close(release); j.running.Wait() })
	version, err := j.hub.UpdateDesired(joinedID, []byte(`{"percept":{"policyChanges":[{"allResources":true,"at":"`+
		time.Now().UTC().Format(time.RFC3339)+`","effect":"changed"}]}}`))
	if err != nil {
		t.Fatal(err)
	}
	for !hung.Load() {
		select {
		case <-time.After(time.Millisecond):
		case <-j.ctx.Done():
			t.Fatalf("version %d was never put in force", version)
		}
	}
	if status, _, err := j.hub.InvokeMethod(j.ctx, joinedID, api.MethodStatus, []byte("{}")); err != nil ||
		status != 200 {
		t.Errorf("a method meanwhile: %d %v", status, err)
	}
	closed := make(chan struct{})
	go func() { defer close(closed); j.Close() }()
	select {
	case <-closed:
	case <-j.ctx.Done():
		t.Error("it is not closed")
	}
}

// Events are sent where that is configured, and a direct method is answered.
func TestHubSendsEventsAndAnswersMethods(t *testing.T) {
	t.Parallel()
	j := join(t, func(o *Options) { o.Events = true })
	s := j.await(t, "the connection", func(s api.HubStatus) bool { return s.Connected })
	if s.Events == nil {
		t.Errorf("%+v", s)
	}
	status, answer, err := j.hub.InvokeMethod(j.ctx, joinedID, "Percept.STATUS", nil)
	if err != nil || status != 200 || !strings.Contains(string(answer), vault) {
		t.Errorf("%d %s %v", status, answer, err)
	}
	if status, answer, err = j.hub.InvokeMethod(j.ctx, joinedID, "reboot", nil); err != nil || status != 404 {
		t.Errorf("%d %s %v", status, answer, err)
	}
}
