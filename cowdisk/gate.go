package cowdisk

import (
	"sync"
	"sync/atomic"
	"time"
)

// gate counts operations in flight so that the disk can be closed, or its chain changed, when there are none. The counters are spread over
// cache lines: readers on different processors share nothing that is written.
//
//	open ──pause──▶ paused ──resume──▶ open
//	open ──close──▶ closed
type gate struct {
	shards [gateShards]struct {
		n atomic.Int64
		_ [56]byte
	}
	shut   atomic.Bool // paused or closed: the slow path decides
	mu     sync.Mutex  // held while paused
	closed atomic.Bool
}

const gateShards = 16

// enter admits an operation; key spreads the load. It reports false when the disk is closed.
func (g *gate) enter(key int64) (*atomic.Int64, bool) {
	n := &g.shards[uint64(key)%gateShards].n
	for {
		n.Add(1)
		if !g.shut.Load() {
			return n, true
		}
		n.Add(-1)
		g.mu.Lock() // held while paused
		closed := g.closed.Load()
		g.mu.Unlock()
		if closed {
			return nil, false
		}
	}
}

// pause stops new operations and waits for the running ones. It reports false when the disk is closed.
func (g *gate) pause() bool {
	g.mu.Lock()
	if g.closed.Load() {
		g.mu.Unlock()
		return false
	}
	g.shut.Store(true)
	g.drain()
	return true
}

func (g *gate) resume() {
	g.shut.Store(false)
	g.mu.Unlock()
}

// close is a pause for good; the second close reports false.
func (g *gate) close() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed.Swap(true) {
		return false
	}
	g.shut.Store(true)
	g.drain()
	return true
}

func (g *gate) drain() {
	for wait := time.Microsecond; ; wait = min(2*wait, time.Millisecond) {
		var n int64
		for i := range g.shards {
			n += g.shards[i].n.Load()
		}
		if n == 0 {
			return
		}
		time.Sleep(wait)
	}
}
