package main

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/moovm/moovm/guest"
)

// Exit statuses of every command; `run` has those of package guest, too.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2

	exitInterrupted = 128 + int(syscall.SIGINT)
)

// statusError carries an exit status; a nil err means that everything there
// is to say has been said.
type statusError struct {
	status int
	err    error
}

func (e *statusError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}

func (e *statusError) Unwrap() error { return e.err }

// misuse is an error about how the command was called: its help is what remedies it.
type misuse struct{ error }

func (e misuse) Unwrap() error { return e.error }

func usageError(err error) error { return &statusError{exitUsage, misuse{err}} }

// exitWith is the error of a command whose exit status is another's. Status 0
// without an error is nil.
func exitWith(status int, err error) error {
	if status == exitOK && err == nil {
		return nil
	}
	return &statusError{status, err}
}

// Causes of the end of a machine from outside.
var (
	errInterrupted = errors.New("interrupted")               // a signal
	errQuit        = errors.New("stopped from the keyboard") // Ctrl-A x
)

// endStatus is the exit status of a machine that was ended from outside, for
// the cause: 0 after Ctrl-A x.
func endStatus(cause error) int {
	switch {
	case errors.Is(cause, errQuit):
		return exitOK
	case errors.Is(cause, context.DeadlineExceeded):
		return guest.StatusTimeout
	case errors.Is(cause, errInterrupted):
		return exitInterrupted
	}
	return guest.StatusCannotRun
}
