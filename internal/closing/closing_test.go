package closing

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"
)

type closer func() error

func (c closer) Close() error { return c() }

// Each waits for the other: one after the other would hang.
func TestAtOnce(t *testing.T) {
	a, b := make(chan bool), make(chan bool)
	bad := errors.New("bad")
	err := Within(t.Context(), 0,
		Item{"a", closer(func() error { close(a); <-b; return bad })},
		Item{"b", closer(func() error { close(b); <-a; return nil })})
	if !errors.Is(err, bad) {
		t.Errorf("%v, not the first one's error", err)
	}
}

func TestHanging(t *testing.T) {
	hang := make(chan bool)
	defer close(hang)
	bad := errors.New("bad")
	ctx, cancel := context.WithCancel(t.Context())
	closing := make(chan bool)
	go func() { <-closing; cancel() }()
	err := Within(ctx, time.Millisecond,
		Item{"disk a", closer(func() error { <-hang; return nil })},
		Item{"disk b", closer(func() error { close(closing); return nil })},
		Item{"disk c", closer(func() error { <-hang; return bad })})
	late := (*LateError)(nil)
	if !errors.As(err, &late) || !slices.Contains(late.Names, "disk a") || !slices.Contains(late.Names, "disk c") || errors.Is(err, bad) {
		t.Errorf("%v, not that a and c are late", err)
	}
}

// Nothing is given up before the end.
func TestSlow(t *testing.T) {
	slow := make(chan bool)
	done := make(chan error)
	go func() {
		done <- Within(context.Background(), 0, Item{"disk", closer(func() error { <-slow; return nil })})
	}()
	select {
	case err := <-done:
		t.Fatalf("given up: %v", err)
	case slow <- true:
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
