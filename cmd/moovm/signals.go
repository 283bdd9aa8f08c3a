package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// errInterrupted is the cause of a stop by a signal.
var errInterrupted = errors.New("interrupted")

// askFirst makes interrupts a request before they are an order: the first
// SIGINT or SIGTERM calls ask, and only if that fails, or at the second, stop
// is called. SIGHUP stops at once: nobody is there to ask again. done stops
// this; it waits until neither function runs.
func askFirst(say io.Writer, ask func() error, stop func()) (done func()) {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	end := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		for asked := false; ; asked = true {
			select {
			case <-end:
				return
			case s := <-signals:
				if asked || s == syscall.SIGHUP || ask() != nil {
					stop()
					return
				}
				// The terminal may be in raw mode.
				fmt.Fprint(say, "\r\nmoovm: the guest was asked to power off; interrupt again to stop it at once\r\n")
			}
		}
	})
	return sync.OnceFunc(func() {
		signal.Stop(signals)
		close(end)
		running.Wait()
	})
}

// passSignals is for a process in the sandbox that asks first: the returned
// context ends at the second interrupt, or SIGHUP; the first one is passed on.
func passSignals(ctx context.Context) (_ context.Context, signals <-chan os.Signal, done func()) {
	passed := make(chan os.Signal, 1)
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	pass := func() error {
		passed <- syscall.SIGINT
		return nil
	}
	stop := askFirst(io.Discard, pass, func() { cancel(errInterrupted) })
	return ctx, passed, func() {
		stop()
		cancel(nil)
	}
}
