package link

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/iothub/hubtest"
)

// A hub may send faster than what it sends is taken. No more than maxWaiting waits.
func TestFloods(t *testing.T) {
	t.Parallel()
	const messages = 5000
	for name, row := range map[string]struct {
		size int
		most int64 // that are taken
	}{
		"empty ones": {0, maxWaiting / messageCost},
		"long ones":  {maxPacket, maxWaiting / maxPacket},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				release := make(chan struct{})
				var patches, methods, refused, done atomic.Int64
				var notifications atomic.Int64
				s := newSession(ctx, &Options{
					Log:   zap.NewNop(),
					Patch: func(json.RawMessage, Identity, int64) { <-release; patches.Add(1) },
					Method: func(context.Context, Identity, string, json.RawMessage) (int, any) {
						<-release
						methods.Add(1)
						return http.StatusOK, nil
					},
				}, &notifications, func(error) {})
				message := make([]byte, row.size)
				var all sync.WaitGroup
				for range messages {
					all.Go(func() { desiredDispatcher{s}.Dispatch(message); done.Add(1) })
				}
				synctest.Wait()
				if waiting := messages - done.Load(); waiting > row.most {
					t.Errorf("%d notifications wait, want %d at most", waiting, row.most)
				}
				for range messages {
					all.Go(func() {
						if _, _, err := s.Dispatch("x", message); err != nil {
							refused.Add(1)
						}
					})
				}
				synctest.Wait()
				if len(s.notified) != 1 {
					t.Error("the twin is not read after the notifications that were left out")
				}
				close(release)
				all.Wait()
				if n := patches.Load() + methods.Load(); n < row.most*9/10 || n > row.most+methodsAtOnce+methodsQueued {
					t.Errorf("%d were taken, want about %d", n, row.most)
				}
				if methods.Load()+refused.Load() != messages || s.waiting.Load() != 0 || s.queued.Load() != 0 {
					t.Errorf("%d methods, %d refused; %d bytes and %d methods wait in the end",
						methods.Load(), refused.Load(), s.waiting.Load(), s.queued.Load())
				}
			})
		})
	}
}

// What the hub sends may lead to a panic, and never to the end of the daemon.
func TestPanicsAreContained(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	var fail atomic.Bool
	d := start(t, hub, func(o *Options) {
		twin := o.Twin
		o.Twin = func(t Twin) {
			if fail.Load() {
				panic("in the twin")
			}
			twin(t)
		}
		o.Patch = func(json.RawMessage, Identity, int64) { panic("in a notification") }
	})
	d.connected(t)
	if _, err := hub.UpdateDesired("cam", []byte(`{"a":1}`)); err != nil {
		t.Fatal(err)
	}
	d.wait(t, "the twin is read", func() bool { return d.lastTwin().DesiredVersion == 2 })
	fail.Store(true)
	hub.Drop("cam")
	d.failed(t, "", "led to a panic")
	fail.Store(false)
	d.connected(t)
	if d.Status().Failure == api.HubFailureNetwork {
		t.Error("the panic is taken for the network's")
	}
}

// On a device with IoT Edge the link signs in by what identityd and keyd say, as a module.
func TestLinkByTheIdentityService(t *testing.T) {
	t.Parallel()
	hub := startHub(t, hubtest.Options{})
	login, err := parseConnectionString(hub.CreateModule("device-7", "percept"))
	if err != nil {
		t.Fatal(err)
	}
	var refused atomic.Int64
	service := edge(t, func(w http.ResponseWriter, r *http.Request) {
		if refused.Add(1) == 1 {
			http.Error(w, `{"message":"not authorized"}`, http.StatusUnauthorized)
			return
		}
		identityd(edgeIdentity)(w, r)
	}, func(w http.ResponseWriter, r *http.Request) {
		var question struct{ Parameters struct{ Message []byte } }
		if err := json.NewDecoder(r.Body).Decode(&question); err != nil {
			http.Error(w, "{}", http.StatusBadRequest)
			return
		}
		signature, _ := login.Sign(r.Context(), question.Parameters.Message) // it never fails with a key
		_ = json.NewEncoder(w).Encode(map[string][]byte{"signature": signature})
	})
	d := startWith(t, hub, "device-7/percept", Options{Credentials: service}, nil)
	d.connected(t)
	s := d.Status()
	if s.Identity.String() != "hub.test/device-7/percept" || s.Failure != api.HubFailureIdentity {
		t.Errorf("%+v", s)
	}
	if _, err := d.Report(d.ctx, json.RawMessage(`{"list":[{"a":1}]}`)); err != nil {
		t.Error(err)
	}
}
