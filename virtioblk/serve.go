package virtioblk

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/moovm/moovm/virtio"
)

// How requests of a queue run concurrently.
//
// Handing every request to another goroutine costs more than the request when
// the backend answers from memory, and handling each in turn wastes a backend
// that has to wait for a device. So one of a queue's workers leads: it alone
// takes chains from the ring. A request whose kind has been fast lately it
// handles itself and stays the leader; for a slow one it first passes the
// leadership to another worker. If a request believed to be fast gets stuck, a
// watchdog passes the leadership on instead of the leader, so that no request
// ever waits for another one's backend call for long.
const (
	slowRequest   = 30 * time.Microsecond // from here on others go ahead
	watchInterval = 2 * time.Millisecond
	watchIdle     = 20                    // intervals until the watchdog sleeps
	batchTime     = 50 * time.Microsecond // completions held back at most this long,
	batchBytes    = 64 << 10              // or for this many bytes
	limitStep     = 5 * time.Millisecond  // how often a throttled leader looks for Stop
)

// server serves one queue from ServeQueue's call to its return.
type server struct {
	d     *Device
	q     *virtio.Queue
	c     *counters
	start time.Time

	lead    chan struct{} // holds the leadership while it is passed on
	quit    chan struct{} // closed when there is no leader any more
	workers int           // goroutines started; the leader's
	idle    atomic.Int32  // goroutines that wait for lead
	wg      sync.WaitGroup
	once    sync.Once
	err     error // set before quit is closed

	serial  uint64        // the leader's count of requests it handled itself
	inline  atomic.Uint64 // serial while the leader handles one; 0: none
	asleep  atomic.Bool   // the watchdog waits for wake
	wake    chan struct{}
	average [numKinds]atomic.Int64 // recent handling time, in ns
}

// ServeQueue implements virtio.Device.
func (d *Device) ServeQueue(i int, q *virtio.Queue) error {
	s := &server{
		d: d, q: q, c: &d.counters[i], start: time.Now(),
		lead: make(chan struct{}, 1),
		quit: make(chan struct{}),
		wake: make(chan struct{}, 1),
	}
	s.asleep.Store(true)
	s.wg.Add(1)
	go s.watch()
	s.workers = 1
	s.lead <- struct{}{}
	s.work()
	s.wg.Wait()
	return s.err
}

func (s *server) now() time.Duration { return time.Since(s.start) }

// stop ends serving; the first reason counts.
func (s *server) stop(err error) {
	s.once.Do(func() {
		s.err = err
		s.q.Stop()
		close(s.quit)
	})
}

// work is the life of a worker. Guest memory can vanish under its hands.
func (s *server) work() {
	if err := virtio.CatchFault(s.loop); err != nil {
		s.stop(err)
	}
}

// follow waits for the leadership; false means that there is none any more.
func (s *server) follow() bool {
	s.idle.Add(1)
	defer s.idle.Add(-1)
	select {
	case <-s.lead:
		return true
	case <-s.quit:
		return false
	}
}

// pass gives the leadership away. Only its holder calls it, or the watchdog
// for a holder that has lost it.
func (s *server) pass() {
	if s.idle.Load() == 0 && s.workers < s.d.workers {
		s.workers++
		s.wg.Add(1)
		go func() {
			defer s.wg.Done()
			s.work()
		}()
	}
	s.lead <- struct{}{} // has room: there is only one leadership
}

func (s *server) loop() error {
	if !s.follow() {
		return nil
	}
	var (
		r        request
		unsaid   int // bytes of completions not notified yet
		notified time.Duration
	)
	r.bufs = make([][]byte, 0, 16)
	for {
		c, err := s.q.Next()
		if err != nil {
			return err
		}
		if c == nil {
			s.q.Notify()
			unsaid = 0
			if !s.q.Wait() {
				s.stop(nil)
				return nil
			}
			notified = s.now()
			continue
		}
		start := s.now()
		s.c.started.Add(1)
		valid := r.parse(c)
		if valid && s.d.limiter.on.Load() {
			s.q.Notify()
			s.throttle(int64(r.size))
		}
		if valid && time.Duration(s.average[r.kind].Load()) > slowRequest {
			s.pass()
			s.handle(&r, valid, start)
			s.q.Notify()
			unsaid = 0
			if !s.follow() {
				return nil
			}
			notified = s.now()
			continue
		}
		number := s.begin()
		end := s.handle(&r, valid, start)
		led := s.inline.CompareAndSwap(number, 0)
		if unsaid += r.size; !led || unsaid >= batchBytes || end-notified >= batchTime {
			s.q.Notify()
			unsaid, notified = 0, end
		}
		if !led && !s.follow() {
			return nil
		}
	}
}

// begin announces to the watchdog that the leader handles a request itself.
func (s *server) begin() uint64 {
	s.serial++
	n := s.serial // once stored below, the leadership can be gone
	s.inline.Store(n)
	if s.asleep.Load() && s.asleep.CompareAndSwap(true, false) {
		s.wake <- struct{}{} // has room: the watchdog has emptied it
	}
	return n
}

// handle executes a request and puts it into the used ring. It returns the
// time at the end.
func (s *server) handle(r *request, valid bool, start time.Duration) time.Duration {
	var status byte = statusIOErr
	if valid {
		status = s.d.execute(r)
	}
	r.finish(status)
	end := s.now()
	took := end - start
	avg := &s.average[r.kind]
	old := avg.Load()
	avg.Store(old + (int64(min(took, 100*time.Millisecond))-old)/4) // lost updates do no harm
	s.c.done(r.kind, int64(r.size), status == statusOK, took)
	s.q.Push(r.chain)
	return end
}

// throttle waits until the limit lets n more bytes pass. The whole queue
// waits: what is behind would have to wait for longer.
func (s *server) throttle(n int64) {
	wait := s.d.limiter.take(n, time.Now())
	for wait > 0 && !s.q.Stopped() {
		step := min(wait, limitStep)
		time.Sleep(step)
		wait -= step
	}
}

// watch passes the leadership on when the leader is stuck in a request.
func (s *server) watch() {
	defer s.wg.Done()
	for {
		select {
		case <-s.quit:
			return
		case <-s.wake:
		}
		ticks := time.NewTicker(watchInterval)
		var last uint64
		for quiet := 0; quiet < watchIdle; {
			select {
			case <-s.quit:
				ticks.Stop()
				return
			case <-ticks.C:
			}
			switch n := s.inline.Load(); {
			case n == 0:
				quiet++
			case n != last:
				last, quiet = n, 0
			case s.inline.CompareAndSwap(n, 0):
				s.pass()
			}
		}
		ticks.Stop()
		// A request that begins from here on wakes us up; one that began
		// just before is caught by looking once more.
		s.asleep.Store(true)
		if s.inline.Load() != 0 && s.asleep.CompareAndSwap(true, false) {
			s.wake <- struct{}{}
		}
	}
}
