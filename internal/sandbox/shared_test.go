package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/moovm/moovm/internal/agent"
	"github.com/moovm/moovm/internal/bytejson"
)

// sharedPlace keeps a test's shared sandbox apart from the user's.
func sharedPlace(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "moovm-test-") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("TMPDIR", dir)
	t.Setenv(idleEnv, "2s")
	return dir
}

// processes are those whose environment or command line has the text.
func processes(text string) (found []string) {
	names, _ := filepath.Glob("/proc/[0-9]*")
	for _, n := range names {
		env, _ := os.ReadFile(n + "/environ")
		line, _ := os.ReadFile(n + "/cmdline")
		if strings.Contains(string(env), text) && n != fmt.Sprintf("/proc/%d", os.Getpid()) && len(line) > 0 {
			found = append(found, strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return found
}

// Several programs share one emulated host; it sees files that changed; it is
// gone when nobody uses it any more, with all its processes.
func TestShared(t *testing.T) {
	c := needEmulation(t)
	place := sharedPlace(t)
	file := filepath.Join(place, "file")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	sh := func(script string) agent.Command {
		return agent.Command{Args: []string{"/bin/sh", "-c", script}, Env: os.Environ(), Dir: "/"}
	}
	write("first")
	boots := make(chan string, 3)
	var began atomic.Int32
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			s, err := Join(t.Context(), c, func() { began.Add(1) })
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			var out, errs bytes.Buffer
			script := fmt.Sprintf("cat; cat %s; echo oops >&2; echo result%d > %s/result; cat /proc/sys/kernel/random/boot_id; exit %d", file, i, s.Scratch(), 10+i)
			status, err := s.Run(sh(script), strings.NewReader("typed "), &out, &errs, nil)
			rest, ok := strings.CutPrefix(out.String(), "typed first")
			if err != nil || status != 10+i || !ok || errs.String() != "oops\n" {
				t.Errorf("session %d: status %d, %v, %q, %q", i, status, err, out.String(), errs.String())
			}
			boots <- rest
			if b, err := os.ReadFile(s.Scratch() + "/result"); err != nil || string(b) != fmt.Sprintf("result%d\n", i) {
				t.Errorf("session %d: %q, %v", i, b, err)
			}
		})
	}
	wg.Wait()
	if n := began.Load(); n != 1 {
		t.Errorf("%d of 3 sessions began the sandbox, want one", n)
	}
	if t.Failed() {
		return
	}
	boot := <-boots
	if a, b := <-boots, <-boots; a != boot || b != boot || boot == "" {
		t.Errorf("three sessions on the emulated hosts %q %q %q; want one", boot, a, b)
	}

	// The next one finds it still there, and the file as it is now.
	write("second, and longer")
	s, err := Join(t.Context(), c, func() { t.Error("a sandbox was begun beside the one that was there") })
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if status, err := s.Run(sh("cat "+file+"; echo; cat /proc/sys/kernel/random/boot_id"), nil, &out, nil, nil); err != nil || status != 0 {
		t.Errorf("status %d, %v", status, err)
	}
	if want := "second, and longer\n" + boot; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
	// A signal, and a session that ends while its command runs.
	signals := make(chan os.Signal, 1)
	signals <- syscall.SIGTERM
	if status, err := s.Run(sh("trap 'exit 9' TERM; while :; do sleep 0.1; done"), nil, nil, nil, signals); err != nil || status != 9 && status != 143 {
		t.Errorf("after a signal: status %d, %v", status, err)
	}
	go func() { _, _ = s.Run(sh("sleep 1000"), nil, nil, nil, nil) }()
	time.Sleep(time.Second)
	scratch := s.Scratch()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(scratch); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the session's folder: %v", err)
	}

	for deadline := time.Now().Add(time.Minute); len(processes(place)) > 0; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still running: %q", processes(place))
		}
	}
	left, _ := filepath.Glob(place + "/moovm-*/*")
	for _, f := range left {
		if ext := filepath.Ext(f); ext != ".lock" && ext != ".log" {
			t.Errorf("left behind: %s", f)
		}
	}
}

// A sandbox that does not start is the same error for all who wait for it.
func TestSharedBroken(t *testing.T) {
	c := needEmulation(t)
	dir := sharedPlace(t)
	c.QEMU = filepath.Join(dir, "qemu")
	if err := os.WriteFile(c.QEMU, []byte("#!/bin/sh\nsleep 1; echo no such machine >&2\nexit 3\n"), 0o777); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if _, err := Join(t.Context(), c, func() {}); err == nil || !strings.Contains(err.Error(), "no such machine") {
				t.Errorf("error %v", err)
			}
		})
	}
	wg.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Join(ctx, c, func() {}); err == nil {
		t.Error("joined after the context ended")
	}
	if _, err := Join(t.Context(), Config{QEMU: "/nonexistent/qemu"}, func() {}); !errors.Is(err, ErrNoQEMU) {
		t.Error(err)
	}
}

// Two kernels whose names are no UTF-8 are two sandboxes, and a server is told
// the name as it is.
func TestSharedBytes(t *testing.T) {
	sharedPlace(t)
	one, err1 := sharedPath(sharedConfig{Kernel: "/boot/\xfe"})
	two, err2 := sharedPath(sharedConfig{Kernel: "/boot/\xff"})
	if err1 != nil || err2 != nil || one == two {
		t.Errorf("%s and %s, %v, %v", one, two, err1, err2)
	}
	in, out := sharedConfig{Kernel: "/boot/\xfe", Init: "\x80"}, sharedConfig{}
	b, err := bytejson.Marshal(&in)
	if err == nil {
		err = bytejson.Unmarshal(b, &out)
	}
	if err != nil || in != out {
		t.Errorf("%+v became %+v: %v", in, out, err)
	}
}
