package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"perceptd/agent/identityproxy"
)

// The exit status of exec where it is not the command's: that of a shell, and of env(1).
const (
	exitExec     = 125 // exec itself failed
	exitCannot   = 126 // the command cannot be started
	exitNotFound = 127 // there is no such command
)

func (a *app) execCommand() *cobra.Command {
	var arc bool
	command := &cobra.Command{
		Use:   "exec [--arc] -- COMMAND [ARGUMENT...]",
		Short: "run a command whose Azure SDK gets its tokens from perceptd",
		Long: `Run a command with an identity endpoint of its own: that of Azure App Service, on a
loopback port of this network namespace, which hands each request on to perceptd's
token socket. Azure SDKs find it by IDENTITY_ENDPOINT and IDENTITY_HEADER, which are
set, and need no change. What would lead them elsewhere is taken out of the
environment; AZURE_CLIENT_ID is kept, which chooses a user-assigned identity.

It is fit to be a container's first process: it passes signals on, reaps what the
command leaves behind, and ends with its status (128 and the signal's number where
one ended it). When it is killed, so is the command. It needs no root and, without
--arc, no disk that can be written. perceptd may come later, and may be restarted.`,
		Example: `  perceptctl exec -- python3 app.py
  docker run --name camera --network none \
    -v /run/percept/modules/camera:/run/percept:ro -v /usr/bin/perceptctl:/perceptctl:ro \
    --entrypoint /perceptctl IMAGE exec -- node app.js`,
		Args: cobra.MinimumNArgs(1),
		RunE: a.verbWithArgs(func(_ context.Context, args []string) error { return a.exec(args, arc) }),
	}
	command.Flags().BoolVar(&arc, "arc", false,
		"speak Azure Arc's form; its keys go to "+identityproxy.ArcKeyFolder)
	command.Flags().SetInterspersed(false) // the command's flags are its own
	return command
}

// exec runs a command beside an identity proxy, and returns how it ended as an error.
func (a *app) exec(args []string, arc bool) error {
	r, err := identityproxy.Listen(identityproxy.Options{Socket: a.client.TokenSocketPath(), Arc: arc})
	if err != nil {
		return &statusError{err, exitExec}
	}
	defer r.Close() // an error has no one left to go to
	environ := environment(a.environ, r.Variables())
	path, err := lookPath(args[0], environ)
	if err != nil {
		return err
	}
	go func() {
		if err := r.Serve(); err != nil {
			a.report(fmt.Errorf("no more tokens: %w", err))
		}
	}()
	status, err := runCommand(path, args, environ, r.Holder())
	switch {
	case err != nil:
		return err
	case status != 0:
		return &statusError{nil, status}
	}
	return nil
}

// environment is environ with variables that lead SDKs to the proxy, and without what leads them elsewhere.
func environment(environ, variables []string) []string {
	lead := []string{"IDENTITY_ENDPOINT", "IDENTITY_HEADER", "NO_PROXY", "no_proxy"}
	var noProxy string
	var kept []string
	for _, variable := range environ {
		name, value, _ := strings.Cut(variable, "=")
		if strings.EqualFold(name, "NO_PROXY") && noProxy == "" {
			noProxy = value
		}
		if !slices.Contains(lead, name) && !slices.Contains(otherSources, name) {
			kept = append(kept, variable)
		}
	}
	noProxy = addNoProxyHosts(noProxy)
	kept = append(kept, variables...)
	return append(kept, "NO_PROXY="+noProxy, "no_proxy="+noProxy)
}

// startError is why a command could not be started, with the status that shells give it.
func startError(name string, err error) error {
	status := exitCannot
	if errors.Is(err, errNoCommand) {
		status = exitNotFound
	}
	return &statusError{fmt.Errorf("cannot run %q: %w", name, err), status}
}

var errNoCommand = errors.New("there is no such command")

// unsearchableError is a folder of PATH that cannot be looked into. Shells find no command there, and neither does
// find.
type unsearchableError struct{ why error }

func (e *unsearchableError) Error() string {
	return fmt.Sprintf("%v; a folder of PATH cannot be looked into: %v", errNoCommand, e.why)
}

func (*unsearchableError) Is(target error) bool { return target == errNoCommand }

// lookPath returns the path of a command, as a shell does: by PATH where its name has no slash.
func lookPath(name string, environ []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, runnable(name, name)
	}
	var unfit, hidden error
	for _, folder := range filepath.SplitList(pathIn(environ)) {
		if folder == "" {
			folder = "."
		}
		path := folder + "/" + name
		_, unseen := os.Lstat(path)
		switch err := runnable(name, path); {
		case err == nil:
			return path, nil
		case errors.Is(err, errNoCommand):
		case unseen != nil:
			hidden = cmp.Or(hidden, error(&unsearchableError{unseen}))
		default:
			unfit = cmp.Or(unfit, err)
		}
	}
	return "", cmp.Or(unfit, startError(name, cmp.Or(hidden, errNoCommand)))
}

// pathIn returns PATH, or where the kernel's own shells look without it.
func pathIn(environ []string) string {
	for _, variable := range slices.Backward(environ) {
		if path, ok := strings.CutPrefix(variable, "PATH="); ok {
			return path
		}
	}
	return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}

// runnable returns why path is nothing that can be run, or nil.
func runnable(name, path string) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return startError(name, errNoCommand)
	case err != nil:
		return startError(name, err)
	case info.IsDir():
		return startError(name, errors.New("it is a folder"))
	}
	if err := unix.Access(path, unix.X_OK); err != nil {
		return startError(name, err)
	}
	return nil
}

// runCommand runs a command and returns its status. It passes signals on to it, and reaps whatever else ends that is
// this process's to reap, as a container's first process must.
//
// The command sends a secret to this process. When this process is killed, no stranger may listen in its place: so the
// command is killed too. The kernel spares those who have become another user, and knows nothing of the command's own
// children: all of them inherit the holder of the port, which stays taken as long as one of them lives.
func runCommand(path string, args, environ []string, holder *os.File) (status int, err error) {
	attr, shared := processGroup()
	attr.Pdeathsig = syscall.SIGKILL
	runtime.LockOSThread() // with this thread the command would end
	defer runtime.UnlockOSThread()
	inherited, err := unix.FcntlInt(holder.Fd(), unix.F_DUPFD, minHolderFD)
	if err != nil {
		return 0, &statusError{os.NewSyscallError("fcntl", err), exitExec}
	}
	defer syscall.Close(inherited)
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, forwardedSignals(shared)...)
	defer signal.Stop(signals)
	child, err := os.StartProcess(path, args, &os.ProcAttr{
		Env: environ, Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}, Sys: attr,
	})
	switch {
	case errors.Is(err, os.ErrNotExist): // it was there a moment ago
		return 0, startError(args[0], errors.New("its interpreter is missing"))
	case err != nil:
		return 0, startError(args[0], err)
	}
	pid := child.Pid
	_ = child.Release() // it is waited for below, as all others are
	ended := make(chan childExit, 1)
	go func() { ended <- reap(pid) }()
	for {
		select {
		case s := <-signals:
			if !shared || !slices.Contains(terminalSignals, s.(syscall.Signal)) {
				_ = syscall.Kill(pid, s.(syscall.Signal)) // it may have just ended
			}
		case r := <-ended:
			return r.status, r.err
		}
	}
}

// minHolderFD is the least descriptor that the holder of the port may have: the first ones mean something to some
// commands.
const minHolderFD = 64

// unforwarded are the signals that are about this process alone, or that no program sends.
var unforwarded = []syscall.Signal{
	syscall.SIGCHLD, syscall.SIGURG, syscall.SIGPIPE, syscall.SIGKILL, syscall.SIGSTOP, syscall.SIGILL, syscall.SIGTRAP,
	syscall.SIGABRT,
	syscall.SIGBUS, syscall.SIGFPE, syscall.SIGSEGV, syscall.SIGSYS, syscall.SIGPROF, syscall.SIGTTIN, syscall.SIGTTOU,
	32, 33, // the C library's
}

// terminalSignals are the signals that a terminal sends to all of the group in its foreground.
var terminalSignals = []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTSTP, syscall.SIGCONT,
	syscall.SIGWINCH}

// forwardedSignals returns the signals that this process passes on, or that the terminal sends to both. The command
// inherits those that this process was started to ignore; and where they share a group this process stops when the
// command does, for their shell to see.
func forwardedSignals(shared bool) (all []os.Signal) {
	for s := syscall.Signal(1); s <= 64; s++ {
		if !slices.Contains(unforwarded, s) && !signal.Ignored(s) && !(shared && s == syscall.SIGTSTP) {
			all = append(all, s)
		}
	}
	return all
}

// processGroup returns in which process group the command is to be, and whether that is this process's.
//
// The command must get the signal of a key once, so it is in a group of its own; but where a shell runs this process in
// its terminal's foreground they share the group, since the shell must see both stop.
func processGroup() (attr *syscall.SysProcAttr, shared bool) {
	front := inForeground()
	switch {
	case front && os.Getpid() == 1:
		return &syscall.SysProcAttr{Setpgid: true, Foreground: true, Ctty: int(os.Stdin.Fd())}, false
	case front:
		return &syscall.SysProcAttr{}, true
	}
	return &syscall.SysProcAttr{Setpgid: true}, false
}

// inForeground reports whether this process is in the foreground of the terminal that is its standard input.
func inForeground() bool {
	group, err := unix.IoctlGetInt(int(os.Stdin.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

type childExit struct {
	status int
	err    error
}

// reap waits for children until pid has ended.
func reap(pid int) childExit {
	for {
		var status syscall.WaitStatus
		one, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == syscall.EINTR:
			continue
		case err != nil:
			return childExit{err: &statusError{os.NewSyscallError("wait4", err), exitExec}}
		case one != pid:
			continue
		case status.Signaled():
			return childExit{status: 128 + int(status.Signal())}
		}
		return childExit{status: status.ExitStatus()}
	}
}
