package virtioblk

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// Limit bounds the load on a backend. Zero fields mean no bound.
type Limit struct {
	Ops   float64 // requests per second
	Bytes float64 // bytes read or written per second
	// Burst is how much time's worth of unused budget can be saved up; 0
	// means 100 ms.
	Burst time.Duration
}

func (l Limit) check() error {
	if !(l.Ops >= 0) || !(l.Bytes >= 0) || l.Burst < 0 {
		return errors.New("virtioblk: a limit cannot be negative")
	}
	return nil
}

// limiter is a token bucket for each of the two bounds. A request takes its
// tokens at once, and what is missing becomes the time to wait: no cool-down,
// and no request is too large to ever pass.
type limiter struct {
	on atomic.Bool

	mu          sync.Mutex
	limit       Limit
	last        time.Time
	ops, octets float64 // tokens left
}

func (l *limiter) set(limit Limit) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if limit.Burst == 0 {
		limit.Burst = 100 * time.Millisecond
	}
	l.limit = limit
	l.last = time.Now()
	b := limit.Burst.Seconds()
	l.ops, l.octets = max(1, limit.Ops*b), limit.Bytes*b
	l.on.Store(limit.Ops > 0 || limit.Bytes > 0)
}

// take returns how long a request of n bytes has to wait.
func (l *limiter) take(n int64, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	passed := max(0, now.Sub(l.last).Seconds())
	l.last = now
	burst := l.limit.Burst.Seconds()
	var wait float64
	for _, b := range [...]struct {
		tokens     *float64
		rate, cost float64
		floor      float64
	}{{&l.ops, l.limit.Ops, 1, 1}, {&l.octets, l.limit.Bytes, float64(n), 0}} {
		if b.rate == 0 {
			continue
		}
		*b.tokens = min(*b.tokens+b.rate*passed, max(b.floor, b.rate*burst)) - b.cost
		wait = max(wait, -*b.tokens/b.rate)
	}
	return time.Duration(wait * float64(time.Second))
}

// SetLimit changes the limit; requests that wait already keep waiting.
func (d *Device) SetLimit(l Limit) error {
	if err := l.check(); err != nil {
		return err
	}
	d.limiter.set(l)
	return nil
}
