package agent_test

import (
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"perceptd/agent"
)

// A simulated back end in the place of a real one is warned of when its first token comes, again only when it comes
// back, and no more than once an hour; where it is the configured one nobody need be warned.
func TestSimulatedBackEndIsWarnedOf(t *testing.T) {
	t.Parallel()
	for expected, want := range map[bool]int{true: 0, false: 2} {
		synctest.Test(t, func(t *testing.T) {
			core, logs := observer.New(zapcore.DebugLevel)
			s := &switching{object: "object-1", issuer: "https://sts.simulated.invalid/t/"}
			a, err := agent.New(agent.Options{Fetch: s.Fetch, Rules: edge(), Log: zap.New(core), Simulated: expected})
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			for i := range 12 {
				s.issuer = "https://sts.simulated.invalid/t/"
				if i == 1 || i == 5 {
					s.issuer = "https://sts.windows.net/t/"
				}
				if _, err := a.Forget(t.Context(), "vision", vault, true); err != nil {
					t.Fatal(err)
				}
				if i == 4 {
					time.Sleep(time.Hour)
				}
				time.Sleep(time.Second)
				synctest.Wait() // what the schedule fetches has ended
			}
			told := logs.FilterField(zap.String("message_id", agent.MessageSimulated)).All()
			if len(told) != want || want > 0 && told[0].Level != zapcore.WarnLevel {
				t.Errorf("expected %v: told %v", expected, told)
			}
		})
	}
}
