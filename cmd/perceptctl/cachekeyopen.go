package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"perceptd/agent/binding"
	"perceptd/agent/store"
)

const (
	// openTimeout is how long one try to open the key may take: perceptd waits for the first.
	openTimeout = 20 * time.Second
	// endTimeout is how long a try is waited for that is to end.
	endTimeout = 2 * time.Second
	// soonestOpening and latestOpening are how far apart tries to open the key are: each pause is twice the one before.
	soonestOpening, latestOpening = time.Second, 5 * time.Minute
	// statusNext is what is between cause and mend in the status that systemd shows of the unit.
	statusNext = ". Next: "
)

func (a *app) cacheKeyOpenCommand(key *cacheKey) *cobra.Command {
	return &cobra.Command{
		Use:   "open",
		Short: "open the sealed key for perceptd, as " + cacheKeyUnit + " does",
		Long: `Open the sealed key, and put it where perceptd finds it: in $RUNTIME_DIRECTORY, a
folder in memory that systemd makes and removes; and beside it digests of what the
device is known by, some of which only root can read: kept tokens are bound to it.
` + cacheKeyUnit + ` runs it before perceptd starts.

Where the key may open later, since the TPM is locked out, out of sessions or not
there yet, the unit counts as started after the first try. The next follow after
1 second, 2, 4, up to 5 minutes, and perceptd takes the key when it is open. A try
does not count as a guess at the TPM.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context) error { return a.openCacheKey(ctx, *key) }),
	}
}

func (a *app) openCacheKey(ctx context.Context, key cacheKey) error {
	folder := a.getenv("RUNTIME_DIRECTORY")
	if folder == "" {
		return &hintedError{errors.New("$RUNTIME_DIRECTORY is not set"),
			"systemctl restart perceptd-cache-key opens the key"}
	}
	unit := notified{a.getenv("NOTIFY_SOCKET")}
	known := binding.Text(binding.Here("/"))
	if err := writeAtomically(filepath.Join(folder, "device"), []byte(known), 0o440, -1); err != nil {
		return needsRoot(err)
	}
	_, err := os.ReadFile(key.credential())
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(key.file); err == nil {
			return unit.tell("READY=1") // it is in the clear, and perceptd reads it there
		}
	}
	if err != nil {
		return needsRoot(err)
	}
	var secret []byte
	o := &opening{file: key.credential(), unseal: a.unseal}
	fault := a.openUntilOpen(ctx, key, folder, unit, func(ctx context.Context) (fault *sealFault) {
		secret, fault = o.try(ctx)
		return fault
	})
	switch {
	case ctx.Err() != nil && unit.here():
		return nil // systemd stops it
	case fault != nil:
		return &hintedError{fmt.Errorf("the key in %s cannot be opened, and tokens are not kept over a reboot: %s",
			key.credential(), fault.why), fault.next}
	}
	defer clear(secret)
	if err := writeAtomically(filepath.Join(folder, "key"), secret, 0o440, -1); err != nil {
		return needsRoot(err)
	}
	_ = os.Remove(filepath.Join(folder, waitingName)) // the key counts before it
	return unit.tell("READY=1\nSTATUS=the key is open")
}

// waitingName is the file in which perceptd reads why the key is not open yet.
const waitingName = "waiting"

// openUntilOpen tries to open the key: once, or, where a unit does it, until it is open (nil) or can never be. It says
// why the key is not open yet to systemd, to perceptd, and in the journal where that is news.
func (a *app) openUntilOpen(
	ctx context.Context, key cacheKey, folder string, unit notified, try func(context.Context) *sealFault,
) *sealFault {
	if !unit.here() {
		return try(ctx)
	}
	said := ""
	fault := retryOpening(ctx, try, func(f *sealFault) {
		if f.why == said {
			return
		}
		said = f.why
		err := errors.Join(writeAtomically(filepath.Join(folder, waitingName), []byte(f.why+"\n"), 0o440, -1),
			unit.tell("READY=1\nSTATUS="+f.why+statusNext+f.next))
		a.remark("the key in %s is not open yet: %s; %s", key.credential(), f.why, f.next)
		a.remarkFailure(err)
	})
	if fault != nil && ctx.Err() == nil {
		a.remarkFailure(unit.tell("STATUS=" + fault.why + statusNext + fault.next))
	}
	return fault
}

// remark writes a line to the journal, or to who runs it.
func (a *app) remark(format string, of ...any) {
	_, _ = fmt.Fprintf(a.stderr, format+"\n", of...) // as little can be done as about the error that ends it
}

// remarkFailure says that perceptd or systemd was not told. The key is tried all the same.
func (a *app) remarkFailure(err error) {
	if err != nil {
		a.remark("why the key is not open could not be told: %v", err)
	}
}

// retryOpening tries until the key is open (nil), can never be, or ctx ends. waits is called before each pause.
func retryOpening(
	ctx context.Context, try func(context.Context) *sealFault, waits func(*sealFault),
) *sealFault {
	for pause := soonestOpening; ; pause = min(2*pause, latestOpening) {
		fault := try(ctx)
		if fault == nil || fault.final || ctx.Err() != nil {
			return fault
		}
		waits(fault)
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fault
		}
	}
}

// opening opens the sealed key in a file, one try at a time.
type opening struct {
	file   string
	unseal func(ctx context.Context, sealed []byte) ([]byte, error)

	// under is where the try under way leaves its result. A program that waits for a TPM within the kernel does not end
	// when it is killed: no other is started beside it.
	under chan opened
	of    []byte // what that try opens
}

// opened is the result of a try.
type opened struct {
	secret []byte
	err    error
}

// try opens the key once, and takes little longer than openTimeout, whatever the TPM does.
func (o *opening) try(ctx context.Context) ([]byte, *sealFault) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	if o.under == nil {
		sealed, err := os.ReadFile(o.file) // at each try: it may have been replaced
		if err != nil {
			return nil, &sealFault{why: err.Error(), next: "systemctl restart perceptd-cache-key, once it is there"}
		}
		under := make(chan opened, 1)
		o.under, o.of = under, sealed
		go func() {
			secret, err := o.unseal(ctx, sealed)
			under <- opened{secret, err}
		}()
	}
	result, ended := o.await(ctx)
	if !ended {
		return nil, new(sealFaultOf(ctx.Err()))
	}
	if result.err != nil {
		return nil, new(sealFaultOf(result.err))
	}
	if now, err := os.ReadFile(o.file); err != nil || !bytes.Equal(now, o.of) {
		clear(result.secret)
		return nil, &sealFault{why: "the sealed key was replaced while it was opened", next: "wait: it is opened again"}
	}
	if _, err := store.KeyOf(result.secret); err != nil {
		return nil, &sealFault{why: "what was sealed is not a key: " + err.Error(), next: replaceHint, final: true}
	}
	return result.secret, nil
}

// await waits until the try under way has ended, or has been told to for endTimeout.
func (o *opening) await(ctx context.Context) (result opened, ended bool) {
	select {
	case result = <-o.under:
	case <-ctx.Done():
		timer := time.NewTimer(endTimeout)
		defer timer.Stop()
		select {
		case result = <-o.under:
		case <-timer.C:
			return opened{}, false
		}
	}
	o.under = nil
	return result, true
}

// notified is the socket of a service manager that is told how the unit is (sd_notify(3)); empty: there is none.
type notified struct{ socket string }

func (n notified) here() bool { return n.socket != "" }

func (n notified) tell(state string) error {
	if !n.here() {
		return nil
	}
	connection, err := net.Dial("unixgram", n.socket)
	if err != nil {
		return err
	}
	_, err = connection.Write([]byte(state))
	return errors.Join(err, connection.Close())
}
