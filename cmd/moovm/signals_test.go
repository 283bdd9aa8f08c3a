package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moovm/moovm/guest"
)

// signalSelf sends a signal to this process.
func signalSelf(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(syscall.Getpid(), s); err != nil {
		t.Fatal(err)
	}
}

func TestAskFirst(t *testing.T) {
	for _, test := range []struct {
		name        string
		signals     []syscall.Signal
		refuse      error // of the request
		asks, stops int
	}{
		{"one interrupt", []syscall.Signal{syscall.SIGINT}, nil, 1, 0},
		{"two interrupts", []syscall.Signal{syscall.SIGINT, syscall.SIGINT}, nil, 1, 1},
		{"many", []syscall.Signal{syscall.SIGINT, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP}, nil, 1, 1},
		{"terminated, then interrupted", []syscall.Signal{syscall.SIGTERM, syscall.SIGINT}, nil, 1, 1},
		{"hung up", []syscall.Signal{syscall.SIGHUP}, nil, 0, 1},
		{"time is up", []syscall.Signal{signalTimeout}, nil, 0, 1},
		{"no button to press", []syscall.Signal{syscall.SIGTERM}, errors.New("the machine has stopped"), 1, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			var said bytes.Buffer
			asks, stops := 0, 0
			h := askFirst(&said, func() error { asks++; return test.refuse }, func(os.Signal) { stops++ })
			for _, s := range test.signals {
				h(s)
			}
			if asks != test.asks || stops != test.stops {
				t.Errorf("asked %d times, stopped %d times; want %d and %d", asks, stops, test.asks, test.stops)
			}
			told := strings.Contains(said.String(), "interrupt again")
			if told != (test.asks == 1 && test.refuse == nil) {
				t.Errorf("said %q", said.String())
			}
		})
	}
}

func TestInterrupts(t *testing.T) {
	i := catchInterrupts()
	defer i.Close()
	taken := make(chan os.Signal, 8)
	release := i.handle(func(s os.Signal) { taken <- s })
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		signalSelf(t, s)
		if got := <-taken; got != s {
			t.Errorf("%v came as %v", s, got)
		}
	}
	if i.ctx.Err() != nil {
		t.Error("a signal that was handled ended the context")
	}
	release()
	signalSelf(t, syscall.SIGTERM)
	<-i.ctx.Done()
	if !errors.Is(context.Cause(i.ctx), errInterrupted) || endStatus(context.Cause(i.ctx)) != exitInterrupted {
		t.Error(context.Cause(i.ctx))
	}
	if len(taken) > 0 {
		t.Error("a handler that was released got a signal")
	}
}

// A program that does the work for another one is told by it when time is up.
func TestKeepTime(t *testing.T) {
	i := catchInterrupts()
	ctx, cancel := i.keepTime(i.ctx, time.Nanosecond, false)
	<-ctx.Done()
	cancel()
	i.Close()
	own := context.Cause(ctx)

	i = catchInterrupts(signalTimeout, signalQuit)
	defer i.Close()
	ctx, cancel = i.keepTime(i.ctx, time.Nanosecond, true)
	defer cancel()
	if ctx.Err() != nil {
		t.Error("it kept the time itself")
	}
	signalSelf(t, signalTimeout)
	<-ctx.Done()
	if told := context.Cause(ctx); told.Error() != own.Error() || endStatus(told) != guest.StatusTimeout || endStatus(own) != guest.StatusTimeout {
		t.Errorf("told: %v; by itself: %v", told, own)
	}
}

func TestQuitSignal(t *testing.T) {
	i := catchInterrupts(signalTimeout, signalQuit)
	defer i.Close()
	signalSelf(t, signalQuit)
	<-i.ctx.Done()
	if cause := context.Cause(i.ctx); !errors.Is(cause, errQuit) || endStatus(cause) != exitOK {
		t.Error(cause)
	}
}
