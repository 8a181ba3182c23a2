package daemon

import (
	"sync"
	"testing"
	"time"

	"perceptd/agent/api"
	"perceptd/cmd/perceptd/e2e/harness"
)

// forms are the ways to ask for a token of harness.VaultURI.
var forms = map[string]string{
	"own":         harness.VaultToken,
	"IMDS":        api.PathIMDSToken + "?api-version=2018-02-01&resource=" + harness.VaultURI,
	"App Service": api.PathAppServiceToken + "?api-version=2019-08-01&resource=" + harness.VaultURI,
}

// askSteadily asks for tokens on these sockets in each form, over and over. The returned function ends that, and each
// answer until then has to be a token.
func askSteadily(t *testing.T, d *harness.Daemon, sockets ...string) (stop func()) {
	t.Helper()
	ended := make(chan struct{})
	var asking sync.WaitGroup
	rounds := 0
	asking.Go(func() {
		for {
			for _, socket := range sockets {
				for form, path := range forms {
					if status, body, err := d.Get(socket, path); err != nil || status != 200 {
						t.Errorf("%s on %s: %d %s %v", form, socket, status, body, err)
						return
					}
				}
			}
			rounds++
			select {
			case <-ended:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
	end := sync.OnceFunc(func() {
		close(ended)
		asking.Wait()
	})
	t.Cleanup(end)
	return func() {
		t.Helper()
		end()
		if rounds == 0 && !t.Failed() {
			t.Error("nothing was asked meanwhile")
		}
	}
}
