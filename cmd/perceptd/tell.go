package main

import (
	"errors"
	"time"

	"go.uber.org/zap"

	"perceptd/systemd"
)

// notifyRetryInterval is how soon systemd, whose queue was full, is told again that the daemon serves, and what to
// keep of it.
const notifyRetryInterval = time.Second

// ready says that the daemon serves, after a start and after a reload, which systemd gives up when it is not told. When
// its queue is full it is told again, and so it is of the sockets that it did not take.
func (d *daemon) ready() {
	err := d.notify.Ready()
	d.told(err)
	if errors.Is(err, systemd.ErrBusy) || d.sockets.behind() {
		time.AfterFunc(notifyRetryInterval, func() { signalOn(d.untold) })
	}
}

func (d *daemon) tellStatus() { d.told(d.teller.tell()) }

// warn notes what is in force, and is not as it should be.
func (d *daemon) warn(warnings []string) {
	for _, warning := range warnings {
		d.log.Warn("the configuration is open to a group", zap.String("what", warning))
	}
}

// signalOn leaves a signal on a channel that holds one.
func signalOn(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
