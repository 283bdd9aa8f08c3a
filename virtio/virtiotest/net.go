package virtiotest

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/moovm/moovm/virtio"
)

// Feature bits of a network device (section 5.1.3).
const (
	netCsum          uint64 = 1 << 0
	netGuestCsum     uint64 = 1 << 1
	netMTU           uint64 = 1 << 3
	netMAC           uint64 = 1 << 5
	netGuestTSO      uint64 = 1<<7 | 1<<8
	netHostTSO       uint64 = 1<<11 | 1<<12
	netMrgRxBuf      uint64 = 1 << 15
	netStatus        uint64 = 1 << 16
	netCtrlVQ        uint64 = 1 << 17
	netGuestAnnounce uint64 = 1 << 21
	netMQ            uint64 = 1 << 22
	netCtrlMACAddr   uint64 = 1 << 23

	// NetFeatures are the features of a network device Net can work with.
	NetFeatures = RingFeatures | netCsum | netGuestCsum | netMTU | netMAC | netGuestTSO | netHostTSO |
		netMrgRxBuf | netStatus | netCtrlVQ | netGuestAnnounce | netMQ | netCtrlMACAddr
)

// NetHeader is the length of virtio_net_hdr.
const NetHeader = 12

// Cable is the other end of a network device's link. A packet is a
// virtio_net_hdr with a frame behind it.
type Cable interface {
	// Inject sends a packet to the device. Packets that are injected before
	// the guest offers buffers wait for them.
	Inject(packet []byte)
	// Sent returns the next packet that the device has sent.
	Sent() (packet []byte, ok bool)
	// SetLink raises and cuts the link, which is up at first.
	SetLink(up bool)
}

// NetOpener makes a network device with a transport: two queue pairs, an MTU
// of 1500, and all of NetFeatures.
type NetOpener func(t *testing.T, g *Guest) (Transport, Cable)

// Net is a Driver that speaks to a network device.
type Net struct {
	*Driver
	bufs map[uint16][]byte // receive buffers by head, of queue 0
}

// NewNet adds to a running driver what it takes to speak to a network device.
func NewNet(d *Driver) *Net { return &Net{Driver: d, bufs: map[uint16][]byte{}} }

// ControlQueue is the index of the control queue.
func (n *Net) ControlQueue() int {
	if n.Features&netMQ != 0 {
		return len(n.Rings) - 1
	}
	return 2
}

// Post offers receive buffers of the given sizes on queue 0.
func (n *Net) Post(sizes ...int) {
	n.t.Helper()
	for _, size := range sizes {
		addr, b := n.Guest.Alloc(uint64(size), 8)
		for i := range b {
			b[i] = 0xee
		}
		head, err := n.Rings[0].Add(Buf{Addr: addr, Len: uint32(size), Write: true})
		if err != nil {
			n.t.Fatal(err)
		}
		n.bufs[head] = b
	}
	n.Kick(0)
}

// Receive waits for a packet on queue 0 and returns it with the lengths of the
// used elements.
func (n *Net) Receive() (packet []byte, used []int) {
	n.t.Helper()
	for count := 1; len(used) < count; {
		head, m := n.Wait(0)
		b := n.bufs[head]
		if int(m) > len(b) {
			n.t.Fatalf("used length %d of a buffer of %d", m, len(b))
		}
		if len(used) == 0 && m >= NetHeader {
			count = int(binary.LittleEndian.Uint16(b[10:]))
			// What belongs to one packet is there at once.
			if have := int(n.Rings[0].UsedIdx()-n.Rings[0].seen) + 1; have < count {
				n.t.Fatalf("a packet in %d buffers, of which %d are used", count, have)
			}
		}
		packet = append(packet, b[:m]...)
		used = append(used, int(m))
	}
	return packet, used
}

// Transmit sends a packet on a queue, in buffers of the given lengths and a
// last one with the rest, and waits until it has come back.
func (n *Net) Transmit(queue int, packet []byte, cuts ...int) {
	n.t.Helper()
	addr, b := n.Guest.Alloc(uint64(len(packet)), 8)
	copy(b, packet)
	var bufs []Buf
	for _, c := range append(cuts, 1<<30) {
		if c = min(c, len(b)); c > 0 {
			bufs = append(bufs, Buf{Addr: addr, Len: uint32(c)})
			addr, b = addr+uint64(c), b[c:]
		}
	}
	if used := n.Do(queue, bufs...); used != 0 {
		n.t.Fatalf("used length %d of a transmitted packet", used)
	}
}

// Control sends a command and returns its answer.
func (n *Net) Control(class, cmd byte, data ...byte) (ack byte) {
	n.t.Helper()
	addr, b := n.Guest.Alloc(uint64(3+len(data)), 8)
	b[0], b[1] = class, cmd
	copy(b[2:], data)
	last := 2 + len(data)
	b[last] = 0xff
	n.Do(n.ControlQueue(), Buf{Addr: addr, Len: uint32(last)}, Buf{Addr: addr + uint64(last), Len: 1, Write: true})
	return b[last]
}

// Packet is a virtio_net_hdr of zeros with a frame of n bytes behind it, whose
// type is one for experiments and whose data depend on seed.
func Packet(n int, seed byte) []byte {
	p := make([]byte, NetHeader+n)
	f := p[NetHeader:]
	for i := range f {
		f[i] = byte(i)*3 + seed
	}
	f[0] &^= 1
	copy(f[12:], "\x88\xb5")
	return p
}

// TCPPacket is a TCP/IPv4 packet with n bytes of data that leaves its checksum
// to the device, and with size > 0 also its segmentation.
func TCPPacket(n, size int) []byte {
	p := Packet(54+n, 7)
	h, f := p, p[NetHeader:]
	be, le := binary.BigEndian, binary.LittleEndian
	h[0] = 1 // NEEDS_CSUM
	le.PutUint16(h[6:], 34)
	le.PutUint16(h[8:], 16)
	if size > 0 {
		h[1] = 1 // GSO_TCPV4
		le.PutUint16(h[2:], 54)
		le.PutUint16(h[4:], uint16(size))
	}
	be.PutUint16(f[12:], 0x0800)
	ip := f[14:]
	copy(ip, []byte{0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2})
	be.PutUint16(ip[2:], uint16(40+n))
	be.PutUint16(ip[10:], ^netSum(ip[:20], 0))
	tcp := ip[20:]
	copy(tcp, []byte{0x1f, 0x90, 0x04, 0xd2, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0})
	be.PutUint16(tcp[16:], netSum(ip[12:20], uint64(6+20+n)))
	return p
}

// netSum is the ones' complement sum of b and s, not complemented.
func netSum(b []byte, s uint64) uint16 {
	for i, c := range b {
		s += uint64(c) << (8 * uint(1-i&1))
	}
	for s>>16 != 0 {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// validTCP reports whether both checksums of a TCP/IPv4 frame are right.
func validTCP(f []byte) bool {
	ip := f[14:34]
	return netSum(ip, 0) == 0xffff && netSum(append(bytes.Clone(ip[12:20]), f[34:]...), uint64(6+len(f)-34)) == 0xffff
}

// netEnv is a running device with its cable.
type netEnv struct {
	*Net
	cable Cable
}

// sent waits for a packet on the link.
func (n *netEnv) sent(t *testing.T) (p []byte) {
	t.Helper()
	Eventually(t, "a packet on the link", func() (ok bool) {
		p, ok = n.cable.Sent()
		return ok
	})
	return p
}

// silent says that nothing was sent, by sending something behind it.
func (n *netEnv) silent(t *testing.T, what string) {
	t.Helper()
	probe := Packet(64, 99)
	n.Transmit(1, probe)
	if p := n.sent(t); !bytes.Equal(p, probe) {
		t.Errorf("%s was sent", what)
	}
}

// runNet is what a part of the suite runs its subtests with.
type runNet func(name string, want uint64, f func(t *testing.T, n *netEnv))

const netPlain = RingFeatures | netCtrlVQ | netMAC | netStatus | netMTU

// NetConformance runs what the specification (virtio 1.2) says about network
// devices; each subtest is named by the section it comes from.
func NetConformance(t *testing.T, open NetOpener) {
	run := func(name string, want uint64, f func(t *testing.T, n *netEnv)) {
		t.Run(name, func(t *testing.T) {
			g := NewGuest(8 << 20)
			tr, cable := open(t, g)
			f(t, &netEnv{NewNet(Start(t, tr, g, want, 64)), cable})
		})
	}
	netConfig(run)
	netTransmit(run)
	netReceive(run)
	netOffloads(run)
	netControl(run)
}

func netConfig(run runNet) {
	run("5.1.4 device ID and configuration", NetFeatures, func(t *testing.T, n *netEnv) {
		if n.DeviceID() != 1 {
			t.Errorf("device ID %d", n.DeviceID())
		}
		if f := Offered(n) & NetFeatures; f != NetFeatures&^(RingFeatures&^Offered(n)) {
			t.Errorf("features %#x", f)
		}
		mac := configUint(n, 0, 6)
		if mac == 0 || mac&1 != 0 {
			t.Errorf("MAC %#x", mac)
		}
		if v := configUint(n, 6, 2); v != 1 {
			t.Errorf("status %#x", v)
		}
		if v := configUint(n, 8, 2); v != 2 || len(n.Rings) != 5 {
			t.Errorf("max_virtqueue_pairs %d, %d queues", v, len(n.Rings))
		}
		if v := configUint(n, 10, 2); v != 1500 {
			t.Errorf("mtu %d", v)
		}
		n.WriteConfig(0, []byte{2, 2, 2, 2})
		if configUint(n, 0, 6) != mac {
			t.Error("the MAC can be written")
		}
	})
	run("5.1.3.1 features that need others are refused without", NetFeatures, func(t *testing.T, n *netEnv) {
		for _, f := range []uint64{1 << 7, 1 << 8, 1 << 11, 1 << 12, netGuestAnnounce, netMQ, netCtrlMACAddr} {
			n.SetStatus(0)
			Eventually(t, "status 0", func() bool { return n.Status() == 0 })
			n.SetStatus(statusInit)
			f |= virtio.FeatureVersion1 | Offered(n)&virtio.FeatureAccessPlatform
			n.SetDriverFeatures(0, uint32(f))
			n.SetDriverFeatures(1, uint32(f>>32))
			n.SetStatus(statusFeat)
			if n.Status()&virtio.StatusFeaturesOK != 0 {
				t.Errorf("features %#x are accepted", f)
			}
		}
	})
	run("5.1.4 the link's state changes with a configuration interrupt and generation", NetFeatures, func(t *testing.T, n *netEnv) {
		for i := range 4 {
			before, gen := n.ConfigInterrupts(), n.Generation()
			n.cable.SetLink(i%2 == 1)
			Eventually(t, "a configuration interrupt", func() bool { return n.ConfigInterrupts() > before })
			if v := configUint(n, 6, 2); v != uint64(i%2) || n.Generation() == gen {
				t.Errorf("status %#x, generation %d after %d", v, n.Generation(), gen)
			}
		}
	})
}

func netTransmit(run runNet) {
	run("5.1.6.2 packets are sent on every queue", NetFeatures, func(t *testing.T, n *netEnv) {
		for i, size := range []int{14, 60, 1514} {
			for _, queue := range []int{1, 3} {
				p := Packet(size, byte(i))
				n.Transmit(queue, p)
				if got := n.sent(t); !bytes.Equal(got, p) {
					t.Errorf("queue %d: sent %x, want %x", queue, got, p)
				}
			}
		}
	})
	run("2.7.4 no framing assumptions of transmitted packets", NetFeatures, func(t *testing.T, n *netEnv) {
		p := Packet(300, 1)
		for _, cuts := range [][]int{{12}, {1}, {5, 3, 20}, {11, 2}, {100, 100}, {12, 14, 1}} {
			n.Transmit(1, p, cuts...)
			if got := n.sent(t); !bytes.Equal(got, p) {
				t.Errorf("cut %v: sent %x", cuts, got)
			}
		}
	})
	run("5.1.6.2 a packet that is too short or too long is dropped, not truncated", NetFeatures, func(t *testing.T, n *netEnv) {
		for _, size := range []int{1, 11, 12, 25, 12 + 1515, 12 + 9000, 12 + 65554, 200000} {
			n.Transmit(1, make([]byte, size))
			n.silent(t, "a packet of the wrong size")
		}
	})
	run("5.1.6.2 a header that the frame does not bear out is dropped", NetFeatures, func(t *testing.T, n *netEnv) {
		le := binary.LittleEndian
		for name, spoil := range map[string]func(p []byte){
			"csum_start beyond the frame":  func(p []byte) { le.PutUint16(p[6:], 5000) },
			"csum_start in Ethernet":       func(p []byte) { le.PutUint16(p[6:], 4) },
			"csum_offset beyond the frame": func(p []byte) { le.PutUint16(p[8:], 0xffff) },
			"csum_offset elsewhere":        func(p []byte) { le.PutUint16(p[8:], 6) },
			"csum_start elsewhere":         func(p []byte) { le.PutUint16(p[6:], 36) },
			"gso_size 0":                   func(p []byte) { le.PutUint16(p[4:], 0) },
			"gso_size above the MTU":       func(p []byte) { le.PutUint16(p[4:], 1461) },
			"unknown gso_type":             func(p []byte) { p[1] = 77 },
			"the other gso_type":           func(p []byte) { p[1] = 4 },
			"ECN, which was not offered":   func(p []byte) { p[1] |= 0x80 },
			"no NEEDS_CSUM":                func(p []byte) { p[0] = 0 },
			"UDP":                          func(p []byte) { p[12+23] = 17 },
			"a fragment":                   func(p []byte) { p[12+20] = 0x20 },
			"TCP header too long":          func(p []byte) { copy(p[12:], TCPPacket(0, 0)[12:]); p[12+46] = 0xf0 },
			"IP header too long":           func(p []byte) { p[12+14] = 0x4f },
			"no IP":                        func(p []byte) { p[12+12] = 0x77 },
		} {
			p := TCPPacket(3000, 1000)
			if name == "TCP header too long" {
				p = p[:12+54]
			}
			spoil(p)
			n.Transmit(1, p)
			n.silent(t, name)
		}
	})
	run("5.1.6.2 hdr_len is not trusted and meaningless fields are 0", NetFeatures, func(t *testing.T, n *netEnv) {
		le := binary.LittleEndian
		p := TCPPacket(3000, 1000)
		want := bytes.Clone(p)
		p[0] |= 6
		le.PutUint16(p[2:], 0xffff)
		le.PutUint16(p[10:], 0xffff)
		n.Transmit(1, p)
		if got := n.sent(t); !bytes.Equal(got, want) {
			t.Errorf("header %x, want %x", got[:12], want[:12])
		}
		p = Packet(100, 1)
		want = bytes.Clone(p)
		copy(p[2:12], bytes.Repeat([]byte{0xff}, 10))
		n.Transmit(1, p)
		if got := n.sent(t); !bytes.Equal(got, want) {
			t.Errorf("header %x, want zeros", got[:12])
		}
	})
	run("5.1.6.2 offloads that were not negotiated are dropped", netPlain, func(t *testing.T, n *netEnv) {
		n.Transmit(1, TCPPacket(100, 0))
		n.silent(t, "a packet without its checksum")
		n.Transmit(1, TCPPacket(3000, 1000))
		n.silent(t, "a packet to be segmented")
	})
	run("5.1.6.2 nothing is sent while the link is down", NetFeatures, func(t *testing.T, n *netEnv) {
		n.cable.SetLink(false)
		n.Transmit(1, Packet(100, 1))
		n.cable.SetLink(true)
		n.silent(t, "a packet")
	})
}

func netReceive(run runNet) {
	run("5.1.6.4 a packet fills one buffer; num_buffers is 1 without MRG_RXBUF", netPlain, func(t *testing.T, n *netEnv) {
		n.Post(1526, 1526)
		for _, size := range []int{14, 1514} {
			p := Packet(size, 3)
			n.cable.Inject(p)
			p[10] = 1
			if got, used := n.Receive(); !bytes.Equal(got, p) || len(used) != 1 {
				t.Errorf("received %x in %v, want %x", got, used, p)
			}
		}
	})
	run("5.1.6.4 packets wait for buffers", NetFeatures, func(t *testing.T, n *netEnv) {
		for i := range 10 {
			n.cable.Inject(Packet(100, byte(i)))
		}
		for i := range 10 {
			n.Post(200)
			if got, _ := n.Receive(); !bytes.Equal(got[12:], Packet(100, byte(i))[12:]) {
				t.Errorf("packet %d is %x", i, got)
			}
		}
	})
	run("5.1.6.4.1 with MRG_RXBUF a packet fills all its buffers but the last", NetFeatures, func(t *testing.T, n *netEnv) {
		n.Post(100, 50, 200, 12, 2000)
		p := Packet(1000, 5)
		n.cable.Inject(p)
		p[10] = 5
		got, used := n.Receive()
		if !bytes.Equal(got, p) {
			t.Errorf("received %x", got)
		}
		if want := []int{100, 50, 200, 12, 650}; len(used) != 5 || used[0] != 100 || used[4] != 650 {
			t.Errorf("used lengths %v, want %v", used, want)
		}
	})
	run("5.1.6.4.1 more buffers are waited for", NetFeatures, func(t *testing.T, n *netEnv) {
		p := Packet(64, 6)
		p[10] = 2
		for range 3 {
			n.cable.Inject(p)
			n.Post(40, 40)
			if got, used := n.Receive(); !bytes.Equal(got, p) || len(used) != 2 {
				t.Errorf("received %x in %v", got, used)
			}
		}
	})
	run("5.1.6.4 a packet that does not fit is dropped, not truncated", netPlain, func(t *testing.T, n *netEnv) {
		n.Post(111)
		n.cable.Inject(Packet(100, 1))
		n.cable.Inject(Packet(99, 2))
		if got, _ := n.Receive(); !bytes.Equal(got[12:], Packet(99, 2)[12:]) {
			t.Errorf("received %x", got)
		}
	})
	run("5.1.6.4 a packet that does not fit into all buffers there are is dropped", NetFeatures, func(t *testing.T, n *netEnv) {
		n.Post(50, 50)
		n.cable.Inject(Packet(1000, 1))
		n.cable.Inject(Packet(60, 2))
		if got, _ := n.Receive(); !bytes.Equal(got[12:], Packet(60, 2)[12:]) {
			t.Errorf("received %x", got)
		}
	})
	run("5.1.6.3 a buffer without room for the header comes back with length 0", NetFeatures, func(t *testing.T, n *netEnv) {
		n.Post(11)
		if _, used := n.Wait(0); used != 0 {
			t.Errorf("used length %d", used)
		}
		n.Post(200)
		n.cable.Inject(Packet(100, 1))
		if got, _ := n.Receive(); len(got) != 112 {
			t.Errorf("received %x", got)
		}
	})
	run("5.1.6.4 nothing is received while the link is down", NetFeatures, func(t *testing.T, n *netEnv) {
		n.Post(200)
		n.cable.SetLink(false)
		n.cable.Inject(Packet(100, 1))
		n.cable.SetLink(true)
		n.cable.Inject(Packet(100, 2))
		if got, _ := n.Receive(); !bytes.Equal(got[12:], Packet(100, 2)[12:]) {
			t.Errorf("received %x", got)
		}
	})
	run("2.6.1 a receive queue is reset and loses no packet", NetFeatures, func(t *testing.T, n *netEnv) {
		if n.Features&virtio.FeatureRingReset == 0 {
			t.Skip("the device does not offer RING_RESET")
		}
		n.Post(200, 200, 200)
		n.ResetQueue(0)
		Eventually(t, "the end of the queue reset", func() bool { return !n.QueueResetting(0) })
		n.cable.Inject(Packet(100, 1))
		n.Rings[0].Reset()
		r := n.Rings[0]
		n.SetQueue(0, r.Size, r.Desc, r.Driver, r.Device)
		n.EnableQueue(0)
		n.Post(200)
		if got, _ := n.Receive(); !bytes.Equal(got[12:], Packet(100, 1)[12:]) {
			t.Errorf("received %x", got)
		}
	})
}

func netOffloads(run runNet) {
	run("5.1.6.4.1 GUEST_CSUM and GUEST_TSO4: packets come as they are", NetFeatures, func(t *testing.T, n *netEnv) {
		for _, p := range [][]byte{TCPPacket(100, 0), TCPPacket(3000, 1000)} {
			n.Post(4000)
			n.cable.Inject(p)
			p[10] = 1
			if got, _ := n.Receive(); !bytes.Equal(got, p) {
				t.Errorf("received %x, want %x", got, p)
			}
		}
	})
	run("5.1.6.4.1 without GUEST_CSUM checksums are complete", netPlain, func(t *testing.T, n *netEnv) {
		for _, size := range []int{0, 1, 100, 101} {
			n.Post(1526)
			p := TCPPacket(size, 0)
			n.cable.Inject(p)
			got, _ := n.Receive()
			if len(got) != len(p) || got[0] != 0 || !validTCP(got[12:]) || !bytes.Equal(got[12+54:], p[12+54:]) {
				t.Errorf("received %x", got)
			}
		}
	})
	run("5.1.6.4.1 without GUEST_TSO4 packets are segmented", netPlain|netGuestCsum, func(t *testing.T, n *netEnv) {
		n.Post(1526, 1526, 1526, 1526)
		p := TCPPacket(3300, 1000)
		n.cable.Inject(p)
		var data []byte
		for i, want := range []int{1000, 1000, 1000, 300} {
			got, _ := n.Receive()
			f := got[12:]
			if len(f) != 54+want || got[0] != 0 || got[1] != 0 || !validTCP(f) {
				t.Fatalf("segment %d: %x", i, got)
			}
			be := binary.BigEndian
			if seq := be.Uint32(f[38:]); seq != uint32(1+1000*i) {
				t.Errorf("segment %d: sequence number %d", i, seq)
			}
			if l := int(be.Uint16(f[16:])); l != 40+want {
				t.Errorf("segment %d: length %d", i, l)
			}
			if push := f[47]&8 != 0; push != (i == 3) {
				t.Errorf("segment %d: PSH %v", i, push)
			}
			data = append(data, f[54:]...)
		}
		if !bytes.Equal(data, p[12+54:]) {
			t.Error("the data changed")
		}
	})
}

func netControl(run runNet) {
	run("5.1.6.5 unknown and malformed commands get an error", NetFeatures, func(t *testing.T, n *netEnv) {
		for _, c := range [][]byte{{9, 9}, {0, 0, 1}, {1, 0, 0, 0, 0, 0}, {1, 1}, {1, 1, 2, 2, 2, 2, 2}, {1, 1, 1, 2, 2, 2, 2, 2},
			{1, 1, 0, 0, 0, 0, 0, 0}, {1, 1, 2, 2, 2, 2, 2, 2, 2}, {4, 0}, {4, 0, 0, 0}, {4, 0, 3, 0}, {4, 0, 0xff, 0xff}, {4, 1, 1, 0}, {5, 0, 0}} {
			if ack := n.Control(c[0], c[1], c[2:]...); ack != 1 {
				t.Errorf("command %x: answer %d", c, ack)
			}
		}
	})
	run("5.1.6.5.2 the MAC address is set whole", NetFeatures, func(t *testing.T, n *netEnv) {
		if ack := n.Control(1, 1, 2, 3, 4, 5, 6, 7); ack != 0 {
			t.Fatalf("answer %d", ack)
		}
		if v := configUint(n, 0, 6); v != 0x070605040302 {
			t.Errorf("MAC %#x", v)
		}
	})
	run("5.1.6.5.5 packets come on the queue that their flow was sent on", NetFeatures, func(t *testing.T, n *netEnv) {
		if ack := n.Control(4, 0, 2, 0); ack != 0 {
			t.Fatalf("answer %d", ack)
		}
		p := TCPPacket(100, 0)
		n.Transmit(3, p)
		n.sent(t)
		addr, _ := n.Guest.Alloc(200, 8)
		head, err := n.Rings[2].Add(Buf{Addr: addr, Len: 200, Write: true})
		if err != nil {
			t.Fatal(err)
		}
		n.Kick(2)
		n.cable.Inject(p)
		if got, used := n.Wait(2); got != head || used != uint32(len(p)) {
			t.Errorf("head %d, length %d", got, used)
		}
		if ack := n.Control(4, 0, 1, 0); ack != 0 {
			t.Fatalf("answer %d", ack)
		}
		n.Post(200)
		n.cable.Inject(p)
		n.Receive()
	})
	run("5.1.2 without MQ the control queue is queue 2", NetFeatures&^netMQ, func(t *testing.T, n *netEnv) {
		if ack := n.Control(1, 1, 2, 3, 4, 5, 6, 7); ack != 0 {
			t.Errorf("answer %d", ack)
		}
		if ack := n.Control(4, 0, 2, 0); ack != 1 {
			t.Errorf("answer %d to a command that was not negotiated", ack)
		}
	})
	run("2.4.1 reset forgets what the control queue has set", NetFeatures, func(t *testing.T, n *netEnv) {
		mac := configUint(n, 0, 6)
		n.Control(1, 1, 2, 3, 4, 5, 6, 7)
		n.SetStatus(0)
		Eventually(t, "status 0", func() bool { return n.Status() == 0 })
		if v := configUint(n, 0, 6); v != mac {
			t.Errorf("MAC %#x, at first %#x", v, mac)
		}
	})
}
