package usernet

import (
	"bytes"
	"net/netip"
	"sync"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/moovm/moovm/virtionet"
)

// sink keeps copies of what the guest gets.
type sink struct {
	mu     sync.Mutex
	frames [][]byte
	came   chan struct{}
}

func newSink() *sink { return &sink{came: make(chan struct{}, 1)} }

func (s *sink) SetLink(bool) {}
func (s *sink) Receive(p []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.frames) < 1000 {
		s.frames = append(s.frames, bytes.Clone(p))
	}
	select {
	case s.came <- struct{}{}:
	default:
	}
	return true
}

func (s *sink) take() [][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.frames
	s.frames = nil
	return f
}

func ethernetFrame(to, from [6]byte, typ uint16, payload []byte) []byte {
	b := make([]byte, headerSize, headerSize+ethSize+len(payload))
	b = append(b, to[:]...)
	b = append(b, from[:]...)
	b = be.AppendUint16(b, typ)
	return append(b, payload...)
}

var broadcast = [6]byte{255, 255, 255, 255, 255, 255}

func dhcpMessage(typ byte, flags uint16, options ...byte) []byte {
	m := make([]byte, dhcpFixed)
	m[0], m[1], m[2] = 1, 1, 6
	be.PutUint32(m[4:], 0x12345678)
	be.PutUint16(m[10:], flags)
	copy(m[28:], guestMAC[:])
	be.PutUint32(m[236:], dhcpCookie)
	m = append(m, 0, optType, 1, typ)
	m = append(m, options...)
	return append(m, 255)
}

func TestDHCP(t *testing.T) {
	n := newNetwork(t, nil, Config{MTU: 9000})
	s := newSink()
	if err := n.Attach(s); err != nil {
		t.Fatal(err)
	}
	all, zero := netip.MustParseAddr("255.255.255.255"), netip.MustParseAddr("0.0.0.0")
	send := func(m []byte) []byte {
		t.Helper()
		n.Send(ethernetFrame(broadcast, guestMAC, ethIPv4, datagram(zero, all, dhcpClient, dhcpServer, m)))
		f := s.take()
		switch {
		case len(f) == 0:
			return nil
		case len(f) > 1:
			t.Fatalf("%d answers", len(f))
		}
		ip := header.IPv4(f[0][headerSize+ethSize:])
		u := header.UDP(ip[ipSize:])
		sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), u.Length())
		if !ip.IsValid(len(ip)) || !ip.IsChecksumValid() || u.SourcePort() != 67 || u.DestinationPort() != 68 || u.CalculateChecksum(checksum.Checksum(u.Payload(), sum)) != 0xffff {
			t.Fatalf("%x", ip)
		}
		r := u.Payload()
		if r[0] != 2 || be.Uint32(r[4:]) != 0x12345678 || !bytes.Equal(r[28:34], guestMAC[:]) || len(r) < 300 {
			t.Fatalf("%x", r)
		}
		return r
	}
	guest := GuestAddr().As4()
	router := RouterAddr().As4()
	option := func(r []byte, code byte) []byte { return dhcpOption(r[dhcpFixed:], code) }
	for _, typ := range [][2]byte{{dhcpDiscover, dhcpOffer}, {dhcpRequest, dhcpAck}} {
		r := send(dhcpMessage(typ[0], 0, append([]byte{optAddress, 4}, guest[:]...)...))
		if r == nil || !bytes.Equal(r[16:20], guest[:]) || option(r, optType)[0] != typ[1] ||
			!bytes.Equal(option(r, optRouter), router[:]) || !bytes.Equal(option(r, optDNS), router[:]) || !bytes.Equal(option(r, optServer), router[:]) ||
			be.Uint16(option(r, optMTU)) != 9000 || !bytes.Equal(option(r, optMask), []byte{255, 255, 255, 0}) || be.Uint32(option(r, optLease)) != dhcpLease {
			t.Errorf("%x", r)
		}
	}
	if r := send(dhcpMessage(dhcpRequest, 0, optAddress, 4, 10, 0, 2, 16)); r == nil || option(r, optType)[0] != dhcpNak {
		t.Errorf("a request for another address: %x", r)
	}
	if r := send(dhcpMessage(dhcpInform, 0)); r == nil || option(r, optType)[0] != dhcpAck || option(r, optLease) != nil {
		t.Errorf("inform: %x", r)
	}
	for name, m := range map[string][]byte{
		"another server's": dhcpMessage(dhcpRequest, 0, optServer, 4, 1, 2, 3, 4),
		"release":          dhcpMessage(7, 0),
		"short":            dhcpMessage(dhcpDiscover, 0)[:dhcpFixed-1],
		"no type":          dhcpMessage(dhcpDiscover, 0)[:dhcpFixed],
		"cut off":          dhcpMessage(dhcpDiscover, 0)[:dhcpFixed+3],
		"a reply":          append([]byte{2}, dhcpMessage(dhcpDiscover, 0)[1:]...),
	} {
		if r := send(m); r != nil {
			t.Errorf("%s was answered: %x", name, r)
		}
	}
	n.Send(ethernetFrame(broadcast, guestMAC, ethIPv4, datagram(zero, all, dhcpClient, dhcpServer, dhcpMessage(dhcpDiscover, 0x8000))))
	if f := s.take(); len(f) != 1 || !bytes.Equal(f[0][headerSize:headerSize+6], broadcast[:]) {
		t.Errorf("the flag for broadcast: %x", f)
	}
}

// Frames that the filter must drop do not reach the stack; each is tried beside
// one that does.
func TestFilter(t *testing.T) {
	w := newWorld(t)
	n := newNetwork(t, w, Config{Policy: Policy{Public: true}})
	s := newSink()
	if err := n.Attach(s); err != nil {
		t.Fatal(err)
	}
	syn := func(src, dst string) []byte {
		p := make([]byte, ipSize+header.TCPMinimumSize)
		a, b := full(src+":1"), full(dst+":80")
		header.IPv4(p).Encode(&header.IPv4Fields{TotalLength: uint16(len(p)), TTL: 64, Protocol: protoTCP, SrcAddr: a.Addr, DstAddr: b.Addr})
		header.IPv4(p).SetChecksum(^header.IPv4(p).CalculateChecksum())
		header.TCP(p[ipSize:]).Encode(&header.TCPFields{SrcPort: 5555, DstPort: 80, SeqNum: 1, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagSyn, WindowSize: 1000})
		return p
	}
	received := func() uint64 { return n.stack.Stats().IP.PacketsReceived.Value() }
	router := routerMAC()
	pass := func(to, from [6]byte, typ uint16, p []byte) bool {
		before := received()
		n.Send(ethernetFrame(to, from, typ, p))
		return received() > before
	}
	good := syn("10.0.2.15", "1.2.3.4")
	if !pass(router, guestMAC, ethIPv4, good) {
		t.Fatal("a good frame is dropped")
	}
	with := func(i int, b byte) []byte {
		p := bytes.Clone(good)
		p[i] = b
		return p
	}
	for name, f := range map[string]bool{
		"to another station":    pass(broadcast, guestMAC, ethIPv4, good),
		"from a group":          pass(router, [6]byte{1}, ethIPv4, good),
		"from the router":       pass(router, router, ethIPv4, good),
		"IPv6":                  pass(router, guestMAC, 0x86dd, good),
		"VLAN":                  pass(router, guestMAC, 0x8100, good),
		"another version":       pass(router, guestMAC, ethIPv4, with(0, 0x65)),
		"options":               pass(router, guestMAC, ethIPv4, with(0, 0x46)),
		"too long":              pass(router, guestMAC, ethIPv4, with(2, 1)),
		"too short":             pass(router, guestMAC, ethIPv4, good[:19]),
		"another protocol":      pass(router, guestMAC, ethIPv4, with(9, 47)),
		"ICMP to the world":     pass(router, guestMAC, ethIPv4, with(9, protoICMP)),
		"from somebody else":    pass(router, guestMAC, ethIPv4, syn("10.0.2.16", "1.2.3.4")),
		"from the host":         pass(router, guestMAC, ethIPv4, syn("10.0.2.2", "1.2.3.4")),
		"from the loopback":     pass(router, guestMAC, ethIPv4, syn("127.0.0.1", "1.2.3.4")),
		"to multicast":          pass(router, guestMAC, ethIPv4, syn("10.0.2.15", "224.0.0.1")),
		"to a neighbour":        pass(router, guestMAC, ethIPv4, syn("10.0.2.15", "10.0.2.99")),
		"to itself":             pass(router, guestMAC, ethIPv4, syn("10.0.2.15", "10.0.2.15")),
		"to all":                pass(router, guestMAC, ethIPv4, syn("10.0.2.15", "255.255.255.255")),
		"to the subnet":         pass(router, guestMAC, ethIPv4, syn("10.0.2.15", "10.0.2.255")),
		"ARP as IP":             pass(router, guestMAC, ethARP, good),
		"a frame without all":   pass(router, guestMAC, ethIPv4, nil),
		"ICMP to the host":      pass(router, guestMAC, ethIPv4, func() []byte { p := syn("10.0.2.15", "10.0.2.3"); p[9] = protoICMP; return p }()),
		"broadcast in a subnet": pass(broadcast, guestMAC, ethIPv4, syn("10.0.2.15", "10.0.2.255")),
	} {
		if f {
			t.Errorf("%s reaches the stack", name)
		}
	}
}

func TestARP(t *testing.T) {
	for _, host := range []bool{false, true} {
		n := newNetwork(t, nil, Config{Policy: Policy{Host: host}})
		s := newSink()
		if err := n.Attach(s); err != nil {
			t.Fatal(err)
		}
		ask := func(target string) bool {
			p := make(header.ARP, header.ARPSize)
			p.SetIPv4OverEthernet()
			p.SetOp(header.ARPRequest)
			copy(p.HardwareAddressSender(), guestMAC[:])
			copy(p.ProtocolAddressSender(), GuestAddr().AsSlice())
			copy(p.ProtocolAddressTarget(), netip.MustParseAddr(target).AsSlice())
			n.Send(ethernetFrame(broadcast, guestMAC, ethARP, p))
			f := s.take()
			return len(f) == 1 && bytes.Equal(f[0][headerSize:headerSize+6], guestMAC[:])
		}
		if !ask("10.0.2.2") || ask("10.0.2.3") != host || ask("10.0.2.15") || ask("10.0.2.99") || ask("1.2.3.4") {
			t.Errorf("with host %v another station answers", host)
		}
	}
}

// FuzzFrames gives the network frames of any kind. What the guest gets must be
// frames, of the guest's MTU or with a header that says how to cut them.
func FuzzFrames(f *testing.F) {
	guest, router := GuestAddr(), RouterAddr()
	add := func(frames ...[]byte) {
		var b []byte
		for _, p := range frames {
			b = be.AppendUint16(b, uint16(len(p)))
			b = append(b, p...)
		}
		f.Add(b)
	}
	mac := routerMAC()
	ip := func(p []byte) []byte { return ethernetFrame(mac, guestMAC, ethIPv4, p) }
	query := []byte{0, 5, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 7, 'g', 'a', 't', 'e', 'w', 'a', 'y', 5, 'm', 'o', 'o', 'v', 'm', 8, 'i', 'n', 't', 'e', 'r', 'n', 'a', 'l', 0, 0, 1, 0, 1}
	ping := append(datagram(guest, router, 0, 0, nil)[:ipSize], 8, 0, 0, 0, 1, 2, 3, 4)
	be.PutUint16(ping[2:], uint16(len(ping)))
	ping[9] = protoICMP
	add(ip(datagram(guest, router, 1000, 53, query)), ip(ping))
	add(ethernetFrame(broadcast, guestMAC, ethIPv4, datagram(guest, netip.MustParseAddr("255.255.255.255"), 68, 67, dhcpMessage(dhcpDiscover, 0))))
	tcp := append(datagram(guest, router, 0, 0, nil)[:ipSize], make([]byte, 20)...)
	tcp[3], tcp[9], tcp[ipSize+12], tcp[ipSize+13], tcp[ipSize+3] = 40, protoTCP, 0x50, 2, 53
	add(ip(tcp), ip(tcp))
	udp := ip(datagram(guest, netip.MustParseAddr("1.2.3.4"), 1000, 1000, []byte("x")))
	fragment := bytes.Clone(udp)
	fragment[headerSize+ethSize+6] = 0x20
	add(udp, fragment)
	f.Fuzz(func(t *testing.T, script []byte) {
		n, err := New(Config{Nameservers: []netip.AddrPort{}, self: nowhere})
		if err != nil {
			t.Fatal(err)
		}
		s := newSink()
		if err := n.Attach(s); err != nil {
			t.Fatal(err)
		}
		for i := 0; len(script) > 1 && i < 64; i++ {
			l := min(int(be.Uint16(script)), len(script)-2, headerSize+ethSize+65536)
			n.Send(bytes.Clone(script[2 : 2+l]))
			script = script[2+l:]
		}
		n.Close() // nothing answers any more: what came is looked at now
		for _, p := range s.take() {
			ip, gso := len(p)-headerSize-ethSize, p[1] != 0
			if ip < 0 || p[1]&^1 != 0 || gso && p[0] != 1 || !gso && ip > 1500 || ip > 65535 {
				t.Errorf("the guest gets %x", p)
			}
		}
	})
}

var _ virtionet.Receiver = (*sink)(nil)
