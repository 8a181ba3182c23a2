package client_test

import (
	"errors"
	"net/http"
	"testing"

	"perceptd/agent/api"
	"perceptd/agent/client"
)

func TestWhoAmIAndGrants(t *testing.T) {
	t.Parallel()
	asked := make(chan string, 1)
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		asked <- r.Method + " " + r.RequestURI
		answer(w, 200, "application/json",
			`{"proved":true,"allowed":true,"grants":[{"number":3,"caller":"module vision"}],"reason":"because"}`)
	})
	who, err := c.WhoAmI(t.Context())
	if got := <-asked; err != nil || !who.Proved || who.Grants[0].Number != 3 || got != "GET /v1/whoami" {
		t.Errorf("%s: %+v, %v", got, who, err)
	}
	grants, err := c.Grants(t.Context())
	if got := <-asked; err != nil || grants.Grants[0].Caller != "module vision" || got != "GET /v1/grants" {
		t.Errorf("%s: %+v, %v", got, grants, err)
	}
	zero, some := uint32(0), uint32(44)
	for _, row := range []struct {
		who      client.Subject
		identity string
		want     string
	}{
		{client.Subject{Module: "vision"}, "", "module=vision&resource=api%3A%2F%2Fx"},
		{client.Subject{Module: "vision"}, "device", "identity=device&module=vision&resource=api%3A%2F%2Fx"},
		{client.Subject{Image: "sha256:0"}, "", "container_image=sha256%3A0&resource=api%3A%2F%2Fx"},
		{client.Subject{Unit: "cam", UID: &zero, GID: &some}, "", "gid=44&resource=api%3A%2F%2Fx&uid=0&unit=cam"},
		{client.Subject{GID: &some, Groups: []uint32{0, 7}}, "", "gid=44%2C0%2C7&resource=api%3A%2F%2Fx"},
		{client.Subject{Groups: []uint32{7}}, "", "resource=api%3A%2F%2Fx"},
		{client.Subject{}, "", "resource=api%3A%2F%2Fx"},
	} {
		d, err := c.CheckGrants(t.Context(), row.who, "api://x", row.identity)
		if got := <-asked; err != nil || !d.Allowed || d.Reason != "because" ||
			got != "GET /v1/grants/check?"+row.want {
			t.Errorf("%s: %+v, %v", got, d, err)
		}
	}
}

func TestLoopback(t *testing.T) {
	t.Parallel()
	asked := make(chan string, 1)
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		asked <- r.Method + " " + r.RequestURI
		answer(w, 200, "application/json",
			`{"identity_endpoint":"http://127.0.0.1:40380/msi/token","identity_header":"00","grant":"module vision"}`)
	})
	told, err := c.Loopback(t.Context())
	if got := <-asked; err != nil || told.Header != "00" || told.Grant != "module vision" || got != "GET /v1/loopback" {
		t.Errorf("%s: %+v, %v", got, told, err)
	}
	told, err = c.LoopbackOf(t.Context(), client.Subject{Unit: "cam"})
	if got := <-asked; err != nil || told.Endpoint != "http://127.0.0.1:40380/msi/token" ||
		got != "GET /v1/loopback?unit=cam" {
		t.Errorf("%s: %+v, %v", got, told, err)
	}
}

func TestGrantsThatAreRefused(t *testing.T) {
	t.Parallel()
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		answer(w, 400, "application/problem+json", `{"detail":"tags move","code":"bad_request"}`)
	})
	for name, call := range map[string]func() error{
		"whoami":      func() error { _, err := c.WhoAmI(t.Context()); return err },
		"grants":      func() error { _, err := c.Grants(t.Context()); return err },
		"loopback":    func() error { _, err := c.Loopback(t.Context()); return err },
		"loopback of": func() error { _, err := c.LoopbackOf(t.Context(), client.Subject{}); return err },
		"check": func() error {
			_, err := c.CheckGrants(t.Context(), client.Subject{Image: "cam:2"}, "api://x", "")
			return err
		},
	} {
		var refusal *client.Error
		if err := call(); !errors.As(err, &refusal) || refusal.Code != api.CodeBadRequest || refusal.Status != 400 {
			t.Errorf("%s: %v", name, err)
		}
	}
}
