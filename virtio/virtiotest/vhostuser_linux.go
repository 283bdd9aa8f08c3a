package virtiotest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/internal/vhostmsg"
)

// SharedMemory is a memory file that a guest's memory and a back-end share.
type SharedMemory struct {
	FD    int
	Bytes []byte
}

// NewSharedMemory makes size bytes, rounded up to pages.
func NewSharedMemory(size int) (*SharedMemory, error) {
	size = (size + 0xfff) &^ 0xfff
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		unix.Close(fd)
		return nil, err
	}
	b, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &SharedMemory{fd, b}, nil
}

// Close unmaps the memory and closes the file.
func (m *SharedMemory) Close() error {
	return errors.Join(unix.Munmap(m.Bytes), unix.Close(m.FD))
}

// vhostUser is where the front-end has its guest's memory, so that its
// addresses are not mistaken for guest-physical ones.
const vhostUserBase = 0x7000_0000_0000

// VhostUser is a vhost-user front-end with a driver on top: it keeps the status
// register itself and sets the back-end up at DRIVER_OK.
type VhostUser struct {
	Conn     *vhostmsg.Conn
	Mem      *SharedMemory
	Offered  uint64
	Protocol uint64
	Rings    int
	// Inflight is the in-flight region, shared with the back-end; its
	// descriptor survives a reconnection.
	InflightFD   int
	inflightSize uint64

	t        T
	status   uint8
	features uint64
	queues   []vhostQueue
	running  bool
	config   atomic.Uint64
}

type vhostQueue struct {
	size                 uint16
	desc, driver, device uint64
	enabled              bool
	kick, call           *virtio.Event
	done                 chan struct{}
	irqs                 atomic.Uint64
	base                 uint16
}

// frontProtocol are the protocol features this front-end uses.
const frontProtocol = vhostmsg.ProtoMQ | vhostmsg.ProtoReplyAck | vhostmsg.ProtoConfig | vhostmsg.ProtoInflight |
	vhostmsg.ProtoResetDevice | vhostmsg.ProtoMemSlots

// MaxVhostQueue is the queue size NewVhostUser's QueueMax reports: the protocol
// does not tell.
const MaxVhostQueue = 128

// NewVhostUser speaks to the back-end at the other end of c. g's memory is
// all of mem. Close it when done; mem stays the caller's.
func NewVhostUser(t T, c *net.UnixConn, mem *SharedMemory) *VhostUser {
	t.Helper()
	v := &VhostUser{Conn: &vhostmsg.Conn{C: c}, Mem: mem, t: t, InflightFD: -1}
	v.handshake()
	v.queues = make([]vhostQueue, v.Rings)
	return v
}

func (v *VhostUser) handshake() {
	v.t.Helper()
	v.Offered = v.number(vhostmsg.GetFeatures)
	v.Protocol = v.number(vhostmsg.GetProtocolFeatures) & frontProtocol
	v.must(vhostmsg.SetProtocolFeatures, u64(v.Protocol))
	v.Rings = 1
	if v.Protocol&vhostmsg.ProtoMQ != 0 {
		v.Rings = int(v.number(vhostmsg.GetQueueNum))
	}
	v.must(vhostmsg.SetOwner, nil)
}

// Reconnect continues on a new connection to a new back-end, after the old one
// has died: it sets up again what was running.
func (v *VhostUser) Reconnect(c *net.UnixConn) {
	v.t.Helper()
	v.Conn.C.Close()
	v.Conn = &vhostmsg.Conn{C: c}
	v.handshake()
	if v.running {
		v.running = false
		for i := range v.queues { // what QEMU does: go on from the used index
			q := &v.queues[i]
			if !q.enabled {
				continue
			}
			off := q.device - GuestBase + 2
			q.base = binary.LittleEndian.Uint16(v.Mem.Bytes[off:])
		}
		v.start()
	}
}

func u64(x uint64) []byte { return binary.LittleEndian.AppendUint64(nil, x) }

// Send sends a message without waiting for anything.
func (v *VhostUser) Send(m *vhostmsg.Message) error { return v.Conn.Write(m) }

// Call sends a request and returns the reply's payload; with a descriptor, if
// one comes.
func (v *VhostUser) Call(typ vhostmsg.Type, p []byte, fds ...int) (reply []byte, fd int, err error) {
	m := vhostmsg.Message{Type: typ, Payload: p, FDs: fds}
	if err := v.Conn.Write(&m); err != nil {
		return nil, -1, err
	}
	return v.reply(typ)
}

func (v *VhostUser) reply(typ vhostmsg.Type) (p []byte, fd int, err error) {
	var r vhostmsg.Message
	if err := v.Conn.Read(&r); err != nil {
		return nil, -1, fmt.Errorf("reply to %v: %w", typ, err)
	}
	if r.Type != typ || !r.Reply {
		return nil, -1, fmt.Errorf("reply to %v is %v", typ, r.Type)
	}
	fd = -1
	if len(r.FDs) > 0 {
		fd = r.FDs[0]
	}
	return r.Payload, fd, nil
}

func (v *VhostUser) number(typ vhostmsg.Type) uint64 {
	v.t.Helper()
	p, _, err := v.Call(typ, nil)
	if err != nil || len(p) != 8 {
		v.t.Fatalf("%v: %x, %v", typ, p, err)
	}
	return binary.LittleEndian.Uint64(p)
}

// Ack sends a request and waits until the back-end has done it.
func (v *VhostUser) Ack(typ vhostmsg.Type, p []byte, fds ...int) error {
	m := vhostmsg.Message{Type: typ, Payload: p, FDs: fds, NeedReply: v.Protocol&vhostmsg.ProtoReplyAck != 0}
	if err := v.Conn.Write(&m); err != nil || !m.NeedReply {
		return err
	}
	r, _, err := v.reply(typ)
	switch {
	case err != nil:
		return err
	case len(r) != 8 || binary.LittleEndian.Uint64(r) != 0:
		return fmt.Errorf("%v failed: %x", typ, r)
	}
	return nil
}

func (v *VhostUser) must(typ vhostmsg.Type, p []byte, fds ...int) {
	v.t.Helper()
	var err error
	if typ == vhostmsg.SetProtocolFeatures || typ == vhostmsg.SetOwner {
		err = v.Send(&vhostmsg.Message{Type: typ, Payload: p})
	} else {
		err = v.Ack(typ, p, fds...)
	}
	if err != nil {
		v.t.Fatalf("%v: %v", typ, err)
	}
}

func pair(a, b uint32) []byte {
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, a), b)
}

// MemTable is the payload that describes all of Mem as one region.
func (v *VhostUser) MemTable() []byte {
	return vhostmsg.Region{Guest: GuestBase, Size: uint64(len(v.Mem.Bytes)), User: vhostUserBase}.Append(pair(1, 0))
}

// start sets the back-end up and starts the enabled queues.
func (v *VhostUser) start() {
	v.t.Helper()
	if v.Protocol&vhostmsg.ProtoInflight != 0 {
		size := uint16(1)
		for i := range v.queues {
			size = max(size, v.queues[i].size)
		}
		p := binary.LittleEndian.AppendUint16(make([]byte, 16), uint16(v.Rings))
		p = append(binary.LittleEndian.AppendUint16(p, size), 0, 0, 0, 0)
		if v.InflightFD < 0 {
			r, fd, err := v.Call(vhostmsg.GetInflightFD, p)
			if err != nil || fd < 0 || len(r) < 20 {
				v.t.Fatalf("GET_INFLIGHT_FD: %x, %v", r, err)
			}
			v.InflightFD, v.inflightSize = fd, binary.LittleEndian.Uint64(r)
		}
		binary.LittleEndian.PutUint64(p, v.inflightSize)
		v.must(vhostmsg.SetInflightFD, p, v.InflightFD)
	}
	v.must(vhostmsg.SetFeatures, u64(v.features|v.Offered&vhostmsg.FeatureProtocol))
	v.must(vhostmsg.SetMemTable, v.MemTable(), v.Mem.FD)
	for i := range v.queues {
		q := &v.queues[i]
		if !q.enabled {
			continue
		}
		n := uint32(i)
		v.must(vhostmsg.SetVringNum, pair(n, uint32(q.size)))
		v.must(vhostmsg.SetVringBase, pair(n, uint32(q.base)))
		a := pair(n, 0)
		for _, addr := range []uint64{q.desc, q.device, q.driver, 0} {
			a = append(a, u64(addr-GuestBase+vhostUserBase)...)
		}
		v.must(vhostmsg.SetVringAddr, a)
		if q.call == nil {
			q.listen(v.t)
		}
		v.must(vhostmsg.SetVringCall, u64(uint64(i)), q.call.FD())
		v.must(vhostmsg.SetVringKick, u64(uint64(i)), q.kick.FD())
		v.must(vhostmsg.SetVringEnable, pair(n, 1))
	}
	v.running = true
}

// listen makes the events of a queue and counts its interrupts.
func (q *vhostQueue) listen(t T) {
	var err error
	if q.kick, err = virtio.NewEvent(); err != nil {
		t.Fatal(err)
	}
	if q.call, err = virtio.NewEvent(); err != nil {
		t.Fatal(err)
	}
	q.done = make(chan struct{})
	go func() {
		defer close(q.done)
		for q.call.Wait() == nil {
			q.irqs.Add(1)
		}
	}()
}

// Stop stops the running queues and waits until the back-end has drained them.
func (v *VhostUser) Stop() {
	v.t.Helper()
	if !v.running {
		return
	}
	v.running = false
	for i := range v.queues {
		if !v.queues[i].enabled {
			continue
		}
		p, _, err := v.Call(vhostmsg.GetVringBase, pair(uint32(i), 0))
		if err != nil || len(p) != 8 {
			v.t.Fatalf("GET_VRING_BASE: %x, %v", p, err)
		}
		v.queues[i].base = uint16(binary.LittleEndian.Uint32(p[4:]))
	}
}

// Close hangs up.
func (v *VhostUser) Close() {
	v.Conn.C.Close()
	for i := range v.queues {
		q := &v.queues[i]
		if q.call != nil {
			q.call.Close()
			<-q.done
			q.kick.Close()
			q.call = nil
		}
	}
	if v.InflightFD >= 0 {
		unix.Close(v.InflightFD)
		v.InflightFD = -1
	}
}

// Bases are the available indices at which the queues stopped.
func (v *VhostUser) Bases() (b []uint16) {
	for i := range v.queues {
		b = append(b, v.queues[i].base)
	}
	return b
}

// DeviceID implements Transport; the protocol does not tell.
func (v *VhostUser) DeviceID() uint32 { return virtio.IDBlock }

// Status implements Transport.
func (v *VhostUser) Status() uint8 { return v.status }

// SetStatus implements Transport.
func (v *VhostUser) SetStatus(s uint8) {
	v.t.Helper()
	switch {
	case s == 0:
		v.Stop()
		if v.status&virtio.StatusDriverOK != 0 && v.Protocol&vhostmsg.ProtoResetDevice != 0 {
			v.must(vhostmsg.ResetDevice, nil)
		}
		v.status, v.features = 0, 0
		for i := range v.queues {
			v.queues[i].enabled, v.queues[i].base = false, 0
		}
		if v.InflightFD >= 0 {
			unix.Close(v.InflightFD)
			v.InflightFD = -1
		}
		return
	case s&^v.status&virtio.StatusDriverOK != 0:
		v.start()
	}
	v.status |= s
}

// DeviceFeatures implements Transport.
func (v *VhostUser) DeviceFeatures(sel uint32) uint32 {
	if sel > 1 {
		return 0
	}
	return uint32((v.Offered &^ vhostmsg.FeatureProtocol) >> (32 * sel))
}

// DriverFeatures implements Transport.
func (v *VhostUser) DriverFeatures(sel uint32) uint32 { return uint32(v.features >> (32 * sel)) }

// SetDriverFeatures implements Transport.
func (v *VhostUser) SetDriverFeatures(sel, f uint32) {
	v.features = v.features&^(0xffffffff<<(32*sel)) | uint64(f)<<(32*sel)
}

// Generation implements Transport; vhost-user has none.
func (v *VhostUser) Generation() uint32 { return 0 }

// ReadConfig implements Transport.
func (v *VhostUser) ReadConfig(off uint32, p []byte) {
	v.t.Helper()
	b := append(pair(off, uint32(len(p))), 0, 0, 0, 0)
	r, _, err := v.Call(vhostmsg.GetConfig, append(b, p...))
	if err != nil || len(r) != 12+len(p) {
		v.t.Fatalf("GET_CONFIG: %x, %v", r, err)
	}
	copy(p, r[12:])
}

// WriteConfig implements Transport.
func (v *VhostUser) WriteConfig(off uint32, p []byte) {
	v.t.Helper()
	b := append(pair(off, uint32(len(p))), 0, 0, 0, 0)
	v.must(vhostmsg.SetConfig, append(b, p...))
}

// QueueMax implements Transport.
func (v *VhostUser) QueueMax(i int) uint16 {
	if i >= v.Rings {
		return 0
	}
	return MaxVhostQueue
}

// SetQueue implements Transport.
func (v *VhostUser) SetQueue(i int, size uint16, desc, driver, device uint64) {
	q := &v.queues[i]
	q.size, q.desc, q.driver, q.device = size, desc, driver, device
}

// EnableQueue implements Transport.
func (v *VhostUser) EnableQueue(i int) { v.queues[i].enabled = true }

// QueueEnabled implements Transport.
func (v *VhostUser) QueueEnabled(i int) bool { return v.queues[i].enabled }

// ResetQueue implements Transport; there is no such thing.
func (v *VhostUser) ResetQueue(int) {}

// QueueResetting implements Transport.
func (v *VhostUser) QueueResetting(int) bool { return false }

// Notify implements Transport.
func (v *VhostUser) Notify(i int) { v.queues[i].kick.Signal() }

// QueueInterrupts implements Transport.
func (v *VhostUser) QueueInterrupts(i int) uint64 { return v.queues[i].irqs.Load() }

// ConfigInterrupts implements Transport.
func (v *VhostUser) ConfigInterrupts() uint64 { return v.config.Load() }
