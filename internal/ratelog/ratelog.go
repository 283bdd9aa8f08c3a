// Package ratelog bounds how much somebody who is not trusted can have logged:
// a guest's driver, a 9P client, a vhost-user front-end.
package ratelog

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// burst lines pass at once, then one every interval.
	burst    = 10
	interval = time.Second
)

// New returns a logger to l whose lines, of all levels and with all that is
// derived from it, come at a bounded rate: 10 at once, then one a second. The
// next line that passes says how many were left out before it (left_out). Each
// source, such as a device, gets one of its own, so that none hides another's
// lines. One that has such a limit already is returned as it is. A nil l
// discards everything. It may be used from any goroutine.
func New(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	if _, ok := l.Handler().(*handler); ok {
		return l
	}
	return slog.New(&handler{Handler: l.Handler(), limit: &limit{left: burst}})
}

// handler is a slog.Handler that passes what its limit lets through.
type handler struct {
	slog.Handler
	limit *limit // shared with those derived from it
}

// Handle implements slog.Handler.
func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	leftOut, ok := h.limit.take(time.Now())
	if !ok {
		return nil
	}
	if leftOut > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Uint64("left_out", leftOut))
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &handler{Handler: h.Handler.WithAttrs(attrs), limit: h.limit}
}

// WithGroup implements slog.Handler.
func (h *handler) WithGroup(name string) slog.Handler {
	return &handler{Handler: h.Handler.WithGroup(name), limit: h.limit}
}

// limit is a token bucket that counts what it turns away.
type limit struct {
	mu      sync.Mutex
	left    int       // lines that may pass now
	since   time.Time // of the last refill
	leftOut uint64    // since the last line that passed
}

// take asks for one line, and says how many were left out before it.
func (l *limit) take(now time.Time) (leftOut uint64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.left == burst {
		l.since = now
	} else if n := now.Sub(l.since) / interval; n > 0 {
		l.left = int(min(time.Duration(l.left)+n, burst))
		l.since = l.since.Add(n * interval)
	}
	if l.left == 0 {
		l.leftOut++
		return 0, false
	}
	l.left--
	leftOut, l.leftOut = l.leftOut, 0
	return leftOut, true
}
