package cowdisk

import "sync"

// rangeLock keeps two writers from allocating in the same unit at the same time.
type rangeLock struct {
	mu      sync.Mutex
	free    sync.Cond
	held    []span
	waiting int
}

// span is [lo, hi).
type span struct{ lo, hi int64 }

func (r *rangeLock) lock(s span) {
	r.mu.Lock()
	for r.overlaps(s) {
		if r.free.L == nil {
			r.free.L = &r.mu
		}
		r.waiting++
		r.free.Wait()
		r.waiting--
	}
	r.held = append(r.held, s)
	r.mu.Unlock()
}

func (r *rangeLock) overlaps(s span) bool {
	for _, h := range r.held {
		if s.lo < h.hi && h.lo < s.hi {
			return true
		}
	}
	return false
}

func (r *rangeLock) unlock(s span) {
	r.mu.Lock()
	for i, h := range r.held {
		if h == s {
			r.held[i] = r.held[len(r.held)-1]
			r.held = r.held[:len(r.held)-1]
			break
		}
	}
	if r.waiting > 0 {
		r.free.Broadcast()
	}
	r.mu.Unlock()
}
