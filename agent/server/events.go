package server

import (
	"fmt"
	"net/http"
	"time"

	"perceptd/agent"
	"perceptd/agent/api"
)

// eventOf says what is held of a token, as a watcher of resource is told.
func eventOf(sight agent.Sight, resource string) api.WatchEvent {
	event := api.WatchEvent{Identity: sight.Identity.Name, Resource: resource}
	if sight.SHA256 != "" {
		event.SHA256 = sight.SHA256
		event.ExpiresOn, event.ReceivedOn = unixOf(sight.ExpiresOn), unixOf(sight.ReceivedOn)
		event.Permissions = permissionsOf(sight.Permissions)
	}
	return event
}

// nameOf returns the name of the event that tells what is there now to somebody who was told something
// before, nothing at first; empty when that is the same.
func nameOf(told, now api.WatchEvent) string {
	first := told.Identity != now.Identity // or the configuration chooses another one by now
	switch {
	case now.SHA256 == "" && (first || told.SHA256 != ""):
		return api.EventExpired
	case now.SHA256 == "":
		return ""
	case first || now.SHA256 != told.SHA256:
		return api.EventToken
	case !alike(told.Permissions, now.Permissions):
		return api.EventPermissions
	}
	return ""
}

// forecastMoves is by how much, in seconds, the moment must move at which a token is current at the latest,
// to be worth an event: it is computed anew each time, by a clock that may be slewed.
const forecastMoves = 60

// alike reports whether two permissions tell a watcher the same.
func alike(x, y api.Permissions) bool {
	moved := max(x.CurrentBy-y.CurrentBy, y.CurrentBy-x.CurrentBy)
	return x.Standing == y.Standing && x.Withheld == y.Withheld && x.Changed == y.Changed && moved < forecastMoves
}

// eventContent is the type of a stream of server-sent events. net/http only reads it.
var eventContent = []string{"text/event-stream"}

// stream is an answer of server-sent events (the HTML standard, 9.2).
type stream struct {
	w    http.ResponseWriter
	c    *http.ResponseController
	now  func() time.Time // the device's wall clock
	sent int
}

// open begins the answer, with the advice to wait 2 seconds before connecting again.
func (s *stream) open() error {
	h := s.w.Header()
	h["Content-Type"] = eventContent
	h["Cache-Control"] = noStore
	_ = s.c.SetReadDeadline(time.Time{}) // a caller that listens sends nothing more
	return s.write([]byte("retry: 2000\n\n"))
}

// send sends one event, with the time. Its id counts from 1.
func (s *stream) send(name string, event api.WatchEvent) error {
	s.sent++
	event.Now = s.now().Unix()
	text := fmt.Appendf(nil, "event: %s\nid: %d\ndata: ", name, s.sent)
	text = append(text, encode(event)...) // one line, with its end
	return s.write(append(text, '\n'))
}

// alive sends a comment, which shows each end that the other is there.
func (s *stream) alive() error { return s.write([]byte(": alive\n\n")) }

// write sends text at once. The error is that of a caller that has gone or takes nothing.
func (s *stream) write(text []byte) error {
	_ = s.c.SetWriteDeadline(time.Now().Add(transfer)) // its error comes again from the write
	if _, err := s.w.Write(text); err != nil {
		return err
	}
	return s.c.Flush()
}
