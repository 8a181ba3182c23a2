package server

import (
	"context"
	"strings"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/tokencache"
)

// stricter has module vision be a container from now on, which this process is not in.
func (d *daemon) stricter() {
	d.Callers.SetRules(attest.Rules{Modules: map[string]attest.Requirement{"vision": {Container: "vision"}}})
}

// Who waits for a token gets none by a proof that has ended meanwhile.
func TestProofEndsWhileTheRequestWaits(t *testing.T) {
	t.Parallel()
	const imds = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"
	for _, text := range []string{get(v1Vault), get(v1Vault + "&wait=1m"), get(imds, "Metadata: true")} {
		asked, release := make(chan struct{}), make(chan struct{})
		d := newDaemon(t, func(ctx context.Context, key tokencache.Key) (tokencache.Fetched, error) {
			close(asked)
			<-release
			return fetchDay(ctx, key)
		})
		socket := d.tokens("vision")
		conn := dial(t, socket, text)
		defer conn.Close()
		<-asked
		d.stricter()
		close(release)
		got := exchangeOn(t, conn, "") // which was sent
		if got.status != 403 || !strings.Contains(got.body, string(api.CodeUnknownCaller)) || strings.Contains(got.body, "canary") || !got.closes {
			t.Errorf("%q: %+v", text, got)
		}
		if got := send(t, socket, text); got.status != 403 {
			t.Errorf("%q, on a connection of its own: %+v", text, got)
		}
	}
}

func TestProofEndsWhileWatching(t *testing.T) {
	t.Parallel()
	d := newDaemon(t, fetchDay)
	socket := d.tokens("vision")
	send(t, socket, get(v1Vault))
	w := d.watchAt(socket, watchVault)
	w.next(api.EventToken)
	d.stricter()
	d.change(tokencache.Granted, 0) // which would be told
	w.ends("could not be proved any more")
}
