package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/grants"
	"perceptd/agent/server"
	"perceptd/agent/store"
)

// loopback is the daemon's listener for programs that cannot dial a Unix socket. A port that is taken is trouble and no
// more: it is tried again until it is free.
type loopback struct {
	server   *server.Server
	stateDir string
	log      *zap.Logger
	changed  func() // the status may tell something new
	serving  sync.WaitGroup

	mu       sync.Mutex // protects what follows
	at       netip.AddrPort
	secrets  *attest.Secrets // nil: never needed yet
	listener net.Listener    // nil: not open
	again    *time.Timer     // when to try again; nil: nothing to try
	shut     string          // why it is not open; empty: it is, or is not to be
	unkept   string          // why the secrets will be others at the next start; empty: they will not
}

// reopenInterval is how often a port that was taken is tried.
const reopenInterval = 2 * time.Second

// set changes the address, which may be none, and the grants in force.
func (b *loopback) set(at netip.AddrPort, inForce []grants.Ref) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if at.IsValid() && b.secrets == nil {
		b.openSecretsLocked()
	}
	if b.secrets != nil {
		b.secrets.SetGrants(inForce)
	}
	if at == b.at && b.listener != nil {
		return
	}
	b.leaveLocked()
	b.at = at
	b.openLocked()
}

// remedyFor says what a person does about err, after a semicolon, if that is known.
func remedyFor(err error) string {
	const restart = "systemctl restart perceptd"
	fault, known := errors.AsType[*store.FaultError](err)
	switch {
	case !known:
		return ""
	case strings.Contains(fault.Remedy(), restart):
		return "; " + fault.Remedy()
	}
	return "; " + fault.Remedy() + "; then: " + restart
}

// openSecretsLocked derives the secrets from the root secret that is kept. If none can be kept, they last as long as
// this process.
func (b *loopback) openSecretsLocked() {
	root, err := store.LoopbackSecret(store.Disk(b.stateDir))
	switch {
	case root == nil:
		b.unkept = fmt.Sprintf("the header secrets of the loopback listener are others after the next start: %v%s",
			err, remedyFor(err))
		root = new(store.Key)
		_, _ = rand.Read(root[:]) // never fails: it would end the program
		b.log.Warn("the header secrets of the loopback listener are not kept", zap.Error(err))
	case err != nil:
		b.log.Warn("the header secrets of the loopback listener are new: get them again with perceptctl env",
			zap.Error(err))
	}
	b.secrets = attest.NewSecrets(*root)
}

// openLocked listens where it is configured to, or plans another try.
func (b *loopback) openLocked() {
	if !b.at.IsValid() {
		return
	}
	l, err := net.Listen("tcp", b.at.String())
	if err != nil {
		b.failLocked(err)
		return
	}
	if b.shut != "" {
		b.log.Info("the loopback listener is open after all", zap.Stringer("address", b.at))
	}
	b.listener, b.shut = l, ""
	b.serving.Go(func() { b.serve(l) })
}

// serve answers on l until it is closed, or accepting fails for good.
func (b *loopback) serve(l net.Listener) {
	err := b.server.ServeLoopback(l)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil && b.listener == l {
		b.listener = nil
		b.failLocked(err)
		b.changed()
	}
}

// failLocked notes why the listener is not open, and plans another try.
func (b *loopback) failLocked(err error) {
	why := fmt.Sprintf("the loopback listener is not open, and tried again: %v", err)
	if why != b.shut {
		b.log.Error("the loopback listener is not open", zap.Stringer("address", b.at), zap.Error(err))
	}
	b.shut = why
	b.again = time.AfterFunc(reopenInterval, b.retry)
}

func (b *loopback) retry() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.again == nil || b.listener != nil {
		return // it was closed meanwhile
	}
	before := b.shut
	b.openLocked()
	if b.shut != before {
		b.changed()
	}
}

// leaveLocked closes the listener, if it is open.
func (b *loopback) leaveLocked() {
	if b.again != nil {
		b.again.Stop()
		b.again = nil
	}
	if b.listener != nil {
		_ = b.listener.Close() // there is nobody to tell
		b.listener = nil
	}
	b.shut = ""
}

// stop has the listener not be tried again. It stays open until the server is shut down.
func (b *loopback) stop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.again != nil {
		b.again.Stop()
		b.again = nil
	}
}

// close closes the listener and waits for those who are being answered there.
func (b *loopback) close() {
	b.mu.Lock()
	b.leaveLocked()
	b.at = netip.AddrPort{}
	b.mu.Unlock()
	b.serving.Wait()
}

// now returns where the listener is configured to be, and the secrets that count there.
func (b *loopback) now() (netip.AddrPort, *attest.Secrets) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.at, b.secrets
}

// troubles lists what is wrong with it.
func (b *loopback) troubles() (all []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.shut != "" {
		all = append(all, b.shut)
	}
	if b.unkept != "" && b.at.IsValid() {
		all = append(all, b.unkept)
	}
	return all
}

// status says where it is; nil: nowhere.
func (b *loopback) status() *api.LoopbackStatus {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.at.IsValid() {
		return nil
	}
	return &api.LoopbackStatus{Address: b.at.String(), Open: b.listener != nil}
}
