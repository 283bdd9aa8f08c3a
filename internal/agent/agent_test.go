package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair runs an agent in this process.
func pair(t *testing.T) (c *Client, stop func()) {
	t.Helper()
	r1, w1 := io.Pipe()
	r2, w2 := io.Pipe()
	served := make(chan error, 1)
	go func() { served <- Serve(r1, w2, Hooks{}); w2.Close() }()
	c = NewClient(r2, w1)
	stop = sync.OnceFunc(func() {
		w1.Close()
		// The end may cut a credit in two.
		if err := <-served; err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Error(err)
		}
		<-c.Done()
	})
	t.Cleanup(stop)
	return c, stop
}

func sh(script string) Command {
	return Command{Args: []string{"sh", "-c", script}, Env: os.Environ(), Dir: "/"}
}

func run(t *testing.T, c *Client, cmd Command, stdin io.Reader) (stdout, stderr string, exit Exit) {
	t.Helper()
	var out, errs bytes.Buffer
	s, err := c.Start(cmd, stdin, &out, &errs)
	if err != nil {
		t.Fatal(err)
	}
	if exit, err = s.Wait(); err != nil {
		t.Fatal(err)
	}
	return out.String(), errs.String(), exit
}

func TestSessions(t *testing.T) {
	c, stop := pair(t)
	var wg sync.WaitGroup
	big := strings.Repeat("0123456789abcdef", 3*Window/16) // more than fits the window
	for range 4 {
		wg.Go(func() {
			out, errs, exit := run(t, c, sh("echo oops >&2; cat; exit 7"), strings.NewReader(big))
			if out != big || errs != "oops\n" || exit != (Exit{Status: 7}) {
				t.Errorf("%d bytes, %q, %+v", len(out), errs, exit)
			}
		})
	}
	wg.Wait()
	if out, _, exit := run(t, c, sh("kill -TERM $$"), nil); out != "" || exit != (Exit{Status: 143, Signal: 15}) {
		t.Errorf("%q, %+v", out, exit)
	}
	merged := sh("for i in 1 2 3; do echo o$i; echo e$i >&2; done")
	merged.Merge = true
	if out, errs, _ := run(t, c, merged, nil); out != "o1\ne1\no2\ne2\no3\ne3\n" || errs != "" {
		t.Errorf("%q, %q", out, errs)
	}
	for name, cmd := range map[string]Command{"no such": {Args: []string{"no-such-program"}}, "folder": {Args: []string{"true"}, Dir: "/no/such"}} {
		if _, _, exit := run(t, c, cmd, nil); exit.Status != 127 || exit.Error == "" {
			t.Errorf("%s: %+v", name, exit)
		}
	}
	if _, _, exit := run(t, c, Command{Args: []string{"/etc"}}, nil); exit.Status != 126 {
		t.Errorf("a folder as program: %+v", exit)
	}
	stop()
	if _, err := c.Start(sh("true"), nil, nil, nil); !errors.Is(err, ErrGone) {
		t.Errorf("after the end: %v", err)
	}
}

// A command that does not read its stdin, one whose output nobody takes, and
// one that leaves a process behind hold up nothing.
func TestNoHoldUp(t *testing.T) {
	c, _ := pair(t)
	release := make(chan struct{})
	stuck, err := c.Start(sh("cat /dev/zero"), nil, writerFunc(func(p []byte) (int, error) { <-release; return len(p), nil }), nil)
	if err != nil {
		t.Fatal(err)
	}
	deaf, err := c.Start(sh("exec sleep 100"), strings.NewReader(strings.Repeat("x", 4*Window)), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if out, _, _ := run(t, c, sh("echo through"), nil); out != "through\n" {
		t.Errorf("%q", out)
	}
	if out, _, exit := run(t, c, sh("echo left; sleep 100 & exit 3"), nil); out != "left\n" || exit.Status != 3 {
		t.Errorf("%q, %+v", out, exit)
	}
	if err := deaf.Signal(15); err != nil {
		t.Error(err)
	}
	if exit, err := deaf.Wait(); err != nil || exit.Signal != 15 {
		t.Errorf("%+v, %v", exit, err)
	}
	stuck.Kill()
	close(release)
	if exit, err := stuck.Wait(); err != nil || exit.Signal != 9 {
		t.Errorf("%+v, %v", exit, err)
	}
}

// When the stream ends, the agent leaves nothing running.
func TestEndKills(t *testing.T) {
	c, stop := pair(t)
	started := make(chan struct{}, 1)
	s, err := c.Start(sh("echo up; exec sleep 1000"), nil, writerFunc(func(p []byte) (int, error) { started <- struct{}{}; return len(p), nil }), nil)
	if err != nil {
		t.Fatal(err)
	}
	<-started
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	go func() { stop(); cancel() }()
	<-ctx.Done()
	if !errors.Is(ctx.Err(), context.Canceled) {
		t.Fatal("the agent did not end")
	}
	if exit, err := s.Wait(); err == nil && exit.Signal != 9 {
		t.Errorf("%+v", exit)
	}
}

func TestBadFrames(t *testing.T) {
	for _, in := range []string{"abc", "\x01\x00\x00\x00\x01\xff\xff\xff\xff", "\x01\x00\x00\x00\x01\x05\x00\x00\x00ab"} {
		if err := Serve(strings.NewReader(in), io.Discard, Hooks{}); err == nil {
			t.Errorf("%q was taken", in)
		}
	}
	// Frames of no session, and a start that is no command.
	var in, out bytes.Buffer
	w := NewWriter(&in)
	for k := range Kind(20) {
		if k != KindHold { // what comes after it must be KindGo
			_ = w.Write(Frame{7, k, []byte("nonsense")})
		}
	}
	if err := Serve(&in, &out, Hooks{}); err != nil {
		t.Error(err)
	}
	if f, err := ReadFrame(&out); err != nil || f.Kind != KindExit {
		t.Errorf("%+v, %v", f, err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// Arguments, the environment, folders, and what is said of them are bytes.
func TestBytes(t *testing.T) {
	c, _ := pair(t)
	var b []byte
	for n := 1; n < 256; n++ {
		b = append(b, byte(n))
	}
	all := string(b)
	dir := filepath.Join(t.TempDir(), "d\x80\xff")
	if err := os.Mkdir(dir, 0o777); err != nil {
		t.Skipf("the file system takes UTF-8 names only: %v; set TMPDIR to a folder on another", err)
	}
	cmd := sh(`printf %s "$1"; printf %s "$X" >&2; : > "$PWD/made"`)
	cmd.Args = append(cmd.Args, "sh", all)
	cmd.Env = append(cmd.Env, "X="+all, "Y\xfe=1")
	cmd.Dir = dir
	out, errs, exit := run(t, c, cmd, nil)
	if out != all || errs != all || exit != (Exit{}) {
		t.Errorf("argument %q, variable %q, %+v", out, errs, exit)
	}
	if _, err := os.Stat(filepath.Join(dir, "made")); err != nil {
		t.Error(err)
	}
	if _, _, exit := run(t, c, Command{Args: []string{"/no\xff"}}, nil); exit.Status != 127 || !strings.Contains(exit.Error, "/no\xff") {
		t.Errorf("%q", exit.Error)
	}
}
