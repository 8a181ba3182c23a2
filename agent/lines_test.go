package agent_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/deny"
	"perceptd/tokencache/tokencachetest"
)

// A log that is bounded leaves out lines, says how many, and counts each message by itself.
func TestBoundedLog(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.InfoLevel)
		bounded := agent.BoundedLog(zap.New(core))
		log := bounded.With(zap.String("by", "hub"))
		for range 1000 {
			log.Info("flood")
			bounded.Debug("of a level that is not written")
		}
		log.Info("another")
		if n := logs.FilterMessage("flood").Len(); n != 50 || logs.FilterMessage("another").Len() != 1 ||
			logs.Len() != 51 {
			t.Fatalf("%d lines of a flood, %d in all", n, logs.Len())
		}
		time.Sleep(time.Second)
		for range 100 {
			bounded.Info("flood")
		}
		flood := logs.FilterMessage("flood").All()
		if len(flood) != 55 {
			t.Fatalf("%d lines a second later", len(flood))
		}
		if now := flood[50].ContextMap(); now["left_out"] != int64(950) || flood[51].ContextMap()["left_out"] != nil {
			t.Errorf("%v", now)
		}
		for i := range 10_000 { // whatever messages there are
			bounded.Info(fmt.Sprint("message ", i))
		}
		if n := logs.Len(); n > 55+1+64+50 {
			t.Errorf("%d lines of 10000 messages", n)
		}
	})
	agent.BoundedLog(nil).Info("nowhere")
	if agent.BoundedLog(zap.NewNop()).Core().Enabled(zapcore.ErrorLevel) {
		t.Error("a bounded log is of another level")
	}
}

// TestTwinDenyLines shows that a hub that changes its documents as fast as it can cannot flood the journal, and that a
// line about many rules says who, by which version, how many, and the first of them.
func TestTwinDenyLines(t *testing.T) {
	t.Parallel()
	bubble(t, edge(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, logs *observer.ObservedLogs) {
		document := func(version int64) {
			t.Helper()
			var all []api.DenyRequest
			for i := range deny.MaxRules {
				all = append(all, denyModule(fmt.Sprintf("m%d-%d", version, i)))
			}
			if err := a.SetTwinDeny(thisHub, all, version); err != nil {
				t.Fatal(err)
			}
		}
		document(1)
		document(2)
		set := logs.FilterMessage("deny rules set").All()
		lifted := logs.FilterMessage("deny rules lifted").All()
		if logs.Len() != 3 || len(set) != 2 || len(lifted) != 1 {
			t.Fatalf("two documents: %v", logs.All())
		}
		now := set[1].ContextMap()
		if now["rules"] != int64(64) || now["more"] != int64(60) || now["by"] != "IoT Hub "+thisHub ||
			now["version"] != int64(2) || now["message_id"] != agent.MessageDenyRuleSet || now["origin"] != "twin" ||
			fmt.Sprint(now["denies"]) != "[module m2-0 module m2-1 module m2-2 module m2-3]" {
			t.Errorf("%v", now)
		}
		if now := lifted[0].ContextMap(); now["rules"] != int64(64) ||
			now["message_id"] != agent.MessageDenyRuleLifted ||
			!strings.HasPrefix(fmt.Sprint(now["denies"]), "[module m1-0 ") {
			t.Errorf("%v", now)
		}
		for version := range int64(1000) {
			document(version + 3)
		}
		if n := logs.Len(); n > 100 {
			t.Errorf("%d lines of 1002 documents", n)
		}
		if err := a.SetTwinDeny(thisHub, []api.DenyRequest{denyModule("vision")}, 2000); err != nil {
			t.Fatal(err)
		}
		one := logs.FilterMessage("deny rule set").All()
		if len(one) != 1 || one[0].ContextMap()["version"] != int64(2000) || one[0].ContextMap()["note"] != "stolen" {
			t.Errorf("one rule: %v", one)
		}
		for i := range 1000 {
			rule, err := a.Deny("iothub "+thisHub+" method percept.deny", thisMethod, denyModule(fmt.Sprint("x", i)))
			if err == nil {
				_, err = a.LiftDeny("iothub "+thisHub+" method percept.deny", thisMethod, rule.ID)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if n := logs.Len(); n > 200 {
			t.Errorf("%d lines, with 2000 by a direct method", n)
		}
		before := logs.Len()
		for i := range 60 { // a person's are all there
			mustDeny(t, a, api.DenyLocal, denyModule(fmt.Sprint("y", i)))
		}
		if n := logs.Len() - before; n != 60 {
			t.Errorf("%d lines of 60 rules that a person set", n)
		}
	})
}

// TestTwinChangeLines is TestTwinDenyLines of policy changes that a twin lists.
func TestTwinChangeLines(t *testing.T) {
	t.Parallel()
	bubble(t, edge(), new(tokencachetest.Source), func(t *testing.T, a *agent.Agent, logs *observer.ObservedLogs) {
		at := time.Now()
		for version := range int64(100) {
			var all []api.PolicyChangeRequest
			for i := range 10 {
				all = append(all, api.PolicyChangeRequest{AllResources: true, At: at,
					Note: fmt.Sprint(version, "-", i)})
			}
			if _, err := a.SetTwinChanges(thisHub, all, version); err != nil {
				t.Fatal(err)
			}
		}
		noted := logs.FilterMessage("policy change noted").Len()
		if n := logs.Len(); n > 150 || noted != 50 {
			t.Errorf("%d lines of 100 documents, %d of changes noted", n, noted)
		}
	})
}

// A hand-over that takes its time, as to a systemd that is busy, holds up nothing that the twin says.
func TestTwinDenyWaitsForNoHandOver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		busy := make(chan struct{})
		var handed []deny.Record
		a, err := agent.New(agent.Options{
			Fetch: new(tokencachetest.Source).Fetch, Rules: edge(), Log: zap.NewNop(),
			Deny: agent.DenyStore{HandOver: func(r deny.Record) error {
				<-busy
				handed = append(handed, r)
				return nil
			}},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		for version := range int64(100) {
			if _, err := a.TightenTwinDeny(thisHub, []api.DenyRequest{denyModule(fmt.Sprint("m", version))},
				version); err != nil {
				t.Fatal(err)
			}
		}
		if len(a.DenyStatus().Rules) != 100 {
			t.Error("a rule waits for the hand-over")
		}
		close(busy)
		synctest.Wait()
		if n := len(handed); n == 0 || n > 2 || len(handed[n-1].Rules) != 100 {
			t.Errorf("%d hand-overs", n)
		}
		mustDeny(t, a, api.DenyLocal, denyModule("by hand"[:2]))
		if last := handed[len(handed)-1]; len(last.Rules) != 101 {
			t.Error("what a person denies is answered before it was handed over")
		}
	})
}
