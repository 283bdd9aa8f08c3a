package vhostuser

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/internal/vhostmsg"
)

const protocolFeatures = vhostmsg.ProtoMQ | vhostmsg.ProtoReplyAck | vhostmsg.ProtoBackendReq | vhostmsg.ProtoConfig |
	vhostmsg.ProtoInflight | vhostmsg.ProtoResetDevice | vhostmsg.ProtoMemSlots | vhostmsg.ProtoStatus

// session is one connection: everything the front-end has set up. One
// goroutine handles its messages; each running ring has another.
type session struct {
	ctx  context.Context // ends when the server is to stop
	conn *vhostmsg.Conn
	dev  virtio.Device
	o    Options

	offered  uint64
	features uint64 // negotiated
	protocol uint64 // protocol features
	mem      memory
	rings    []*ring
	inflight *inflight
	active   bool // the device is activated
	sharing  bool // the device uses the in-flight region, too

	status     uint8       // that the front-end has set
	needsReset atomic.Bool // a ring is broken

	notifier notifier
}

func newSession(ctx context.Context, c *net.UnixConn, dev virtio.Device, o Options) *session {
	s := &session{
		ctx: ctx, conn: &vhostmsg.Conn{C: c}, dev: dev, o: o,
		offered: dev.Features() | virtio.FeatureVersion1 | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx | vhostmsg.FeatureProtocol,
	}
	s.notifier.fd = -1
	for i, n := range dev.QueueSizes() {
		s.rings = append(s.rings, &ring{index: i, cfg: virtio.QueueConfig{MaxSize: n}})
	}
	return s
}

func (s *session) setFeatures(m *vhostmsg.Message) error {
	f := binary.LittleEndian.Uint64(m.Payload)
	if f&^s.offered != 0 {
		return bad("features %#x were not offered", f&^s.offered)
	}
	f &^= vhostmsg.FeatureProtocol
	if f == s.features {
		return nil
	}
	for _, r := range s.rings {
		if r.run != nil {
			return bad("the features change while a ring runs")
		}
	}
	s.features = f
	return nil
}

func (s *session) setProtocolFeatures(m *vhostmsg.Message) error {
	f := binary.LittleEndian.Uint64(m.Payload)
	if f&^protocolFeatures != 0 {
		return bad("protocol features %#x were not offered", f&^protocolFeatures)
	}
	s.protocol = f
	return nil
}

// fullStatus is the status with what the device adds to it.
func (s *session) fullStatus() uint64 {
	if s.needsReset.Load() {
		return uint64(s.status | virtio.StatusNeedsReset)
	}
	return uint64(s.status)
}

func (s *session) setStatus(m *vhostmsg.Message) error {
	v := binary.LittleEndian.Uint64(m.Payload)
	if v > 0xff {
		return bad("status %#x", v)
	}
	if v == 0 {
		return s.reset()
	}
	s.status = uint8(v) &^ virtio.StatusNeedsReset // only the device sets that one
	return nil
}

// deactivate resets the device when its last ring has stopped.
func (s *session) deactivate() {
	for _, r := range s.rings {
		if r.run != nil {
			return
		}
	}
	if s.active {
		s.active = false
		s.dev.Reset()
	}
}

func (s *session) reset() error {
	for _, r := range s.rings {
		if err := s.stop(r); err != nil {
			return err
		}
		r.started, r.enabled, r.addressed, r.resumed, r.broken = false, false, false, false, false
		r.cfg.AvailIndex, r.cfg.UsedIndex, r.cfg.Tracker = 0, 0, nil
	}
	s.deactivate()
	s.features, s.status = 0, 0
	s.needsReset.Store(false)
	return nil
}

// pause stops all running rings for a change of memory and returns how to go
// on.
func (s *session) pause() (resume func() error, err error) {
	var was []*ring
	for _, r := range s.rings {
		if r.run != nil {
			if err := s.stop(r); err != nil {
				return nil, err
			}
			was = append(was, r)
		}
	}
	return func() error {
		for _, r := range was {
			if err := s.start(r); err != nil {
				return err
			}
		}
		// Rings that waited for memory.
		for _, r := range s.rings {
			if err := s.start(r); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// close ends everything. If requests in flight outlast ctx, what they use stays.
func (s *session) close(ctx context.Context) error {
	for _, r := range s.rings {
		if r.run != nil {
			r.run.Stop()
		}
	}
	for _, r := range s.rings {
		if r.run == nil {
			continue
		}
		select {
		case <-r.run.Done():
			s.stopped(r)
		case <-ctx.Done():
			r.run.Release()
			return fmt.Errorf("%w: %w", ErrStuck, ctx.Err())
		}
	}
	s.deactivate()
	// The flush that this takes may be long; it is cut short only when the
	// server is to stop.
	patient, cancel := context.WithCancel(context.Background())
	defer cancel()
	defer context.AfterFunc(s.ctx, func() { time.AfterFunc(s.o.CloseWait, cancel) })()
	switch err := s.sharePending(patient, nil); {
	case errors.Is(err, ErrStuck):
		return err
	case err != nil:
		s.o.Logger.Warn("vhost-user: flush at the end of the connection", "error", err)
	}
	s.notifier.set(-1)
	for _, r := range s.rings {
		for _, e := range []*virtio.Event{r.kick, r.call, r.err} {
			if e != nil {
				e.Close()
			}
		}
	}
	s.inflight.close()
	s.mem.close()
	return nil
}
