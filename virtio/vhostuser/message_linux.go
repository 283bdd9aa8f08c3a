package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/internal/vhostmsg"
)

func bad(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}

// serve handles messages until the end of the connection.
func (s *session) serve() error {
	for {
		var m vhostmsg.Message
		if err := s.conn.Read(&m); err != nil {
			switch {
			case errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed), errors.Is(err, unix.ECONNRESET):
				return nil
			case errors.Is(err, vhostmsg.ErrFormat):
				return bad("%v", err)
			}
			return fmt.Errorf("vhost-user: %w", err)
		}
		err := s.handle(&m)
		m.CloseFDs()
		if err != nil {
			return err
		}
	}
}

// handle serves one message and answers it, if it wants an answer.
func (s *session) handle(m *vhostmsg.Message) error {
	if m.Reply {
		return bad("%v: a reply to no request", m.Type)
	}
	reply, err := s.dispatch(m)
	if errors.Is(err, errRefused) {
		// Not what ends a connection: the guest's driver can have asked for it.
		reply, err = nil, nil
		if m.Type == vhostmsg.GetConfig {
			reply = &vhostmsg.Message{}
		} else if m.NeedReply && s.protocol&vhostmsg.ProtoReplyAck != 0 {
			reply = &vhostmsg.Message{Payload: u64(1)}
		}
		if reply == nil {
			return nil
		}
	}
	if err != nil {
		if errors.Is(err, ErrProtocol) {
			err = fmt.Errorf("%w (%v)", err, m.Type)
		} else {
			err = bad("%v: %v", m.Type, err)
		}
		if m.NeedReply && s.protocol&vhostmsg.ProtoReplyAck != 0 {
			s.conn.Write(&vhostmsg.Message{Type: m.Type, Reply: true, Payload: u64(1)}) // the connection ends anyway
		}
		return err
	}
	switch {
	case reply != nil:
		defer func() {
			for _, fd := range reply.FDs {
				unix.Close(fd)
			}
		}()
		reply.Type, reply.Reply = m.Type, true
		err = s.conn.Write(reply)
	case m.NeedReply && s.protocol&vhostmsg.ProtoReplyAck != 0:
		err = s.conn.Write(&vhostmsg.Message{Type: m.Type, Reply: true, Payload: u64(0)})
	}
	if err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, unix.EPIPE) {
		return fmt.Errorf("vhost-user: %w", err)
	}
	return nil
}

// errRefused is the end of a request that fails without a lie in it: no payload
// for GET_CONFIG, as the protocol has it.
var errRefused = errors.New("vhost-user: refused")

func u64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// request is what a message of some type comes with and what is done then. The
// descriptors that do keeps it takes out of the message.
type request struct {
	size int // bytes of payload, at least
	fds  int // descriptors, exactly; 0: they go unused, or do counts them
	do   func(*session, *vhostmsg.Message) (reply *vhostmsg.Message, err error)
}

// requests are all that a front-end may ask for.
var requests = map[vhostmsg.Type]request{
	vhostmsg.GetFeatures:         {0, 0, number(func(s *session) uint64 { return s.offered })},
	vhostmsg.SetFeatures:         {8, 0, silent((*session).setFeatures)},
	vhostmsg.GetProtocolFeatures: {0, 0, number(func(*session) uint64 { return protocolFeatures })},
	vhostmsg.SetProtocolFeatures: {8, 0, silent((*session).setProtocolFeatures)},
	vhostmsg.SetOwner:            {0, 0, silent(func(*session, *vhostmsg.Message) error { return nil })},
	vhostmsg.ResetOwner:          {0, 0, silent(func(s *session, _ *vhostmsg.Message) error { return s.reset() })},
	vhostmsg.ResetDevice:         {0, 0, silent(func(s *session, _ *vhostmsg.Message) error { return s.reset() })},
	vhostmsg.GetStatus:           {0, 0, number((*session).fullStatus)},
	vhostmsg.SetStatus:           {8, 0, silent((*session).setStatus)},
	vhostmsg.GetQueueNum:         {0, 0, number(func(s *session) uint64 { return uint64(len(s.rings)) })},

	vhostmsg.GetMaxMemSlots: {0, 0, number(func(*session) uint64 { return maxSlots })},
	vhostmsg.SetMemTable:    {8, 0, silent((*session).setMemTable)},
	vhostmsg.AddMemReg:      {8 + vhostmsg.RegionSize, 1, silent((*session).addMemReg)},
	vhostmsg.RemMemReg:      {8 + vhostmsg.RegionSize, 0, silent((*session).remMemReg)},

	vhostmsg.GetConfig:       {configHeader, 0, (*session).getConfig},
	vhostmsg.SetConfig:       {configHeader, 0, silent((*session).setConfig)},
	vhostmsg.SetBackendReqFD: {0, 1, silent((*session).setBackendReqFD)},

	vhostmsg.GetInflightFD: {20, 0, (*session).getInflightFD},
	vhostmsg.SetInflightFD: {20, 1, silent((*session).setInflightFD)},

	vhostmsg.SetVringNum:    {8, 0, onRing((*session).setVringNum)},
	vhostmsg.SetVringBase:   {8, 0, onRing((*session).setVringBase)},
	vhostmsg.GetVringBase:   {8, 0, onRing((*session).getVringBase)},
	vhostmsg.SetVringAddr:   {40, 0, onRing((*session).setVringAddr)},
	vhostmsg.SetVringEnable: {8, 0, onRing((*session).setVringEnable)},
	vhostmsg.SetVringKick:   {8, 0, withEvent((*session).setVringKick)},
	vhostmsg.SetVringCall:   {8, 0, withEvent((*session).setVringCall)},
	vhostmsg.SetVringErr:    {8, 0, withEvent((*session).setVringErr)},
}

// dispatch does what a message says.
func (s *session) dispatch(m *vhostmsg.Message) (*vhostmsg.Message, error) {
	r, ok := requests[m.Type]
	switch {
	case !ok:
		return nil, bad("unknown")
	case len(m.Payload) < r.size:
		return nil, bad("%d bytes of payload, want %d", len(m.Payload), r.size)
	case r.fds != 0 && len(m.FDs) != r.fds:
		return nil, bad("%d descriptors, want %d", len(m.FDs), r.fds)
	}
	return r.do(s, m)
}

// number is a request for a number.
func number(get func(*session) uint64) func(*session, *vhostmsg.Message) (*vhostmsg.Message, error) {
	return func(s *session, _ *vhostmsg.Message) (*vhostmsg.Message, error) {
		return &vhostmsg.Message{Payload: u64(get(s))}, nil
	}
}

// silent is a request without an answer of its own.
func silent(do func(*session, *vhostmsg.Message) error) func(*session, *vhostmsg.Message) (*vhostmsg.Message, error) {
	return func(s *session, m *vhostmsg.Message) (*vhostmsg.Message, error) { return nil, do(s, m) }
}

// onRing is a request about a ring.
func onRing(do func(*session, *ring, *vhostmsg.Message) (*vhostmsg.Message, error)) func(*session, *vhostmsg.Message) (*vhostmsg.Message, error) {
	return func(s *session, m *vhostmsg.Message) (*vhostmsg.Message, error) {
		r, err := s.ring(uint64(binary.LittleEndian.Uint32(m.Payload)))
		if err != nil {
			return nil, err
		}
		return do(s, r, m)
	}
}

// withEvent is a request that gives a ring an event, or takes one away: then it
// is nil. The event is do's.
func withEvent(do func(*session, *ring, *virtio.Event) error) func(*session, *vhostmsg.Message) (*vhostmsg.Message, error) {
	return silent(func(s *session, m *vhostmsg.Message) error {
		v := binary.LittleEndian.Uint64(m.Payload)
		r, err := s.ring(v & vhostmsg.VringIndexMask)
		if err != nil {
			return err
		}
		if v&vhostmsg.VringNoFD != 0 {
			return do(s, r, nil)
		}
		ev, err := takeEvent(r, m)
		if err != nil {
			return err
		}
		return do(s, r, ev)
	})
}

// takeEvent is the event that a message carries.
func takeEvent(r *ring, m *vhostmsg.Message) (*virtio.Event, error) {
	if len(m.FDs) != 1 {
		return nil, bad("%d descriptors, want 1", len(m.FDs))
	}
	// Anything else could block us, or end a read early, or always be
	// readable. The whole name is the kernel's: files have an absolute
	// path, memfds too, so that none can be called like this.
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", m.FDs[0]))
	if err != nil || name != "anon_inode:[eventfd]" {
		return nil, bad("ring %d: the descriptor is no eventfd (%s)", r.index, name)
	}
	ev, err := virtio.NewEventFD(m.FDs[0])
	if err != nil {
		return nil, err
	}
	m.FDs = nil
	return ev, nil
}
