package agent

import "sync"

// queue holds frames, at most Window bytes of payload: more than that was
// never granted.
type queue struct {
	mu     sync.Mutex
	cond   sync.Cond
	frames []Frame
	bytes  int
	closed bool
}

func newQueue() *queue {
	q := &queue{}
	q.cond.L = &q.mu
	return q
}

// put appends a frame; false says that there is no room.
func (q *queue) put(f Frame) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || len(f.Payload) == 0 {
		return true
	}
	if q.bytes+len(f.Payload) > Window {
		return false
	}
	q.bytes += len(f.Payload)
	q.frames = append(q.frames, f)
	q.cond.Broadcast()
	return true
}

// take waits for a frame; false says that the queue is closed and empty.
func (q *queue) take() (Frame, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.frames) == 0 {
		if q.closed {
			return Frame{}, false
		}
		q.cond.Wait()
	}
	f := q.frames[0]
	q.frames = q.frames[1:]
	q.bytes -= len(f.Payload)
	return f, true
}

// close ends the queue; what is in it can still be taken.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.cond.Broadcast()
}

// drop closes the queue and forgets what is in it.
func (q *queue) drop() {
	q.close()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.frames, q.bytes = nil, 0
}
