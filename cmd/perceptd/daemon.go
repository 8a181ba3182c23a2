package main

import (
	"context"
	"errors"
	"math"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"perceptd/agent"
	"perceptd/agent/api"
	"perceptd/agent/attest"
	"perceptd/agent/lock"
	"perceptd/agent/server"
	"perceptd/agent/simulator"
	"perceptd/agent/socket"
	"perceptd/agent/store"
	"perceptd/cmd/perceptd/config"
	"perceptd/systemd"
)

const (
	// drainTimeout is how long requests under way may take to end after SIGTERM.
	drainTimeout = 4 * time.Second
	// backEndTimeout is how long they may wait for the back end in that time; then they are told to come back.
	backEndTimeout = 3 * time.Second
)

// daemon is the running program: the parts, and what is known of the configuration in force.
type daemon struct {
	flags   flags
	log     *zap.Logger
	notify  systemd.Notify
	within  time.Duration // systemd's watchdog interval; 0: none
	started time.Time

	backend            *backend
	agent              *agent.Agent
	callers            *attest.Attestor
	server             *server.Server
	sockets            *sockets
	loop               *loopback
	hub                *iotHub
	teller             *statusTeller
	signals            chan os.Signal
	changed            chan struct{} // the status may tell something new
	limitationsChanged chan struct{} // other things may keep callers from being attested
	lacking            chan struct{} // a module lacks its socket
	untold             chan struct{} // systemd did not take all that it was told, and may now
	failed             chan error    // something that the daemon cannot go on without
	state              *state

	stateLock *lock.Folder // nil: there is no state directory
	kept      *config.Kept // where root keeps a copy of the configuration in force; nil: nowhere
	edits     edits

	reloading sync.Mutex // one reload at a time

	mu          sync.Mutex // protects what follows
	inForce     inForce
	unnoted     error  // why what is in force could not be recorded
	fault       string // why the last reload changed nothing
	faultOn     time.Time
	limitations []attest.Limitation
}

// start makes every part and begins to serve.
func start(ctx context.Context, f flags, log *zap.Logger, level zap.AtomicLevel) (_ *daemon, err error) {
	d := &daemon{
		flags: f, log: log, kept: keptBy(os.Getenv(stateVariable)),
		signals: make(chan os.Signal, 4), changed: make(chan struct{}, 1), limitationsChanged: make(chan struct{}, 1),
		lacking: make(chan struct{}, 1), untold: make(chan struct{}, 1), failed: make(chan error, 1),
	}
	// Before any socket is there: a signal that comes early is kept, not the end of the process.
	signal.Notify(d.signals, syscall.SIGHUP, syscall.SIGTERM, syscall.SIGINT)
	d.reloading.Lock() // a reload that is asked for early waits until there is something to reload
	defer d.reloading.Unlock()
	given, err := d.fromSystemd()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			given.Close()
			d.release()
		}
	}()
	var held *socket.Dir
	if err := d.whileHeld(ctx, func() (err error) {
		held, err = socket.Lock(f.runtimeDir, api.ModulesDirName)
		return err
	}); err != nil {
		return nil, err
	}
	d.sockets = &sockets{
		dir: held, log: log, failed: d.failed, changed: d.noteChange, notify: d.notify,
		room: max(0, systemd.StoreRoom()-store.HandoffRoom), modules: make(map[string]*socket.Listener),
		giver: filepath.Join(f.runtimeDir, api.FoldersSocketName),
	}
	c := d.configure()
	d.hub = &iotHub{ // before the agent, whose changes it is told of
		status: func() api.Status { return d.server.Status(d.describe()) }, log: log,
		level: level, least: level.Level(), changed: d.noteChange,
	}
	options := agent.Options{
		Fetch: d.backend.fetch, Simulated: d.backend.simulated(), Clock: d.backend.clock, Rules: c.Rules,
		Log: log, Changed: d.agentChanged,
	}
	if err := d.openState(ctx, whyTokensWait(c), &options, given.Files); err != nil {
		return nil, err
	}
	if d.agent, err = agent.New(options); err != nil {
		return nil, err
	}
	d.unnoted = d.note(d.inForce)
	d.callers = attest.New(attest.Options{
		TrustOwnUser: os.Getenv(stateVariable) == "", // which systemd sets for the service
		Changed:      func() { signalOn(d.limitationsChanged) },
	})
	d.callers.SetRules(c.CallerRules())
	d.loop = &loopback{stateDir: d.flags.stateDir, log: log, changed: d.noteChange}
	d.server = &server.Server{
		Agent: d.agent, Callers: d.callers, Reload: d.reload, Describe: d.describeNow, Log: log,
		Now:    d.backend.clock.Wall,
		Limits: callerLimits(c.Callers.PerSecond, len(c.Modules())), Loopback: d.loop.now,
		ConnectionsChanged: d.noteChange,
	}
	d.sockets.server, d.loop.server = d.server, d.server
	d.hub.agent = d.agent
	d.teller = &statusTeller{notify: d.notify, text: d.statusText}
	if d.within == 0 && d.notify.Enabled() {
		d.teller.again = d.recheck
	}
	return d, d.listen(given.Listeners)
}

// callerLimits is what one caller may take, beside so many modules' sockets. Two seconds' worth of requests may come at
// once.
func callerLimits(perSecond, modules int) server.Limits {
	limits := connectionLimits(modules)
	limits.PerSecond, limits.Burst = perSecond, 2*perSecond
	return limits
}

// connectionLimits leaves at least a quarter of the descriptors that this process may have, and that modules' sockets
// do not take, to everything else: the cache's files, the back end, the listeners of modules that a reload adds.
func connectionLimits(modules int) server.Limits {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return server.Limits{}
	}
	return server.Limits{}.Within(descriptorsOfCallers(files.Cur, modules))
}

// descriptorsOfCallers is how many of this process's descriptors callers may take together.
func descriptorsOfCallers(all uint64, modules int) int {
	return max(0, int(min(all, math.MaxInt32))-modules*moduleDescriptors) / 4 * 3
}

// configure decides what is in force, and makes the back end that it names.
func (d *daemon) configure() config.Config {
	made := os.Getenv(stateVariable)
	if d.kept != nil {
		d.flags.placeState(config.ManagedIdentity, made) // where the record of what was in force is
	}
	d.inForce = d.begin()
	c := d.inForce.config
	d.flags.placeState(c.Source.Kind, made)
	d.backend = newBackend(c.Source, d.log)
	d.started = d.backend.clock.Wall()
	if d.inForce.since.IsZero() {
		d.inForce.since = d.started
	}
	return c
}

// whyTokensWait is why tokens that were kept are not taken over yet; nil: they are.
func whyTokensWait(c config.Config) error {
	switch {
	case c.Rules.NoRules != "":
		return errors.New("no configuration is in force")
	case c.Source.Fault != "":
		return errors.New("[source] of the configuration cannot be used")
	}
	return nil
}

// fromSystemd reads what the service manager passed, before anything else reads the environment.
func (d *daemon) fromSystemd() (_ systemd.Given, err error) {
	if d.notify, err = systemd.NotifyFromEnvironment(); err != nil {
		d.log.Warn("systemd cannot be told of readiness and status", zap.Error(err))
	}
	if d.within, err = systemd.WatchdogInterval(); err != nil {
		d.log.Warn("systemd's watchdog cannot be fed", zap.Error(err))
	}
	given, err := systemd.Passed(systemd.Names{
		Sockets: []string{systemd.TokenSocket,
			systemd.AdminSocket}, StoredSockets: storedModule, StoredFiles: store.HandoffPrefix,
	})
	if len(given.Unknown) > 0 {
		d.log.Warn("descriptors that nobody knows were closed", zap.Strings("names", given.Unknown))
		d.told(discardUnknown(d.notify, given.Unknown, given.Listeners))
	}
	return given, err
}

// listen opens every socket and answers on them.
func (d *daemon) listen(given map[string]*net.UnixListener) error {
	token, admin, err := d.sockets.open(given)
	if err != nil {
		return err
	}
	d.sockets.begin(given, d.inForce.config.Modules())
	d.loop.set(d.inForce.config.Loopback.Address, d.agent.Grants())
	d.sockets.serve(token, admin)      // so late that whoever gets an answer finds the modules' sockets
	d.hub.set(d.inForce.config.IoTHub) // which nobody waits for
	return nil
}

// release lets go of what start took, in the opposite order.
func (d *daemon) release() {
	signal.Stop(d.signals)
	if d.teller != nil {
		d.teller.stop()
	}
	if d.loop != nil {
		d.loop.close()
	}
	if d.hub != nil {
		d.hub.end()
	}
	if d.agent != nil {
		d.agent.Close()
	}
	if d.callers != nil {
		d.callers.Close()
	}
	if d.backend != nil {
		d.backend.close()
	}
	if d.sockets != nil {
		_ = d.sockets.dir.Close()
	}
	_ = d.stateLock.Close()
}

// agentChanged has the status be told anew, to systemd and to IoT Hub.
func (d *daemon) agentChanged() {
	d.noteChange()
	d.hub.notice()
}

// noteChange makes the status text be told anew.
func (d *daemon) noteChange() { signalOn(d.changed) }

// serve runs until a signal or ctx ends it, and returns nil when that was in order.
func (d *daemon) serve(ctx context.Context) error {
	watched, unwatch := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() { d.notify.Watch(watched, d.within, d.selfCheck, d.reportSelfCheck) })
	defer watch.Wait()
	defer unwatch()

	d.announce()
	signalOn(d.limitationsChanged) // only now: an engine that the question starts may wait until systemd has d ready
	for {
		select {
		case <-ctx.Done():
			return d.stop("the context ended")
		case s := <-d.signals:
			if s != syscall.SIGHUP {
				return d.stop(s.String())
			}
			_, _ = d.reload(ctx) // its outcome is in the log and in the status
		case <-d.changed:
			d.tellStatus()
		case <-d.limitationsChanged:
			d.updateLimitations(ctx)
			d.tellStatus()
		case <-d.lacking:
			d.sockets.mend()
			d.tellStatus()
		case <-d.untold:
			d.sockets.catchUp()
			d.ready()
			d.tellStatus()
		case err := <-d.failed:
			return errors.Join(err, d.stop("a socket failed"))
		}
	}
}

// announce tells systemd and people that the daemon serves.
func (d *daemon) announce() {
	d.tellStatus()
	d.ready()
	from := d.backend.status()
	fields := []zap.Field{
		zap.String("version", versionName()), zap.String("source", from.Kind), zap.String("endpoint", from.Endpoint),
		zap.String("address", from.Address), zap.String("runtime_dir", d.flags.runtimeDir), zap.String("config",
			strings.Join(d.describe().Config.Files, " ")),
	}
	d.mu.Lock()
	c := d.inForce
	d.mu.Unlock()
	d.warn(c.config.Warnings)
	c.log(d.log)
	if d.backend.simulated() {
		d.log.Warn("SIMULATED back end: its tokens open nothing; "+simulator.Steerers+" can steer it", fields...)
		return
	}
	d.log.Info("serving", fields...)
}

// recheck has the status text follow what comes and goes without an event: a module's socket that is removed, trouble
// that is over by the time alone. An engine is asked only while it is trouble: asking starts those that end when they
// are idle.
func (d *daemon) recheck() {
	if d.sockets.lacking() {
		signalOn(d.lacking)
	}
	d.mu.Lock()
	limited := len(d.limitations) > 0
	d.mu.Unlock()
	if limited {
		signalOn(d.limitationsChanged)
		return
	}
	d.noteChange()
}

// selfCheck is what feeds the watchdog: the cache's lock and schedule move, and the daemon's own
// socket answers.
func (d *daemon) selfCheck(ctx context.Context) error {
	defer d.recheck()
	if err := d.agent.Ping(ctx); err != nil {
		return err
	}
	return d.sockets.check(ctx)
}

func (d *daemon) reportSelfCheck(err error) {
	d.log.Error("the self-check failed: systemd will restart the daemon if it goes on", zap.Error(err))
}

// stop drains the requests under way and releases everything.
func (d *daemon) stop(why string) error {
	d.log.Info("stopping", zap.String("why", why))
	d.told(d.notify.Stopping())
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	d.sockets.leaveStored()
	d.loop.stop()
	var hub sync.WaitGroup
	hub.Go(d.hub.end) // before the agent is closed, and while requests end
	giveUp := time.AfterFunc(backEndTimeout, d.agent.Close)
	defer giveUp.Stop()
	if err := d.server.Shutdown(ctx); err != nil {
		d.log.Warn("requests were cut off", zap.Error(err))
	}
	d.sockets.serving.Wait()
	hub.Wait()
	d.release()
	d.log.Info("stopped")
	return nil
}
