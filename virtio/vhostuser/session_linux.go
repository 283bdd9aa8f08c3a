package vhostuser

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/internal/vhostmsg"
)

const protocolFeatures = vhostmsg.ProtoMQ | vhostmsg.ProtoReplyAck | vhostmsg.ProtoBackendReq | vhostmsg.ProtoConfig |
	vhostmsg.ProtoInflight | vhostmsg.ProtoResetDevice | vhostmsg.ProtoMemSlots | vhostmsg.ProtoStatus

const maxConfig = 256 // VHOST_USER_MAX_CONFIG_SIZE

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

	run   *virtio.Queue
	done  chan struct{}
	fault error // why its server gave up; read after done
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

// want is the number of descriptors a message comes with.
func want(m *vhostmsg.Message, fds int) error {
	if len(m.FDs) != fds {
		return bad("%d descriptors, want %d", len(m.FDs), fds)
	}
	return nil
}

// dispatch does what a message says. The descriptors it keeps it takes out of m.
func (s *session) dispatch(m *vhostmsg.Message) (*vhostmsg.Message, error) {
	le := binary.LittleEndian
	p := m.Payload
	need := map[vhostmsg.Type]int{
		vhostmsg.SetFeatures: 8, vhostmsg.SetProtocolFeatures: 8, vhostmsg.SetVringNum: 8, vhostmsg.SetVringBase: 8,
		vhostmsg.GetVringBase: 8, vhostmsg.SetVringEnable: 8, vhostmsg.SetVringKick: 8, vhostmsg.SetVringCall: 8,
		vhostmsg.SetVringErr: 8, vhostmsg.SetVringAddr: 40, vhostmsg.SetMemTable: 8, vhostmsg.AddMemReg: 8 + vhostmsg.RegionSize,
		vhostmsg.RemMemReg: 8 + vhostmsg.RegionSize, vhostmsg.GetConfig: 12, vhostmsg.SetConfig: 12,
		vhostmsg.GetInflightFD: 20, vhostmsg.SetInflightFD: 20, vhostmsg.SetStatus: 8,
	}[m.Type]
	if len(p) < need {
		return nil, bad("%d bytes of payload, want %d", len(p), need)
	}
	ok := (*vhostmsg.Message)(nil)
	number := func(v uint64) (*vhostmsg.Message, error) { return &vhostmsg.Message{Payload: u64(v)}, nil }
	switch m.Type {
	case vhostmsg.GetFeatures:
		return number(s.offered)
	case vhostmsg.SetFeatures:
		f := le.Uint64(p)
		if f&^s.offered != 0 {
			return nil, bad("features %#x were not offered", f&^s.offered)
		}
		return ok, s.setFeatures(f)
	case vhostmsg.GetProtocolFeatures:
		return number(protocolFeatures)
	case vhostmsg.SetProtocolFeatures:
		f := le.Uint64(p)
		if f&^protocolFeatures != 0 {
			return nil, bad("protocol features %#x were not offered", f&^protocolFeatures)
		}
		s.protocol = f
		return ok, nil
	case vhostmsg.SetOwner:
		return ok, nil
	case vhostmsg.ResetOwner, vhostmsg.ResetDevice:
		return ok, s.reset()
	case vhostmsg.GetStatus:
		v := uint64(s.status)
		if s.needsReset.Load() {
			v |= uint64(virtio.StatusNeedsReset)
		}
		return number(v)
	case vhostmsg.SetStatus:
		v := le.Uint64(p)
		if v > 0xff {
			return nil, bad("status %#x", v)
		}
		if v == 0 {
			return ok, s.reset()
		}
		s.status = uint8(v) &^ virtio.StatusNeedsReset // only the device sets that one
		return ok, nil
	case vhostmsg.GetQueueNum:
		return number(uint64(len(s.rings)))
	case vhostmsg.GetMaxMemSlots:
		return number(maxSlots)
	case vhostmsg.SetMemTable:
		return ok, s.setMemTable(m)
	case vhostmsg.AddMemReg:
		return ok, s.addMemReg(m)
	case vhostmsg.RemMemReg:
		return ok, s.remMemReg(vhostmsg.ParseRegion(p[8:]))
	case vhostmsg.GetConfig:
		off, n, err := configRange(p)
		if err != nil {
			return nil, err
		}
		b := make([]byte, 12+n)
		copy(b, p[:12])
		s.dev.ReadConfig(off, b[12:])
		return &vhostmsg.Message{Payload: b}, nil
	case vhostmsg.SetConfig:
		off, n, err := configRange(p)
		if err != nil {
			return nil, err
		}
		s.dev.WriteConfig(off, p[12:12+n])
		return ok, nil
	case vhostmsg.SetBackendReqFD:
		if err := want(m, 1); err != nil {
			return nil, err
		}
		if t, err := unix.GetsockoptInt(m.FDs[0], unix.SOL_SOCKET, unix.SO_TYPE); err != nil || t != unix.SOCK_STREAM {
			return nil, bad("the descriptor is no stream socket")
		}
		s.notifier.set(m.FDs[0])
		m.FDs = nil
		return ok, nil
	case vhostmsg.GetInflightFD:
		queues, entries := int(le.Uint16(p[16:])), le.Uint16(p[18:])
		if queues < 1 || queues > len(s.rings) || entries == 0 || entries > virtio.MaxQueueSize {
			return nil, bad("%d queues of %d descriptors in flight", queues, entries)
		}
		// SET_INFLIGHT_FD brings it back.
		fd, size, err := newInflight(queues, entries, s.pendingLen())
		if err != nil {
			return nil, err
		}
		b := append(u64(size), u64(0)...)
		b = le.AppendUint16(b, uint16(queues))
		b = le.AppendUint16(b, entries)
		return &vhostmsg.Message{Payload: append(b, make([]byte, len(p)-len(b))...), FDs: []int{fd}}, nil
	case vhostmsg.SetInflightFD:
		if err := want(m, 1); err != nil {
			return nil, err
		}
		queues, entries := int(le.Uint16(p[16:])), le.Uint16(p[18:])
		if queues < 1 || queues > len(s.rings) || entries == 0 || entries > virtio.MaxQueueSize {
			return nil, bad("%d queues of %d descriptors in flight", queues, entries)
		}
		for _, r := range s.rings {
			if r.run != nil {
				return nil, bad("a ring is running")
			}
		}
		in, err := openInflight(m.FDs[0], le.Uint64(p[8:]), le.Uint64(p), queues, entries, s.pendingLen())
		if err != nil {
			return nil, err
		}
		if err := s.sharePending(s.ctx, in.pending); err != nil {
			if !errors.Is(err, ErrStuck) { // else it is still in use
				in.close()
			}
			return nil, err
		}
		for _, r := range s.rings { // they must not write to the old one
			r.cfg.Tracker, r.resumed = nil, false
		}
		s.inflight.close()
		s.inflight = in
		return ok, nil
	case vhostmsg.SetVringNum, vhostmsg.SetVringBase, vhostmsg.GetVringBase, vhostmsg.SetVringEnable, vhostmsg.SetVringAddr:
		i := le.Uint32(p)
		if uint64(i) >= uint64(len(s.rings)) {
			return nil, bad("ring %d of %d", i, len(s.rings))
		}
		return s.ringMessage(s.rings[i], m)
	case vhostmsg.SetVringKick, vhostmsg.SetVringCall, vhostmsg.SetVringErr:
		v := le.Uint64(p)
		i := v & vhostmsg.VringIndexMask
		if i >= uint64(len(s.rings)) {
			return nil, bad("ring %d of %d", i, len(s.rings))
		}
		return ok, s.ringFD(s.rings[i], m, v&vhostmsg.VringNoFD != 0)
	default:
		return nil, bad("unknown")
	}
}

// configRange is what a message says about the configuration space. Where it
// ends the driver may not know.
func configRange(p []byte) (off, n uint32, err error) {
	off, n = binary.LittleEndian.Uint32(p), binary.LittleEndian.Uint32(p[4:])
	switch {
	case uint64(n) > uint64(len(p)-12):
		return 0, 0, bad("%d bytes at %d of the configuration space in %d bytes", n, off, len(p))
	case off > maxConfig || n > maxConfig-off:
		return 0, 0, errRefused
	}
	return off, n, nil
}

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

func (s *session) setFeatures(f uint64) error {
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

func (s *session) ringMessage(r *ring, m *vhostmsg.Message) (*vhostmsg.Message, error) {
	le := binary.LittleEndian
	p := m.Payload
	v := le.Uint32(p[4:])
	if r.run != nil && (m.Type == vhostmsg.SetVringNum || m.Type == vhostmsg.SetVringBase) {
		return nil, bad("ring %d is running", r.index)
	}
	switch m.Type {
	case vhostmsg.SetVringNum:
		if v == 0 || v > virtio.MaxQueueSize { // the rest is the driver's choice
			return nil, bad("size %d of ring %d is not 1 to %d", v, r.index, virtio.MaxQueueSize)
		}
		r.cfg.Size, r.broken = uint16(v), false
	case vhostmsg.SetVringBase:
		if v > 0xffff {
			return nil, bad("base %d of ring %d", v, r.index)
		}
		r.cfg.AvailIndex, r.resumed, r.broken = uint16(v), false, false
	case vhostmsg.GetVringBase:
		if err := s.stop(r); err != nil {
			return nil, err
		}
		r.started, r.broken = false, false
		s.deactivate()
		b := le.AppendUint32(nil, uint32(r.index))
		return &vhostmsg.Message{Payload: le.AppendUint32(b, uint32(r.cfg.AvailIndex))}, nil
	case vhostmsg.SetVringEnable:
		r.enabled = v == 1
		if !r.enabled {
			return nil, s.stop(r)
		}
		return nil, s.start(r)
	case vhostmsg.SetVringAddr:
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
	return nil, nil
}

func (s *session) ringFD(r *ring, m *vhostmsg.Message, none bool) error {
	if none && m.Type == vhostmsg.SetVringKick {
		return bad("ring %d: polling without a kick descriptor is not supported", r.index)
	}
	var ev *virtio.Event
	if !none {
		if err := want(m, 1); err != nil {
			return err
		}
		// Anything else could block us, or end a read early, or always be
		// readable. The whole name is the kernel's: files have an absolute
		// path, memfds too, so that none can be called like this.
		name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", m.FDs[0]))
		if err != nil || name != "anon_inode:[eventfd]" {
			return bad("ring %d: the descriptor is no eventfd (%s)", r.index, name)
		}
		if ev, err = virtio.NewEventFD(m.FDs[0]); err != nil {
			return err
		}
		m.FDs = nil
	}
	closeEvent := func(e *virtio.Event) {
		if e != nil {
			e.Close()
		}
	}
	switch m.Type {
	case vhostmsg.SetVringKick:
		if err := s.stop(r); err != nil {
			closeEvent(ev)
			return err
		}
		closeEvent(r.kick)
		r.kick, r.started, r.broken = ev, true, false
		// Without protocol features there is no SET_VRING_ENABLE.
		if s.protocol == 0 {
			r.enabled = true
		}
		return s.start(r)
	case vhostmsg.SetVringCall:
		r.callMu.Lock()
		old := r.call
		r.call = ev
		r.callMu.Unlock()
		closeEvent(old)
		if ev != nil && r.run != nil {
			ev.Signal() // an interrupt may have gone to the old one
		}
	case vhostmsg.SetVringErr:
		r.callMu.Lock()
		old := r.err
		r.err = ev
		r.callMu.Unlock()
		closeEvent(old)
	}
	return nil
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
	s.serveRing(r, q)
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

// serveRing serves a ring on a goroutine of its own.
func (s *session) serveRing(r *ring, q *virtio.Queue) {
	r.run, r.done, r.fault = q, make(chan struct{}), nil
	go func(done chan struct{}) {
		defer close(done)
		if r.fault = virtio.CatchFault(func() error { return s.dev.ServeQueue(r.index, q) }); r.fault != nil {
			s.tellBroken(r, r.fault)
		}
	}(r.done)
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
	case <-r.done:
		s.stopped(r)
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

func (s *session) stopped(r *ring) {
	r.run.Release()
	r.cfg.AvailIndex, r.cfg.UsedIndex = r.run.Position()
	r.run, r.broken = nil, r.fault != nil
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

func (s *session) setMemTable(m *vhostmsg.Message) error {
	n := int(binary.LittleEndian.Uint32(m.Payload))
	if n > vhostmsg.MaxFDs || len(m.Payload) < 8+n*vhostmsg.RegionSize {
		return bad("%d memory regions in %d bytes", n, len(m.Payload))
	}
	if err := want(m, n); err != nil {
		return err
	}
	var next memory
	for i := range n {
		r, err := mapRegion(vhostmsg.ParseRegion(m.Payload[8+i*vhostmsg.RegionSize:]), m.FDs[i])
		if err != nil {
			next.close()
			return err
		}
		next.regions = append(next.regions, r)
	}
	if err := next.replace(next.regions); err != nil {
		next.close()
		return err
	}
	if n == 0 {
		next.mem = nil
	}
	resume, err := s.pause()
	if err != nil {
		next.close()
		return err
	}
	s.mem.close()
	s.mem = next
	return resume()
}

func (s *session) addMemReg(m *vhostmsg.Message) error {
	if err := want(m, 1); err != nil {
		return err
	}
	if len(s.mem.regions) >= maxSlots {
		return bad("more than %d memory regions", maxSlots)
	}
	r, err := mapRegion(vhostmsg.ParseRegion(m.Payload[8:]), m.FDs[0])
	if err != nil {
		return err
	}
	resume, err := s.pause()
	if err != nil {
		r.unmap()
		return err
	}
	list := append(append([]*region(nil), s.mem.regions...), r)
	if err := s.mem.replace(list); err != nil {
		r.unmap()
		return err
	}
	return resume()
}

func (s *session) remMemReg(d vhostmsg.Region) error {
	for i, r := range s.mem.regions {
		if r.Guest != d.Guest || r.Size != d.Size || r.User != d.User {
			continue
		}
		resume, err := s.pause()
		if err != nil {
			return err
		}
		list := append(append([]*region(nil), s.mem.regions[:i]...), s.mem.regions[i+1:]...)
		if err := s.mem.replace(list); err != nil {
			return err
		}
		if len(list) == 0 {
			s.mem.mem = nil
		}
		r.unmap()
		return resume()
	}
	return bad("no memory region %#x+%#x", d.Guest, d.Size)
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
		case <-r.done:
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

// notifier sends configuration changes to the front-end (virtio.ConfigNotifier).
type notifier struct {
	mu sync.Mutex
	fd int // -1: the front-end does not want to know
}

func (n *notifier) set(fd int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fd >= 0 {
		unix.Close(n.fd)
	}
	n.fd = fd
}

// ConfigChanged implements virtio.ConfigNotifier. A front-end that does not
// read its messages misses some.
func (n *notifier) ConfigChanged() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fd >= 0 {
		m := vhostmsg.Message{Type: vhostmsg.BackendConfigChange}
		unix.SendmsgN(n.fd, m.Bytes(), nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	}
}
