// Package systemd is the daemon's side of its unit files, which stand beside it: readiness and status
// (Notify), the watchdog, the sockets that systemd made (Passed) and the journal (NewJournal).
//
// Outside systemd everything is quiet: a Notify that sends nowhere, no watchdog, no listeners, and log
// lines on stderr. What systemd passes in the environment is read once, checked, and taken out, so that
// no child process takes it for its own.
//
// The caller reads the environment (NotifyFromEnvironment, WatchdogInterval, Passed) once at its
// start, before there are goroutines that read it too, and passes the values on.
package systemd
