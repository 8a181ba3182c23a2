package iothub

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/grants"
	"perceptd/agent/iothub/hubtest"
	"perceptd/agent/iothub/link"
	"perceptd/tokencache/tokencachetest"
)

// In days without the hub nothing piles up, and tokens are renewed and served all the while. When it is there again the
// device is connected within two of the longest waits. No test runs beside it, since goroutines are counted.
func TestDaysWithoutTheHub(t *testing.T) {
	hub, err := hubtest.Start(hubtest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hub.Close)
	file := filepath.Join(t.TempDir(), "iothub")
	if err := os.WriteFile(file, []byte(hub.CreateDevice(joinedID)), 0o600); err != nil {
		t.Fatal(err)
	}
	hub.Stop()
	// Virtual time stands still while a goroutine in it waits for the network, so that the hub comes back outside of
	// it.
	var wanted, there, ended atomic.Bool
	resumed := make(chan error, 1)
	go func() {
		for !wanted.Load() && !ended.Load() {
			time.Sleep(time.Millisecond)
		}
		if ended.Load() {
			resumed <- nil
			return
		}
		err := hub.Resume()
		there.Store(true)
		resumed <- err
	}()
	defer func() {
		ended.Store(true)
		if err := <-resumed; err != nil {
			t.Error(err)
		}
	}()
	const hours = 60
	begin := time.Now().Add(-hours * time.Hour) // so that certificates and signatures are good when it is back
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(begin))
		core, logs := observer.New(zapcore.InfoLevel)
		source := &tokencachetest.Source{Life: 24 * time.Hour}
		a, err := agent.New(agent.Options{Fetch: source.Fetch, Rules: edge(), Log: zap.New(core)})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		changed := make(chan struct{}, 1)
		const longest = 5 * time.Minute
		h := New(Options{
			Link: link.Options{
				Credentials: link.SharedKeyFile{Path: file}, RootCAs: hub.RootCAs(), Address: hub.MQTTAddress(),
				MaxBackoff: longest,
			},
			Agent: a, Status: func() api.Status { return a.Status() }, Level: zap.NewAtomicLevel(), Log: zap.New(core),
			Events: true, Changed: func() { poke(changed) },
		})
		defer h.Close()
		served := func() {
			t.Helper()
			_, err := a.Token(t.Context(), grants.Caller{Module: "vision", UID: grants.NoID, GID: grants.NoID},
				agent.Request{Request: grants.Request{Resource: vault}})
			if err != nil {
				t.Errorf("after %v: %v", time.Since(h.Status().Since), err)
			}
		}
		var goroutines int
		for hour := range hours {
			for range 6 {
				time.Sleep(10 * time.Minute)
				served()
			}
			synctest.Wait()
			if hour == 1 {
				goroutines = runtime.NumGoroutine()
			}
		}
		if s := h.Status(); s.Connected || s.Failure != api.HubFailureNetwork || s.LastError == "" ||
			s.NextTry.IsZero() ||
			s.Events == nil {
			t.Errorf("%+v", s)
		}
		if now := runtime.NumGoroutine(); now > goroutines+5 { // some may be dialling
			t.Errorf("%d goroutines, and %d at first", now, goroutines)
		}
		complaints := 0
		for _, line := range logs.All() {
			if strings.Contains(line.Message, "not connected") {
				complaints++
			}
		}
		if complaints > 5 {
			t.Errorf("%d lines in the journal about one outage", complaints)
		}
		for wanted.Store(true); !there.Load(); {
			runtime.Gosched() // in no time
		}
		for waited := time.Now(); !h.Status().Connected; <-changed {
			if time.Since(waited) > 2*longest {
				t.Fatalf("not connected after %v: %+v", time.Since(waited), h.Status())
			}
		}
		served()
	})
}
