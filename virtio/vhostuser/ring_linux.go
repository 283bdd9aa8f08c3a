package vhostuser

import (
	"encoding/binary"
	"errors"
	"sync"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/internal/vhostmsg"
)

// ring is a queue as the front-end has set it up.
type ring struct {
	index                    int
	cfg                      virtio.QueueConfig
	userDesc, userAvail, use uint64 // addresses of the front-end's
	addressed                bool   // SET_VRING_ADDR was there
	enabled                  bool
	started                  bool // kicked: to run as soon as enabled
	resumed                  bool // cfg has its ring positions from an earlier run
	broken                   bool // by the guest's driver: not to run before it is set up again

	kick, call, err *virtio.Event
	callMu          sync.RWMutex // call and err change while the ring runs

	run *virtio.QueueRun // nil if it does not run
}

// ring is one that a message names.
func (s *session) ring(i uint64) (*ring, error) {
	if i >= uint64(len(s.rings)) {
		return nil, bad("ring %d of %d", i, len(s.rings))
	}
	return s.rings[i], nil
}

func (s *session) setVringNum(r *ring, m *vhostmsg.Message) (*vhostmsg.Message, error) {
	n := binary.LittleEndian.Uint32(m.Payload[4:])
	switch {
	case r.run != nil:
		return nil, bad("ring %d is running", r.index)
	case n == 0 || n > virtio.MaxQueueSize: // the rest is the driver's choice
		return nil, bad("size %d of ring %d is not 1 to %d", n, r.index, virtio.MaxQueueSize)
	}
	r.cfg.Size, r.broken = uint16(n), false
	return nil, nil
}

func (s *session) setVringBase(r *ring, m *vhostmsg.Message) (*vhostmsg.Message, error) {
	base := binary.LittleEndian.Uint32(m.Payload[4:])
	switch {
	case r.run != nil:
		return nil, bad("ring %d is running", r.index)
	case base > 0xffff:
		return nil, bad("base %d of ring %d", base, r.index)
	}
	r.cfg.AvailIndex, r.resumed, r.broken = uint16(base), false, false
	return nil, nil
}

// getVringBase stops a ring.
func (s *session) getVringBase(r *ring, _ *vhostmsg.Message) (*vhostmsg.Message, error) {
	if err := s.stop(r); err != nil {
		return nil, err
	}
	r.started, r.broken = false, false
	s.deactivate()
	b := binary.LittleEndian.AppendUint32(nil, uint32(r.index))
	return &vhostmsg.Message{Payload: binary.LittleEndian.AppendUint32(b, uint32(r.cfg.AvailIndex))}, nil
}

func (s *session) setVringEnable(r *ring, m *vhostmsg.Message) (*vhostmsg.Message, error) {
	r.enabled = binary.LittleEndian.Uint32(m.Payload[4:]) == 1
	if !r.enabled {
		return nil, s.stop(r)
	}
	return nil, s.start(r)
}

func (s *session) setVringAddr(r *ring, m *vhostmsg.Message) (*vhostmsg.Message, error) {
	le, p := binary.LittleEndian, m.Payload
	if le.Uint32(p[4:])&1 != 0 {
		return nil, bad("logging was not negotiated")
	}
	r.userDesc, r.use, r.userAvail = le.Uint64(p[8:]), le.Uint64(p[16:]), le.Uint64(p[24:])
	r.addressed = true
	if r.run != nil { // the rings move, as after a new memory table
		if err := s.stop(r); err != nil {
			return nil, err
		}
	}
	r.broken = false
	return nil, s.start(r)
}

func (s *session) setVringKick(r *ring, ev *virtio.Event) error {
	if ev == nil {
		return bad("ring %d: polling without a kick descriptor is not supported", r.index)
	}
	if err := s.stop(r); err != nil {
		ev.Close()
		return err
	}
	if r.kick != nil {
		r.kick.Close()
	}
	r.kick, r.started, r.broken = ev, true, false
	// Without protocol features there is no SET_VRING_ENABLE.
	if s.protocol == 0 {
		r.enabled = true
	}
	return s.start(r)
}

func (s *session) setVringCall(r *ring, ev *virtio.Event) error {
	r.swap(&r.call, ev)
	if ev != nil && r.run != nil {
		ev.Signal() // an interrupt may have gone to the old one
	}
	return nil
}

func (s *session) setVringErr(r *ring, ev *virtio.Event) error {
	r.swap(&r.err, ev)
	return nil
}

// swap puts an event in the place of another, which may be in use.
func (r *ring) swap(at **virtio.Event, ev *virtio.Event) {
	r.callMu.Lock()
	old := *at
	*at = ev
	r.callMu.Unlock()
	if old != nil {
		old.Close()
	}
}

// interrupt tells the driver about used buffers.
func (r *ring) interrupt() {
	r.callMu.RLock()
	defer r.callMu.RUnlock()
	if r.call != nil {
		r.call.Signal() // nothing to be done about an error here
	}
}

// start runs a ring that is set up, kicked and enabled. Its error ends the
// connection and is for what the front-end itself says; a ring that cannot run
// because of what the guest's driver says is broken.
func (s *session) start(r *ring) error {
	if r.run != nil || r.broken || !r.started || !r.enabled || !r.addressed || r.kick == nil || s.mem.mem == nil {
		return nil
	}
	if r.cfg.Size == 0 {
		return bad("ring %d has no size", r.index)
	}
	cfg := r.cfg
	cfg.Ready = true
	for _, a := range []struct {
		to   *uint64
		user uint64
	}{{&cfg.Desc, r.userDesc}, {&cfg.Driver, r.userAvail}, {&cfg.Device, r.use}} {
		var err error
		if *a.to, err = s.mem.guest(a.user); err != nil {
			return bad("ring %d: %v", r.index, err)
		}
	}
	if err := cfg.Validate(s.mem.mem); err != nil {
		s.breakRing(r, err)
		return nil
	}
	if !r.resumed {
		if err := s.position(r, &cfg); errors.Is(err, virtio.ErrQueueConfig) || errors.Is(err, virtio.ErrFault) {
			s.breakRing(r, err)
			return nil
		} else if err != nil {
			return bad("ring %d: %v", r.index, err)
		}
	}
	if !s.active {
		if err := s.dev.Activate(s.features, &s.notifier); err != nil {
			s.breakRing(r, err)
			return nil
		}
		s.active = true
	}
	q, err := cfg.Activate(s.mem.mem, s.features, r.kick, r.interrupt)
	if err != nil { // resubmitted requests that cannot be
		return bad("ring %d: %v", r.index, err)
	}
	if cfg.UsedIndex != 0 {
		// A server that was killed may have returned requests and not told
		// the driver any more.
		r.interrupt()
	}
	r.cfg, r.resumed = cfg, true
	r.cfg.Resubmit = nil
	r.run = q.Run(s.dev, r.index, func(err error) { s.tellBroken(r, err) })
	return nil
}

// position finds out where a ring goes on: where the used ring is, or the
// requests in flight of an earlier back-end say. An ErrQueueConfig or ErrFault
// is about the ring.
func (s *session) position(r *ring, cfg *virtio.QueueConfig) error {
	return virtio.CatchFault(func() error {
		var idx [2]byte
		if err := s.mem.mem.Read(cfg.Device+2, idx[:]); err != nil {
			return err
		}
		cfg.UsedIndex = binary.LittleEndian.Uint16(idx[:])
		if s.inflight == nil || r.index >= len(s.inflight.queues) {
			return nil
		}
		t, heads, avail, err := resume(s.inflight.queues[r.index], cfg.Size, cfg.UsedIndex)
		if err != nil {
			return err
		}
		cfg.Tracker, cfg.Resubmit = t, heads
		if len(heads) > 0 {
			// Where we were, rather than where the front-end believes: it
			// did not hear from us at the end.
			cfg.AvailIndex = avail
		}
		return nil
	})
}

// breakRing gives up a ring that is not running.
func (s *session) breakRing(r *ring, err error) {
	r.broken = true
	s.tellBroken(r, err)
}

// tellBroken says that a ring is broken: on its error descriptor, and as
// NEEDS_RESET in the status, of which the front-end hears as of any change of
// the configuration.
func (s *session) tellBroken(r *ring, err error) {
	s.o.Logger.Warn("vhost-user: ring stopped", "ring", r.index, "error", err)
	r.callMu.RLock()
	if r.err != nil {
		r.err.Signal() // nothing to be done about an error here
	}
	r.callMu.RUnlock()
	if !s.needsReset.Swap(true) {
		s.notifier.ConfigChanged()
	}
}

// stop ends a ring, when its requests in flight have, and remembers where it
// was. It fails only if the server is to stop before that.
func (s *session) stop(r *ring) error {
	if r.run == nil {
		return nil
	}
	r.run.Stop()
	select {
	case <-r.run.Done():
		s.stopped(r)
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

func (s *session) stopped(r *ring) {
	r.run.Release()
	r.cfg.AvailIndex, r.cfg.UsedIndex = r.run.Position()
	r.run, r.broken = nil, r.run.Broken()
}
