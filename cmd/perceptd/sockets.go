package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"go.uber.org/zap"

	"perceptd/agent/api"
	"perceptd/agent/server"
	"perceptd/agent/socket"
	"perceptd/systemd"
)

// sockets are the daemon's listeners: two from systemd, or made here when it was started by hand, and
// one for each module, always made here.
type sockets struct {
	held    *socket.Held
	server  *server.Server
	log     *zap.Logger
	failed  chan<- error // a listener that can accept no more
	serving sync.WaitGroup

	mu      sync.Mutex          // protects what follows
	answers map[string]net.Addr // where the self-check finds an answer, by the socket's name
	modules map[string]*socket.Listener
	trouble []string // modules without a socket
}

const (
	tokenSocketMode = 0o666 // who may have which token is decided by grants, not by the file
	adminSocketMode = 0o660 // who may administer is decided by the file
)

// open returns the token and admin sockets: those that systemd gave, by name, or ones made here.
func (s *sockets) open(given map[string]*net.UnixListener) (token, admin net.Listener, err error) {
	if token, err = s.takeOrMake(given[systemd.TokenSocket], api.TokenSocketName, tokenSocketMode); err != nil {
		return nil, nil, err
	}
	if admin, err = s.takeOrMake(given[systemd.AdminSocket], api.AdminSocketName, adminSocketMode); err != nil {
		return nil, nil, errors.Join(err, token.Close())
	}
	return token, admin, nil
}

func (s *sockets) takeOrMake(given *net.UnixListener, name string, mode os.FileMode) (net.Listener, error) {
	if given != nil {
		given.SetUnlinkOnClose(false) // the path is systemd's: clients wait there through a restart
		return given, nil
	}
	made, err := s.held.Listen("", name, mode, -1)
	if err != nil {
		return nil, err // and not a net.Listener that holds a nil pointer
	}
	return made, nil
}

// serveLocked answers on l in the background until l is closed.
func (s *sockets) serveLocked(name string, l net.Listener, answer func(net.Listener) error) {
	s.answers[name] = l.Addr()
	s.serving.Go(func() {
		if err := answer(l); err != nil {
			select {
			case s.failed <- fmt.Errorf("%s: %w", name, err):
			default: // one failure is enough to stop for
			}
		}
	})
}

// serve answers on the two sockets that are always there.
func (s *sockets) serve(token, admin net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.serveLocked("token socket", token, func(l net.Listener) error { return s.server.ServeTokens(l, "") })
	s.serveLocked("admin socket", admin, s.server.ServeAdmin)
}

// check asks every socket for its health, as a client would: each must accept and answer.
func (s *sockets) check(ctx context.Context) error {
	s.mu.Lock()
	answers := maps.Clone(s.answers)
	s.mu.Unlock()
	for name, at := range answers {
		if err := askHealth(ctx, at); err != nil && !s.closed(name) {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// closed reports whether a reload has taken the socket away meanwhile.
func (s *sockets) closed(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answers[name] == nil
}

func askHealth(ctx context.Context, at net.Addr) error {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, at.Network(), at.String())
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if due, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(due)
	}
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", api.PathHealth); err != nil {
		return err
	}
	const healthy = "HTTP/1.1 200 "
	answer := make([]byte, len(healthy))
	if _, err := io.ReadFull(conn, answer); err != nil {
		return err
	}
	if string(answer) != healthy {
		return fmt.Errorf("answered %q", answer)
	}
	return nil
}

// setModules gives each of the named modules a socket, and takes it from the others. A socket that cannot
// be made is trouble for its module and for no other: each can spoil its own folder, where it is mounted
// writable. It is tried again at the next reload.
func (s *sockets) setModules(modules []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, l := range s.modules {
		if !slices.Contains(modules, name) {
			// The folder stays: a container may still have it mounted, and the module may come back.
			_ = l.Close()
			delete(s.modules, name)
			delete(s.answers, moduleSocket(name))
		}
	}
	s.trouble = nil
	for _, name := range modules {
		if s.modules[name] != nil {
			continue
		}
		l, err := s.held.Listen(filepath.Join(api.ModulesDirName, name), api.TokenSocketName, tokenSocketMode, -1)
		if err != nil {
			s.log.Error("a module has no socket", zap.String("module", name), zap.Error(err))
			s.trouble = append(s.trouble, fmt.Sprintf("module %s has no socket: %v", name, err))
			continue
		}
		s.modules[name] = l
		s.serveLocked(moduleSocket(name), l, func(l net.Listener) error { return s.server.ServeTokens(l, name) })
	}
}

// troubles lists the modules that have no socket, and why.
func (s *sockets) troubles() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.trouble)
}

func moduleSocket(name string) string { return "socket of module " + name }
