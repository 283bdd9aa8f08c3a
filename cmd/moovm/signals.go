package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"
)

// interrupts are the signals that ask this program to end. They are caught
// here and nowhere else: the first ends the context, unless a handler has taken
// them over.
type interrupts struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	come   chan os.Signal
	gone   chan struct{}

	mu      sync.Mutex // held while a handler runs
	handler func(os.Signal)
	timeout time.Duration // what signalTimeout is about
}

// Two more end a program that does a machine's work for another one, which
// keeps the time and has the keyboard: see relayedRole.
const (
	signalTimeout = syscall.SIGALRM
	signalQuit    = syscall.SIGUSR1
)

// catchInterrupts begins to catch SIGINT, SIGTERM and SIGHUP, and what more is
// named.
func catchInterrupts(more ...os.Signal) *interrupts {
	i := &interrupts{come: make(chan os.Signal, 8), gone: make(chan struct{})}
	i.ctx, i.cancel = context.WithCancelCause(context.Background())
	signal.Notify(i.come, append([]os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP}, more...)...)
	go func() {
		defer close(i.gone)
		for s := range i.come {
			i.mu.Lock()
			if i.handler != nil {
				i.handler(s)
			} else {
				i.cancel(signalCause(s, i.timeout))
			}
			i.mu.Unlock()
		}
	}()
	return i
}

// signalCause is why a machine ends at a signal.
func signalCause(s os.Signal, timeout time.Duration) error {
	switch s {
	case signalTimeout:
		return timeoutCause(timeout)
	case signalQuit:
		return errQuit
	}
	return errInterrupted
}

// timeoutCause is why a machine ends whose time is up.
func timeoutCause(d time.Duration) error {
	return fmt.Errorf("--timeout %v: %w", d, context.DeadlineExceeded)
}

// keepTime ends the context after d, or, in a program that another one keeps
// the time for, when that says so. 0 is no limit.
func (i *interrupts) keepTime(ctx context.Context, d time.Duration, relayed bool) (context.Context, context.CancelFunc) {
	if d == 0 || relayed {
		i.mu.Lock()
		i.timeout = d
		i.mu.Unlock()
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, d, timeoutCause(d))
}

// handle gives the signals that come from now on to h, one at a time. release
// ends this; h is not running then, and does not run any more.
func (i *interrupts) handle(h func(os.Signal)) (release func()) {
	i.mu.Lock()
	i.handler = h
	i.mu.Unlock()
	return func() {
		i.mu.Lock()
		i.handler = nil
		i.mu.Unlock()
	}
}

// Close gives the signals their usual effect again.
func (i *interrupts) Close() {
	signal.Stop(i.come)
	close(i.come)
	<-i.gone
	i.cancel(nil)
}

// askFirst makes interrupts a request before they are an order: the first
// SIGINT or SIGTERM calls ask, and only if that fails, or at the second, stop
// is called. Other signals stop at once: nobody is there to ask again.
func askFirst(say io.Writer, ask func() error, stop func(os.Signal)) func(os.Signal) {
	asked, stopped := false, false
	return func(s os.Signal) {
		again := asked || !slices.Contains([]os.Signal{syscall.SIGINT, syscall.SIGTERM}, s)
		switch {
		case stopped:
		case again || ask() != nil:
			stopped = true
			stop(s)
		default:
			asked = true
			// The terminal may be in raw mode.
			fmt.Fprint(say, "\r\nmoovm: the guest was asked to power off; interrupt again to stop it at once\r\n")
		}
	}
}
