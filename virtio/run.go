package virtio

// A QueueRun is the life of a queue that a device serves, whatever the
// transport:
//
//	served ── Stop, or a fault of the driver ──▶ draining ──▶ Done ──▶ Release
//
// Its methods are safe for concurrent use.
type QueueRun struct {
	q    *Queue
	done chan struct{}
	err  error // written before done is closed
}

// Run has dev serve its queue i on a goroutine of its own, until the queue is
// stopped or the device gives it up. In that case gaveUp is called with the
// reason, by that goroutine and before Done is closed. Guest memory that
// vanishes under the device is such a reason (ErrFault).
func (q *Queue) Run(dev Device, i int, gaveUp func(error)) *QueueRun {
	r := &QueueRun{q: q, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		if r.err = CatchFault(func() error { return dev.ServeQueue(i, q) }); r.err != nil {
			gaveUp(r.err)
		}
	}()
	return r
}

// Stop lets the device take no further requests from the queue. It does not
// wait for the ones it has: Done does.
func (r *QueueRun) Stop() { r.q.Stop() }

// Stopped reports whether Stop was called.
func (r *QueueRun) Stopped() bool { return r.q.Stopped() }

// Done is closed when the device has let go of the queue.
func (r *QueueRun) Done() <-chan struct{} { return r.done }

// Ended reports whether Done is closed.
func (r *QueueRun) Ended() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// Broken reports whether the device has given the queue up.
func (r *QueueRun) Broken() bool { return r.Ended() && r.err != nil }

// Position is where the queue is to go on, once the run has ended.
func (r *QueueRun) Position() (avail, used uint16) { return r.q.Position() }

// Release takes the queue from a device that may still be at it: its requests
// complete into nothing, and neither rings nor interrupts are touched any
// more. It may be called again.
func (r *QueueRun) Release() { r.q.Release() }
