package ctl_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moovm/moovm/ctl"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a machine that remembers what was asked of it.
type fake struct {
	mu    sync.Mutex
	asked []string
	state string
	fail  error
}

func (f *fake) note(format string, args ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, fmt.Sprintf(format, args...))
	return f.fail
}

func (f *fake) all() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.asked, " ")
}

func (f *fake) Status() ctl.Status {
	return ctl.Status{Version: "v1.2", State: "running", CPUs: 2, Memory: 512 << 20, Disks: []ctl.Disk{{Name: "vda", Path: "/a \"b\".cow", Size: 4096, Layers: 2}}}
}
func (f *fake) Pause() error       { return f.note("pause") }
func (f *fake) Resume() error      { return f.note("resume") }
func (f *fake) PowerButton() error { return f.note("button") }
func (f *fake) Reset() error       { return f.note("reset") }
func (f *fake) Stop() error        { return f.note("stop") }
func (f *fake) SnapshotDisks(_ context.Context, overlays map[string]string) ([]string, error) {
	err := f.note("snapshot %v", overlays)
	if err != nil {
		return []string{"vda"}, err
	}
	return []string{"vda"}, nil
}
func (f *fake) WriteMetrics(w io.Writer) { io.WriteString(w, "moovm_up 1\n") }

// start serves a machine until the test ends.
func start(t testing.TB, m ctl.Machine, o ctl.Options) (*ctl.Server, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := ctl.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	s := ctl.NewServer(m, o)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return s, path
}

func dial(t testing.TB, path string) *ctl.Client {
	t.Helper()
	c, err := ctl.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestClient(t *testing.T) {
	m := &fake{}
	console := ctl.NewConsole()
	var keys bytes.Buffer
	_, path := start(t, m, ctl.Options{Version: "v1.2", Console: console, Keys: &keys})
	c, ctx := dial(t, path), t.Context()
	s, err := c.Status(ctx)
	if err != nil || s.State != "running" || len(s.Disks) != 1 || s.Disks[0].Path != "/a \"b\".cow" {
		t.Errorf("status %+v, %v", s, err)
	}
	for _, err := range []error{
		c.Pause(ctx), c.Resume(ctx), c.PowerButton(ctx), c.Reset(ctx), c.Stop(ctx),
		c.SnapshotDisks(ctx, map[string]string{"vda": "/x.cow"}),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	if got, want := m.all(), "pause resume button reset stop snapshot map[vda:/x.cow]"; got != want {
		t.Errorf("asked %q, want %q", got, want)
	}
	var out bytes.Buffer
	if err := c.Metrics(ctx, &out); err != nil || out.String() != "moovm_up 1\n" {
		t.Errorf("metrics %q, %v", out.String(), err)
	}
	out.Reset()
	io.WriteString(console, "hello world")
	if err := c.Console(ctx, 5, false, &out); err != nil || out.String() != "world" {
		t.Errorf("console %q, %v", out.String(), err)
	}
	if err := c.Type(ctx, strings.NewReader("ls\r")); err != nil || keys.String() != "ls\r" {
		t.Errorf("typed %q, %v", keys.String(), err)
	}
}

// What a machine refuses arrives as what it is.
func TestErrors(t *testing.T) {
	m := &fake{}
	_, path := start(t, m, ctl.Options{})
	c, ctx := dial(t, path), t.Context()
	kinds := []error{ctl.ErrNoDisk, ctl.ErrState, ctl.ErrNotAllowed, ctl.ErrRequest}
	for _, kind := range append(kinds, io.ErrNoProgress) {
		m.fail = fmt.Errorf("vdx: %w; do this", kind)
		err := c.SnapshotDisks(ctx, map[string]string{"vda": "/x"})
		var e *ctl.Error
		if !errors.As(err, &e) || e.Message != m.fail.Error() || len(e.Done) != 1 || e.Done[0] != "vda" {
			t.Errorf("%v arrived as %+v", m.fail, err)
		}
		for _, other := range kinds {
			if errors.Is(err, other) != (other == kind) {
				t.Errorf("%v matches %v: %v", kind, other, other != kind)
			}
		}
	}
	if err := c.Console(ctx, 1, false, io.Discard); !errors.Is(err, ctl.ErrNotAllowed) {
		t.Errorf("a console that is not there: %v", err)
	}
	if err := c.Type(ctx, strings.NewReader("x")); !errors.Is(err, ctl.ErrNotAllowed) {
		t.Errorf("keys for nobody: %v", err)
	}
	if err := c.SnapshotDisks(ctx, nil); !errors.Is(err, ctl.ErrRequest) {
		t.Errorf("no disk: %v", err)
	}
}

// raw sends bytes and returns what comes back until the connection ends or
// stays silent.
func raw(t *testing.T, path, request string) string {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go io.WriteString(c, request) // an answer may come before all is read
	c.SetReadDeadline(time.Now().Add(time.Minute))
	var b bytes.Buffer
	io.Copy(&b, c)
	return b.String()
}

func TestBadRequests(t *testing.T) {
	m := &fake{}
	_, path := start(t, m, ctl.Options{})
	post := func(target, body string) string {
		return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", target, len(body), body)
	}
	for name, c := range map[string]struct{ request, want string }{
		"nothing there":   {"GET /v1/nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", " 404 "},
		"another version": {post("/v2/pause", ""), " 404 "},
		"GET of a verb":   {"GET /v1/pause HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", " 404 "},
		"no JSON":         {post("/v1/disk-snapshot", "hello"), " 400 "},
		"other fields":    {post("/v1/disk-snapshot", `{"overlays":{"vda":"x"},"overlay":2}`), " 400 "},
		"a wrong type":    {post("/v1/disk-snapshot", `{"overlays":{"vda":1}}`), " 400 "},
		"two bodies":      {post("/v1/disk-snapshot", `{"overlays":{"vda":"x"}}{}`), " 400 "},
		"empty":           {post("/v1/disk-snapshot", ""), " 400 "},
		"10 MiB":          {post("/v1/disk-snapshot", `{"overlays":{"vda":"`+strings.Repeat("x", 10<<20)+`"}}`), " 413 "},
		"no HTTP":         {"hello\r\n\r\n", " 400 "},
		"interval":        {"GET /v1/events?interval=NaN HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", " 400 "},
		"a long header":   {"GET /v1/status HTTP/1.1\r\nX: " + strings.Repeat("x", 1<<20) + "\r\n\r\n", " 431 "},
	} {
		t.Run(name, func(t *testing.T) {
			if got := raw(t, path, c.request); !strings.Contains(strings.SplitN(got, "\r\n", 2)[0], c.want) {
				t.Errorf("answered %.200q, want%s", got, c.want)
			}
		})
	}
	if m.all() != "" {
		t.Errorf("the machine was asked %q", m.all())
	}
}

// Clients that say half of something, go in the middle of an answer, or are one
// too many, hold up nobody.
func TestManyClients(t *testing.T) {
	console := ctl.NewConsole()
	_, path := start(t, &fake{}, ctl.Options{Console: console})
	var halves []net.Conn
	for range 60 {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "POST /v1/disk-snapshot HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
		halves = append(halves, c)
	}
	for range 20 { // begin to follow, and go
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, "GET /v1/console?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n")
		c.Close()
		console.Write(bytes.Repeat([]byte("x"), 10000))
	}
	c := dial(t, path)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 20 {
				if _, err := c.Status(t.Context()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	for range 100 { // too many
		extra, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer extra.Close()
	}
	for _, h := range halves {
		h.Close()
	}
	// Room again, as soon as the server has noticed.
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if _, err := c.Status(t.Context()); err == nil {
			return
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

func TestWatch(t *testing.T) {
	m := &fake{}
	s, path := start(t, m, ctl.Options{})
	c := dial(t, path)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var kinds []string
	err := c.Watch(ctx, 0, func(e ctl.Event) error {
		kinds = append(kinds, e.Kind)
		switch len(kinds) {
		case 1:
			if e.Status == nil || e.Status.State != "running" {
				t.Errorf("it begins with %+v", e)
			}
			if err := errors.Join(c.Pause(ctx), c.SnapshotDisks(ctx, map[string]string{"vda": "/n.cow"})); err != nil {
				return err
			}
		case 3:
			if e.Disk != "vda" || e.Path != "/n.cow" {
				t.Errorf("a snapshot is %+v", e)
			}
			go s.Close()
		}
		return nil
	})
	if got := strings.Join(kinds, " "); err != nil || got != "statistics paused disk-snapshot stopped" {
		t.Errorf("events %q, %v", got, err)
	}
}

func TestWatchStatistics(t *testing.T) {
	_, path := start(t, &fake{}, ctl.Options{})
	n, enough := 0, errors.New("enough")
	err := dial(t, path).Watch(t.Context(), time.Millisecond, func(e ctl.Event) error {
		if e.Kind != "statistics" || e.Status == nil {
			t.Errorf("%+v", e)
		}
		if n++; n == 5 {
			return enough
		}
		return nil
	})
	if err != enough {
		t.Error(err)
	}
}

func TestConsoleFollow(t *testing.T) {
	console := ctl.NewConsole()
	s, path := start(t, &fake{}, ctl.Options{Console: console})
	io.WriteString(console, "old ")
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := dial(t, path).Console(t.Context(), 100, true, w)
		w.Close()
		ended <- err
	}()
	buf := make([]byte, 4)
	if _, err := io.ReadFull(r, buf); err != nil || string(buf) != "old " {
		t.Fatalf("%q, %v", buf, err)
	}
	io.WriteString(console, "new!")
	if _, err := io.ReadFull(r, buf); err != nil || string(buf) != "new!" {
		t.Fatalf("%q, %v", buf, err)
	}
	s.Close()
	if rest, err := io.ReadAll(r); err != nil || len(rest) != 0 {
		t.Errorf("%q, %v", rest, err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the end of the machine: %v", err)
	}
}

// One client types at a time.
func TestTypists(t *testing.T) {
	r, w := io.Pipe()
	_, path := start(t, &fake{}, ctl.Options{Keys: w})
	defer w.Close()
	c := dial(t, path)
	keys, typed := io.Pipe()
	first := make(chan error, 1)
	go func() { first <- c.Type(t.Context(), keys) }()
	io.WriteString(typed, "a")
	buf := make([]byte, 1)
	if _, err := io.ReadFull(r, buf); err != nil || buf[0] != 'a' {
		t.Fatalf("%q, %v", buf, err)
	}
	if err := c.Type(t.Context(), strings.NewReader("b")); !errors.Is(err, ctl.ErrState) {
		t.Errorf("the second typist: %v", err)
	}
	typed.Close()
	if err := <-first; err != nil {
		t.Error(err)
	}
}

func TestOtherServers(t *testing.T) {
	for name, c := range map[string]struct {
		answer string
		want   error
		text   string
	}{
		"newer":   {`{"version":"v9","api":[2,3]}`, ctl.ErrVersion, `"v9"`},
		"older":   {`{"version":"v0","api":[]}`, ctl.ErrVersion, `"v0"`},
		"both":    {`{"version":"v9","api":[1,2],"more":true}`, nil, ""},
		"no JSON": {`<html>`, nil, "no moovm"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, c.answer) })}
			go srv.Serve(l)
			defer srv.Close()
			client, err := ctl.Dial(t.Context(), path)
			if client != nil {
				client.Close()
			}
			if c.text == "" && err != nil || c.text != "" && (err == nil || !strings.Contains(err.Error(), c.text)) || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v with %q", err, c.want, c.text)
			}
		})
	}
	path := filepath.Join(t.TempDir(), "none")
	if _, err := ctl.Dial(t.Context(), path); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "--control") {
		t.Errorf("nobody there: %v", err)
	}
}

// The description and the program say the same.
func TestOpenAPI(t *testing.T) {
	var doc struct {
		Paths      map[string]map[string]json.RawMessage
		Components struct {
			Schemas map[string]struct {
				Properties map[string]json.RawMessage
			}
		}
	}
	if err := json.Unmarshal(ctl.OpenAPI(), &doc); err != nil {
		t.Fatal(err)
	}
	described := map[string]bool{}
	for path, methods := range doc.Paths {
		for method := range methods {
			described[strings.ToUpper(method)+" "+path] = true
		}
	}
	for _, r := range ctl.Routes() {
		if !described[r] {
			t.Errorf("%s is not described", r)
		}
		delete(described, r)
	}
	for r := range described {
		t.Errorf("%s is described, and not there", r)
	}
	for name, fields := range ctl.Schemas() {
		s := doc.Components.Schemas[name].Properties
		for _, f := range fields {
			if s[f] == nil {
				t.Errorf("%s.%s is not described", name, f)
			}
			delete(s, f)
		}
		for f := range s {
			t.Errorf("%s.%s is described, and not there", name, f)
		}
		delete(doc.Components.Schemas, name)
	}
	for name := range doc.Components.Schemas {
		t.Errorf("schema %s is described, and not there", name)
	}
	_, path := start(t, &fake{}, ctl.Options{})
	if got := raw(t, path, "GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); !strings.Contains(got, `"openapi": "3.0.3"`) {
		t.Errorf("the server serves %.100q", got)
	}
}
