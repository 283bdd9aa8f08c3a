package guest

import (
	"context"
	"errors"
	"fmt"
	"github.com/moovm/moovm/guest/control"
	"strings"
	"time"
)

// ErrNoStart says that a guest ended, or took too long, before its init was
// there: the kernel did not reach user space.
var ErrNoStart = errors.New("the guest did not reach user space")

// ErrSlowStart is the ErrNoStart of a guest that took too long.
var ErrSlowStart = fmt.Errorf("%w in time", ErrNoStart)

// ErrSlowSetup says that the set-up of a guest took too long.
var ErrSlowSetup = errors.New("the set-up in the guest did not end in time")

// ErrCutShort says that a guest ended before its command did.
var ErrCutShort = errors.New("the guest ended before its command did")

// A PanicError is a kernel panic, recognised on the console.
type PanicError struct {
	Cause   string   // what the kernel said after "not syncing:"
	Console []string // the console's last lines, oldest first
}

func (e *PanicError) Error() string {
	return withConsole("Kernel panic - not syncing: "+e.Cause, e.Console)
}

// A BootError is a guest that ended without doing what it was started for. It
// matches ErrNoStart, ErrSlowSetup or ErrCutShort.
type BootError struct {
	Problem string   // how it ended
	Console []string // the console's last lines, oldest first
	Err     error    // ErrNoStart, ErrSlowStart, ErrSlowSetup or ErrCutShort
}

func (e *BootError) Error() string {
	return withConsole(fmt.Sprintf("%v: %s", e.Err, e.Problem), e.Console)
}

func (e *BootError) Unwrap() error { return e.Err }

// A StoppedError is a guest that was stopped from outside, as if its power
// failed, because a context ended. It matches the context's error:
// context.DeadlineExceeded for a timeout.
type StoppedError struct {
	After time.Duration // since the start
	Err   error         // the context's cause
}

func (e *StoppedError) Error() string {
	if e.Err == context.DeadlineExceeded { // it says no more than that
		return fmt.Sprintf("the guest was stopped: not done after %v", e.After.Round(100*time.Millisecond))
	}
	return fmt.Sprintf("the guest was stopped after %v: %v", e.After.Round(100*time.Millisecond), e.Err)
}

func (e *StoppedError) Unwrap() error { return e.Err }

// consoleQuote is how many lines of the console an error message shows.
const consoleQuote = 40

func withConsole(text string, lines []string) string {
	if len(lines) == 0 {
		return text + " (nothing was said on the console)"
	}
	var b strings.Builder
	b.WriteString(text + "; the console's last lines:")
	for _, l := range lines[max(0, len(lines)-consoleQuote):] {
		b.WriteString("\n  | " + l)
	}
	return b.String()
}

// The exit statuses of moovm run.
const (
	StatusTimeout   = 124 // the guest was stopped because time was up
	StatusCannotRun = 125 // the machine could not run, or ended too early
	StatusPanic     = 126 // the guest's kernel panicked
)

// ExitStatus turns what Boot returned into the exit status of a program:
// the command's own, or one of the Status constants.
func ExitStatus(r Result, err error) int {
	var p *PanicError
	var g *control.GuestError
	switch {
	case err == nil:
		return r.ExitStatus
	case errors.As(err, &p):
		return StatusPanic
	case errors.Is(err, context.DeadlineExceeded):
		return StatusTimeout
	case errors.As(err, &g) && g.Kind == control.FailCommand && g.Status != 0:
		return g.Status
	}
	return StatusCannotRun
}
