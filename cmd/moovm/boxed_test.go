package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"testing"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/internal/sandbox"
)

func TestSandboxEnviron(t *testing.T) {
	got := sandboxEnviron([]string{"PATH=/bin", "AWS_SECRET_ACCESS_KEY=x", "LC_TIME=C", "MOOVM_KERNEL=a:b", "PATHS=1", "GITHUB_TOKEN=MOOVM_", "TERM=xterm", "LC=no", "NOTHING"})
	if want := []string{"PATH=/bin", "LC_TIME=C", "MOOVM_KERNEL=a:b", "TERM=xterm"}; !slices.Equal(got, want) {
		t.Errorf("handed over: %q, want %q", got, want)
	}
}

// What the sandbox returned becomes one exit status.
func TestBoxEnded(t *testing.T) {
	timeout := fmt.Errorf("--timeout 1s: %w", context.DeadlineExceeded)
	broken := errors.New("no emulator")
	for _, c := range []struct {
		name   string
		cause  error // why the context ended; nil: it did not
		status int
		err    error
		want   int
	}{
		{"the command's own", nil, 7, nil, 7},
		{"done", nil, 0, nil, 0},
		{"a sandbox that does not work", nil, 0, broken, guest.StatusCannotRun},
		{"an interrupt while it booted", nil, 0, &sandbox.InterruptedError{Signal: syscall.SIGTERM}, exitInterrupted},
		{"time was up while it booted", timeout, 0, timeout, guest.StatusTimeout},
		{"time was up; the program inside said so", timeout, guest.StatusTimeout, nil, guest.StatusTimeout},
		{"time was up before the program inside could catch a signal", timeout, 128 + int(syscall.SIGALRM), nil, guest.StatusTimeout},
		{"Ctrl-A x while it booted", errQuit, 0, errQuit, 0},
		{"Ctrl-A x before the program inside could catch a signal", errQuit, 128 + int(syscall.SIGUSR1), nil, 0},
		{"the command ended just then", timeout, 3, nil, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, end := context.WithCancelCause(t.Context())
			defer end(nil)
			if c.cause != nil {
				end(c.cause)
			}
			b := box{failed: guest.StatusCannotRun}
			got := 0
			if err := b.ended(ctx, c.status, c.err); err != nil {
				var s *statusError
				if !errors.As(err, &s) {
					t.Fatalf("%T: %v", err, err)
				}
				got = s.status
			}
			if got != c.want {
				t.Errorf("status %d, want %d", got, c.want)
			}
		})
	}
}
