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
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/internal/vhostmsg"
)

const protocolFeatures = vhostmsg.ProtoMQ | vhostmsg.ProtoReplyAck | vhostmsg.ProtoBackendReq | vhostmsg.ProtoConfig |
	vhostmsg.ProtoInflight | vhostmsg.ProtoResetDevice | vhostmsg.ProtoMemSlots

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

	kick, call, err *virtio.Event
	callMu          sync.RWMutex // call and err change while the ring runs

	run  *virtio.Queue
	done chan struct{}
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
		vhostmsg.GetInflightFD: 20, vhostmsg.SetInflightFD: 20,
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
		off, n := le.Uint32(p), le.Uint32(p[4:])
		if off > maxConfig || n > maxConfig-off || int(n) > len(p)-12 {
			return nil, bad("%d bytes at %d of the configuration space", n, off)
		}
		b := make([]byte, 12+n)
		copy(b, p[:12])
		s.dev.ReadConfig(off, b[12:])
		return &vhostmsg.Message{Payload: b}, nil
	case vhostmsg.SetConfig:
		off, n := le.Uint32(p), le.Uint32(p[4:])
		if off > maxConfig || n > maxConfig-off || int(n) > len(p)-12 {
			return nil, bad("%d bytes at %d of the configuration space", n, off)
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
		if v == 0 || v > uint32(r.cfg.MaxSize) || v&(v-1) != 0 {
			return nil, bad("size %d of ring %d is not a power of two up to %d", v, r.index, r.cfg.MaxSize)
		}
		r.cfg.Size = uint16(v)
	case vhostmsg.SetVringBase:
		if v > 0xffff {
			return nil, bad("base %d of ring %d", v, r.index)
		}
		r.cfg.AvailIndex, r.resumed = uint16(v), false
	case vhostmsg.GetVringBase:
		if err := s.stop(r); err != nil {
			return nil, err
		}
		r.started = false
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
			return nil, s.start(r)
		}
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
		r.kick, r.started = ev, true
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

// start runs a ring that is set up, kicked and enabled.
func (s *session) start(r *ring) error {
	if r.run != nil || !r.started || !r.enabled || !r.addressed || r.kick == nil || s.mem.mem == nil {
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
	err := virtio.CatchFault(func() error {
		var idx [2]byte
		if err := s.mem.mem.Read(cfg.Device+2, idx[:]); err != nil {
			return err
		}
		if !r.resumed {
			cfg.UsedIndex = binary.LittleEndian.Uint16(idx[:])
			r.resumed = true
			if s.inflight != nil && r.index < len(s.inflight.queues) {
				t, heads, avail, err := resume(s.inflight.queues[r.index], cfg.Size, cfg.UsedIndex)
				if err != nil {
					return err
				}
				cfg.Tracker, cfg.Resubmit = t, heads
				if len(heads) > 0 {
					// Where we were, rather than where the front-end
					// believes: it did not hear from us at the end.
					cfg.AvailIndex = avail
				}
			}
		}
		q, err := cfg.Activate(s.mem.mem, s.features, r.kick, r.interrupt)
		r.run = q
		return err
	})
	if err != nil {
		r.run = nil
		return bad("ring %d: %v", r.index, err)
	}
	if cfg.UsedIndex != 0 {
		// A server that was killed may have returned requests and not told
		// the driver any more.
		r.interrupt()
	}
	r.cfg = cfg
	r.cfg.Resubmit = nil
	if !s.active {
		if err := s.dev.Activate(s.features, &s.notifier); err != nil {
			r.run = nil
			return err
		}
		s.active = true
	}
	r.done = make(chan struct{})
	go func(q *virtio.Queue, done chan struct{}) {
		defer close(done)
		if err := virtio.CatchFault(func() error { return s.dev.ServeQueue(r.index, q) }); err != nil {
			s.o.Logger.Warn("vhost-user: ring stopped", "ring", r.index, "error", err)
			r.callMu.RLock()
			defer r.callMu.RUnlock()
			if r.err != nil {
				r.err.Signal() // nothing to be done about an error here
			}
		}
	}(r.run, r.done)
	return nil
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
	r.run = nil
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
		r.started, r.enabled, r.addressed, r.resumed = false, false, false, false
		r.cfg.AvailIndex, r.cfg.UsedIndex, r.cfg.Tracker = 0, 0, nil
	}
	s.deactivate()
	s.features = 0
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
