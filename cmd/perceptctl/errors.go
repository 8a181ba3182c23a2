package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strings"
	"syscall"

	"perceptd/agent/api"
	"perceptd/agent/client"
	"perceptd/agent/explain"
	"perceptd/cmd/perceptctl/term"
)

// The exit status, which is part of the interface: exitStatus decides it, exitHelp documents it.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2
	exitUnreachable = 3
	exitDenied      = 4
	exitTrouble     = 5
	exitInterrupted = 130
)

const exitHelp = `Exit status:
  0    all is well
  1    perceptd answered with an error, or something else went wrong
  2    the command line is wrong
  3    perceptd cannot be reached, or did not answer in time
  4    perceptd denied it (403): a grant or a proof of the caller is missing,
       a revocation withholds the token, or a deny rule takes it away
  5    perceptd answered, and needs a person: not ready, trouble, a refresh that failed,
       a policy change or deny rule that could not be written to the disk
  130  interrupted
exec ends with its command's status, and with 125 where exec itself failed, 126 where
the command cannot be started, 127 where there is none.
`

// exitStatus is the one place that turns an error into an exit status.
func exitStatus(err error) int {
	var usage *usageError
	var trouble *troubleError
	var unreachable *client.UnreachableError
	var refusal *client.Error
	var own *statusError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &own):
		return own.status
	case errors.As(err, &usage):
		return exitUsage
	case errors.As(err, &trouble):
		return exitTrouble
	case errors.As(err, &unreachable):
		return exitUnreachable
	case errors.As(err, &refusal) && refusal.Status == http.StatusForbidden:
		return exitDenied
	case errors.Is(err, context.Canceled):
		return exitInterrupted
	}
	return exitError
}

// usageError is a wrong command line.
type usageError struct{ error }

func (e *usageError) Unwrap() error { return e.error }

// troubleError ends a verb whose output says already what is wrong.
type troubleError struct{}

func (*troubleError) Error() string { return "perceptd needs a person" }

func troubleIf(trouble bool) error {
	if trouble {
		return &troubleError{}
	}
	return nil
}

// printTrouble writes an answer that needs a person.
func (a *app) printTrouble(text string) error {
	if err := a.print(text); err != nil {
		return err
	}
	return &troubleError{}
}

// hintedError is an error whose verb knows best what to do about it.
type hintedError struct {
	error
	hint string
}

func (e *hintedError) Unwrap() error { return e.error }

// statusError ends the program with a status of its own.
type statusError struct {
	cause  error // nil: the command has ended so, and said all there is to say
	status int
}

func (e *statusError) Error() string {
	if e.cause == nil {
		return fmt.Sprintf("the command ended with status %d", e.status)
	}
	return e.cause.Error()
}

func (e *statusError) Unwrap() error { return e.cause }

// deniedError ends a verb that has shown a denial, with the error of a denied request.
func deniedError(code api.Code, detail string) error {
	return &client.Error{Problem: api.Problem{Status: http.StatusForbidden, Code: code, Detail: detail}}
}

// report prints err, unless the verb's output has said it all, and what to do about it.
func (a *app) report(err error) {
	var trouble *troubleError
	var ended *statusError
	if err == nil || errors.As(err, &trouble) || errors.As(err, &ended) && ended.cause == nil {
		return
	}
	// Nothing is left to do when standard error cannot be written.
	_, _ = io.WriteString(a.stderr, a.errorText(a.screen(a.stderr), err))
}

func (a *app) errorText(s screen, err error) string {
	if errors.Is(err, context.Canceled) {
		return "perceptctl: interrupted\n"
	}
	text := fmt.Sprintf("%s %s\n", s.Paint(term.Bad, "perceptctl:"), term.CleanLines(err.Error()))
	if hint := a.hint(err); hint != "" {
		text += fmt.Sprintf("%s %s\n", s.Paint(term.Warning, "hint:"), hint)
	}
	return text
}

// hint returns what to do about err, or "" when the error says all there is to say.
func (a *app) hint(err error) string {
	var hinted *hintedError
	var usage *usageError
	var unreachable *client.UnreachableError
	var foreign *client.ContractError
	var refusal *client.Error
	switch {
	case errors.As(err, &hinted):
		return hinted.hint
	case errors.As(err, &usage):
		return "perceptctl --help shows the verbs, perceptctl VERB --help its flags"
	case errors.As(err, &unreachable):
		return a.unreachableHint(unreachable)
	case errors.As(err, &foreign):
		return "perceptctl version tells both versions: systemctl restart perceptd starts the one that is installed; " +
			"a container that was made before the upgrade has its perceptctl of before until it is made anew"
	case errors.As(err, &refusal):
		return refusalHint(refusal)
	}
	return ""
}

func (a *app) unreachableHint(err *client.UnreachableError) string {
	isAdmin := err.Socket == a.client.AdminSocketPath()
	absent := errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
	switch {
	case errors.Is(err, fs.ErrPermission) && isAdmin:
		return "the admin socket is for group percept-admin: join it (sudo usermod -aG percept-admin $USER, then " +
			"log in again) or use sudo"
	case errors.Is(err, fs.ErrPermission):
		return "connecting needs write permission on the socket and search permission on the folders above it"
	case errors.Is(err, context.DeadlineExceeded):
		return "perceptd did not answer in time: journalctl -u perceptd tells why, --timeout gives it longer"
	case absent && err.Socket != api.DefaultTokenSocket && err.Socket != api.DefaultAdminSocket:
		return "perceptd is not running here (systemctl status perceptd), or its sockets are elsewhere: --socket, " +
			"--admin-socket, $" + api.SocketVariable
	case absent && isAdmin:
		return "perceptd is not running here: systemctl status perceptd; there is no admin socket inside a module's " +
			"container"
	case absent:
		return "perceptd is not running here: systemctl status perceptd; in a container, mount the module's folder at " +
			api.RuntimeDir
	}
	return "the connection broke: systemctl status perceptd tells whether that is perceptd, journalctl -u perceptd " +
		"what it did"
}

// refusalHint adds to the daemon's detail what can be done from the command line.
func refusalHint(err *client.Error) string {
	choices := cleanList(err.Choices)
	switch err.Code {
	case api.CodeUnknownIdentity, api.CodeAmbiguous:
		if choices == "" {
			return "perceptctl status lists the identities; name one with --identity"
		}
		return "name one with --identity: " + choices
	case api.CodeNotGranted:
		if err.NearMiss != nil {
			return "" // the detail says what to do
		}
		return "perceptctl status lists the identities, and the files of the configuration, where grants are"
	case api.CodeFaultyGrant, api.CodeNoConfiguration:
		return "sudo perceptd --check, on the device, names every fault of the configuration; once it is mended: " +
			"sudo perceptctl reload"
	case api.CodeUnknownCaller:
		return "perceptctl whoami, run by the same caller, tells what is missing"
	case api.CodeForeignOrigin:
		return "ask the socket directly, not through a proxy or a browser"
	case api.CodeShortLife:
		return "ask for less with --min-ttl; perceptctl status shows when the next refresh is due"
	case api.CodeNotYet:
		return "wait for it with --wait 10m; perceptctl explain RESOURCE tells when one is expected"
	case api.CodeRevoked:
		return "perceptctl explain RESOURCE tells until when; perceptctl policy-changes lists the revocation"
	case api.CodeDenied:
		return "perceptctl deny, on the device and by an administrator, lists the deny rules and who set them"
	case api.CodeDenyRulesLost:
		return "perceptctl doctor, on the device and by an administrator, tells what ends that"
	case api.CodeTooManyDenyRules:
		return "perceptctl deny lists them; lift some, or deny more with one rule, as --module without --resource"
	case api.CodeUnknownDenyRule:
		return "perceptctl deny lists the IDs"
	case api.CodeNoLoopback:
		return "docs/security.md tells what a loopback listener is worth; a program that is started by perceptctl " +
			"exec needs none"
	case api.CodeFutureChange:
		return "check --at and its time zone, and this device's clock (timedatectl)"
	case api.CodeTooManyChanges:
		return "perceptctl policy-changes lists them; withdraw some, or enter one for --all-resources"
	case api.CodeUnknownChange:
		return "perceptctl policy-changes lists the IDs; a change goes off the record by itself in the end"
	case api.CodeThrottled, api.CodeBusy:
		if err.RetryAfter > 0 {
			return fmt.Sprintf("ask again in %s", explain.Duration(err.RetryAfter))
		}
		return "ask again later, and less often"
	case api.CodeUnreachable:
		return "check the device's network, the endpoint, and whether a proxy or a filter answers in its place; " +
			"perceptctl status shows when perceptd tries again"
	case api.CodeMalformedAnswer:
		return "check this device's clock (timedatectl) and [source] endpoint in the configuration, and what " +
			"answers there"
	case api.CodeIdentityNotFound:
		return "assign the identity to this device in Azure, or correct its ID in the configuration, whose files " +
			"perceptctl status names"
	case api.CodeRefused:
		return "check that the resource exists in the tenant and that the identity may have tokens for it"
	case api.CodeInvalidConfig:
		return "the configuration in force is unchanged; perceptd --check shows every fault"
	case api.CodeInternal:
		return "journalctl -u perceptd tells more"
	case api.CodeUnknownPath, api.CodeMethod, "":
		return "do perceptctl and perceptd differ? perceptctl version shows both"
	}
	return ""
}

func cleanList(words []string) string { return term.Clean(strings.Join(words, ", ")) }
