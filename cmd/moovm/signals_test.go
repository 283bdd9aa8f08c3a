package main

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// signalSelf sends a signal to this process.
func signalSelf(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(syscall.Getpid(), s); err != nil {
		t.Fatal(err)
	}
}

func waitUntil(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 5000 {
		if ok() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("%s did not happen", what)
}

func TestAskFirst(t *testing.T) {
	for _, test := range []struct {
		name        string
		signals     []syscall.Signal
		refuse      error // of the request
		asks, stops int32
	}{
		{"one interrupt", []syscall.Signal{syscall.SIGINT}, nil, 1, 0},
		{"two interrupts", []syscall.Signal{syscall.SIGINT, syscall.SIGINT}, nil, 1, 1},
		{"terminated, then interrupted", []syscall.Signal{syscall.SIGTERM, syscall.SIGINT}, nil, 1, 1},
		{"hung up", []syscall.Signal{syscall.SIGHUP}, nil, 0, 1},
		{"no button to press", []syscall.Signal{syscall.SIGTERM}, errors.New("the machine has stopped"), 1, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			var said bytes.Buffer
			var asks, stops atomic.Int32
			done := askFirst(&said, func() error { asks.Add(1); return test.refuse }, func() { stops.Add(1) })
			for i, s := range test.signals {
				signalSelf(t, s)
				waitUntil(t, "an answer to the signal", func() bool { return int(asks.Load()+stops.Load()) >= i+1 })
			}
			waitUntil(t, "all of it", func() bool { return asks.Load() == test.asks && stops.Load() == test.stops })
			done()
			done()
			if asks.Load() != test.asks || stops.Load() != test.stops {
				t.Errorf("asked %d times, stopped %d times; want %d and %d", asks.Load(), stops.Load(), test.asks, test.stops)
			}
			told := strings.Contains(said.String(), "interrupt again")
			if told != (test.asks == 1 && test.refuse == nil) {
				t.Errorf("said %q", said.String())
			}
		})
	}
}

func TestPassSignals(t *testing.T) {
	outer, cancel := context.WithCancel(context.Background())
	ctx, signals, done := passSignals(outer)
	defer done()
	cancel() // what a signal does to the context of the program
	signalSelf(t, syscall.SIGTERM)
	if s := <-signals; s != syscall.SIGINT {
		t.Errorf("passed on: %v", s)
	}
	if ctx.Err() != nil {
		t.Error("the first signal ended the context")
	}
	signalSelf(t, syscall.SIGINT)
	<-ctx.Done()
	if !errors.Is(context.Cause(ctx), errInterrupted) {
		t.Error(context.Cause(ctx))
	}
}
