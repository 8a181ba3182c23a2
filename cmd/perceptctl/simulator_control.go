package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"

	"github.com/spf13/cobra"

	"perceptd/agent/client"
	"perceptd/agent/simulator"
)

// simulatorVariable names the URL of a simulated back end that runs.
const simulatorVariable = simulator.URLVariable

const maxControlAnswer = 4 << 20 // bytes; a full state is far below

// atFlag adds the flag by which the verbs that steer a simulated back end find it.
func (a *app) atFlag(command *cobra.Command, at *string) {
	command.Flags().StringVar(at, "at", a.getenv(simulatorVariable),
		"`URL` of the simulated back end; $"+simulatorVariable+" sets the default")
}

// steer asks the simulated back end at that URL and decodes what it says into answer. A nil body is
// not sent, a nil answer not read.
func (a *app) steer(ctx context.Context, at, method, path string, body, answer any) error {
	if err := checkSimulatorURL(at); err != nil {
		return &usageError{err}
	}
	ctx, cancel := a.patience(ctx)
	defer cancel()
	var content io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(ctx, method, at+"/simulator/"+path, content)
	if err != nil {
		return err
	}
	request.Header.Set("Simulator-Control", "true")
	transport := &http.Transport{DisableKeepAlives: true} // and no proxy
	response, err := transport.RoundTrip(request)
	if err != nil {
		return simulatorUnreachable(ctx, at, err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, maxControlAnswer))
	if err != nil {
		return simulatorUnreachable(ctx, at, err)
	}
	return understand(at, response.StatusCode, text, answer)
}

// understand decodes an answer, or makes an error of it.
func understand(at string, status int, text []byte, answer any) error {
	var refusal struct{ Error string }
	switch {
	case status == http.StatusNoContent, status == http.StatusOK && answer == nil:
		return nil
	case status == http.StatusOK:
		if json.Unmarshal(text, answer) == nil {
			return nil
		}
	case json.Unmarshal(text, &refusal) == nil && refusal.Error != "":
		return errors.New(refusal.Error)
	}
	return fmt.Errorf("what answers at %s is no simulated back end", at)
}

// checkSimulatorURL refuses whatever is not a simulated back end's URL: they are on loopback.
func checkSimulatorURL(at string) error {
	if at == "" {
		return errors.New("which simulated back end? --at or $" + simulatorVariable + " must say")
	}
	target, err := url.Parse(at)
	if err != nil {
		return fmt.Errorf("--at %q is no URL", at)
	}
	address, err := netip.ParseAddr(target.Hostname())
	if target.Scheme != "http" || target.Path != "" || err != nil || !address.IsLoopback() {
		return fmt.Errorf("--at %q is no simulated back end's: it would be like http://127.0.0.1:40342", at)
	}
	return nil
}

func simulatorUnreachable(ctx context.Context, at string, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	var dial *net.OpError
	if errors.As(err, &dial) {
		err = dial.Err
	}
	return &hintedError{
		&client.UnreachableError{Socket: at, Err: err},
		"no simulated back end is there: perceptctl simulate starts one and prints its URL",
	}
}
