package vhostuser

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/internal/vhostmsg"
)

// pendingSharer is a device with something to remember about requests that it
// has completed, which the front-end keeps for it (virtioblk.PendingSharer).
type pendingSharer interface {
	PendingLen() int64
	SharePending(mem []byte) error
}

func (s *session) pendingLen() uint64 {
	if p, ok := s.dev.(pendingSharer); ok {
		return uint64(max(p.PendingLen(), 0))
	}
	return 0
}

// sharePending lets the device use mem, or no memory if it is nil. The device
// may flush first, and not be done when ctx ends; then it is ErrStuck.
func (s *session) sharePending(ctx context.Context, mem []byte) error {
	p, ok := s.dev.(pendingSharer)
	if !ok || mem == nil && !s.sharing {
		return nil
	}
	s.sharing = true
	done := make(chan error, 1)
	go func() { done <- p.SharePending(mem) }()
	select {
	case err := <-done:
		s.sharing = mem != nil && err == nil
		return err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrStuck, ctx.Err())
	}
}

// getInflightFD makes a region for requests in flight. SET_INFLIGHT_FD brings it
// back.
func (s *session) getInflightFD(m *vhostmsg.Message) (*vhostmsg.Message, error) {
	queues, entries, err := s.inflightShape(m.Payload)
	if err != nil {
		return nil, err
	}
	fd, size, err := newInflight(queues, entries, s.pendingLen())
	if err != nil {
		return nil, err
	}
	b := append(u64(size), u64(0)...)
	b = binary.LittleEndian.AppendUint16(b, uint16(queues))
	b = binary.LittleEndian.AppendUint16(b, entries)
	return &vhostmsg.Message{Payload: append(b, make([]byte, len(m.Payload)-len(b))...), FDs: []int{fd}}, nil
}

// setInflightFD goes on with a region, perhaps one of an earlier back-end.
func (s *session) setInflightFD(m *vhostmsg.Message) error {
	queues, entries, err := s.inflightShape(m.Payload)
	if err != nil {
		return err
	}
	for _, r := range s.rings {
		if r.run != nil {
			return bad("a ring is running")
		}
	}
	size, off := binary.LittleEndian.Uint64(m.Payload), binary.LittleEndian.Uint64(m.Payload[8:])
	in, err := openInflight(m.FDs[0], off, size, queues, entries, s.pendingLen())
	if err != nil {
		return err
	}
	if err := s.sharePending(s.ctx, in.pending); err != nil {
		if !errors.Is(err, ErrStuck) { // else it is still in use
			in.close()
		}
		return err
	}
	for _, r := range s.rings { // they must not write to the old one
		r.cfg.Tracker, r.resumed = nil, false
	}
	s.inflight.close()
	s.inflight = in
	return nil
}

// inflightShape is what a message says about the region.
func (s *session) inflightShape(p []byte) (queues int, entries uint16, err error) {
	queues, entries = int(binary.LittleEndian.Uint16(p[16:])), binary.LittleEndian.Uint16(p[18:])
	if queues < 1 || queues > len(s.rings) || entries == 0 || entries > virtio.MaxQueueSize {
		return 0, 0, bad("%d queues of %d descriptors in flight", queues, entries)
	}
	return queues, entries, nil
}
