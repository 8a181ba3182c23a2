package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/explain"
	"perceptd/agent/iothub"
	"perceptd/agent/iothub/link"
	"perceptd/cmd/perceptd/config"
)

// iotHub is this device's part in IoT Hub, where one is configured. Tokens are served whatever becomes of it.
type iotHub struct {
	agent   *agent.Agent
	status  func() api.Status // the whole of it
	log     *zap.Logger
	level   zap.AtomicLevel // of what the log writes, which the hub may set
	least   zapcore.Level   // and what it is where no hub does
	changed func()          // its part of the status may differ

	mu    sync.Mutex // protects what follows
	conf  config.IoTHub
	made  surroundings // what hub was made with
	hub   *iothub.Hub  // nil: none is configured, or why says why there is none
	why   error        // what the configuration names cannot be used; what was made before goes on
	since time.Time    // of why
}

// surroundings are what a connection is made with, beside the credentials, which are read at each connection.
type surroundings struct {
	proxy *url.URL       // nil: none
	roots *x509.CertPool // nil: the system's
}

func surroundingsOf(conf config.IoTHub) (made surroundings, err error) {
	if made.proxy, err = conf.ProxyURL(); err != nil {
		return made, err
	}
	made.roots, err = conf.Roots()
	return made, err
}

// equal reports whether a connection made with one is as one made with the other.
func (s surroundings) equal(other surroundings) bool {
	return fmt.Sprint(s.proxy) == fmt.Sprint(other.proxy) && s.roots.Equal(other.roots)
}

// credentialChanges says what differs in the credentials of a connection that set is to leave as it is. The identity
// service is not asked: it is another process, which may take its time.
func (h *iotHub) credentialChanges(ctx context.Context, conf config.IoTHub) []string {
	h.mu.Lock()
	hub, same := h.hub, conf == h.conf
	h.mu.Unlock()
	if hub == nil || !same || conf.IdentityService.On {
		return nil
	}
	const outcome = "perceptctl status shows the outcome"
	switch changed, err := hub.HaveCredentialsChanged(ctx); {
	case err != nil:
		return []string{fmt.Sprintf("the credential for IoT Hub cannot be read, and a connection that there is goes "+
			"on: %v; %s", err, outcome)}
	case changed:
		return []string{"the credential for IoT Hub was read again, and differs: connects anew; " + outcome}
	}
	return nil
}

// set connects the device as it is configured. Where nothing differs the credentials are read again, and what the hub
// has set is applied to what is configured by now. One call at a time.
func (h *iotHub) set(conf config.IoTHub) {
	made, err := surroundingsOf(conf)
	h.mu.Lock()
	hub := h.hub
	same := hub != nil && conf == h.conf && (err != nil || made.equal(h.made))
	if h.why = err; err != nil {
		h.since = time.Now()
	}
	h.mu.Unlock()
	if err != nil {
		h.log.Warn("IoT Hub: what the configuration names cannot be used", zap.Error(err))
	}
	if same {
		hub.Reload()
		return
	}
	h.end()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.conf, h.made = conf, made
	if conf.Configured() && err == nil {
		h.hub = h.connect(conf, made)
	}
}

// connect begins to connect the device, and waits for nothing.
func (h *iotHub) connect(conf config.IoTHub, made surroundings) *iothub.Hub {
	return iothub.New(iothub.Options{
		Link: link.Options{
			Credentials: conf.Credentials(), WebSocket: conf.WebSocket, Proxy: made.proxy, RootCAs: made.roots,
			KeepAlive: conf.KeepAlive, TokenLife: conf.TokenLife, MaxBackoff: conf.MaxBackoff, Log: h.log,
		},
		Agent: h.agent, Status: h.status, Level: h.level, Log: h.log, Changed: h.changed,
		ReportSpread: conf.ReportSpread, Events: conf.Events,
	})
}

// end ends the connection, if there is one.
func (h *iotHub) end() {
	h.mu.Lock()
	hub := h.hub
	h.hub = nil
	h.mu.Unlock()
	if hub != nil {
		hub.Close()
		h.level.SetLevel(h.least)
	}
}

// notice says that the status may differ. It does not block.
func (h *iotHub) notice() {
	h.mu.Lock()
	hub := h.hub
	h.mu.Unlock()
	if hub != nil {
		hub.Notice()
	}
}

// describe is its part of the status; nil: none is configured.
func (h *iotHub) describe() *api.HubStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case !h.conf.Configured():
		return nil
	case h.hub == nil:
		s := &api.HubStatus{Hub: h.conf.Certificate.Hub, Device: h.conf.Certificate.Device,
			Module: h.conf.Certificate.Module, Transport: transportOf(h.conf), Since: api.Time(h.since),
			Now:         api.Time(time.Now()),
			LastErrorOn: api.Time(h.since), Failure: api.HubFailureCredentials}
		if h.why != nil {
			s.LastError, s.Mend = h.why.Error(), mendFor(s.Failure, h.conf, h.why)
		}
		return s
	}
	s := h.hub.Status()
	s.Mend = mendFor(s.Failure, h.conf, nil)
	return &s
}

// mendFor says what a person does about a failure that a reload does not heal, since a credential of systemd's is in
// it: systemd gives them when the service starts. Else "". why is what is wrong with the configuration; nil: nothing.
func mendFor(failure api.HubFailure, conf config.IoTHub, why error) string {
	name := conf.OfSystemd()
	if notGiven := (*config.NotGivenError)(nil); errors.As(why, &notGiven) {
		name = notGiven.Name
	} else if why != nil {
		return ""
	}
	switch {
	case name == "":
		return ""
	case failure == api.HubFailureCredentials:
		return fmt.Sprintf("see that a drop-in has LoadCredential=%s:FILE (systemctl cat perceptd), and that FILE is "+
			"there and right; then sudo systemctl restart perceptd, since systemd reads it when the service starts",
			name)
	case failure == api.HubFailureRefused:
		return fmt.Sprintf("in IoT Hub see that the device is there and enabled, and that its key or certificate is "+
			"the one in the file of LoadCredential=%s:; then sudo systemctl restart perceptd, since systemd reads it "+
			"when the service starts", name)
	}
	return ""
}

func transportOf(conf config.IoTHub) string {
	if conf.WebSocket {
		return "websocket"
	}
	return "mqtt"
}

// troubles are the sentences of what needs a person.
func (h *iotHub) troubles() []string {
	s := h.describe()
	if s == nil {
		return nil
	}
	h.mu.Lock()
	why := h.why
	h.mu.Unlock()
	return hubTroubles(*s, h.agent.IsHubSetAside(""), why, s.Now)
}

// hubTroubles returns the troubles of a status. aside says that root has set aside what the hub sets, and why what is
// wrong with the configuration; nil: nothing.
func hubTroubles(s api.HubStatus, aside bool, why error, now time.Time) (troubles []string) {
	switch {
	case why != nil:
		text := fmt.Sprintf("IoT Hub: what [iothub] names cannot be used: %v", why)
		if notGiven := (*config.NotGivenError)(nil); !errors.As(why, &notGiven) { // which says it
			text += ": mend it, then perceptctl reload"
		}
		troubles = append(troubles, text)
	case s.IsCutSoon(now):
		troubles = append(troubles, "the connections to IoT Hub do not last: "+s.LastError)
	case s.NeedsPerson(now):
		why := s.LastError
		if why == "" {
			why = "it does not answer"
		}
		troubles = append(troubles, fmt.Sprintf("IoT Hub is not connected since %s: %s",
			s.Since.UTC().Format("Jan 2 15:04 UTC"), why))
	}
	if s.Desired.Refused != "" && !aside {
		troubles = append(troubles, fmt.Sprintf(
			"what IoT Hub sets is refused, version %d of the twin's desired properties: %s%s",
			s.Desired.Version, s.Desired.Refused, explain.DeniesAllTheSame(s.Desired)))
	}
	if why := explain.NoRoom(s.Desired); why != "" && !aside {
		troubles = append(troubles, "the twin in IoT Hub denies too much: "+why)
	}
	return troubles
}

// checkHub finds what keeps a changed [iothub] from being put in force. It connects nowhere.
func checkHub(ctx context.Context, now, before config.IoTHub) error {
	if now == before {
		return nil // its credentials may be on their way: the status tells
	}
	if err := now.CheckFiles(ctx); err != nil {
		return fmt.Errorf("[iothub]: %w", err)
	}
	return nil
}
