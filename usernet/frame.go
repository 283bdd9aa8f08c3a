package usernet

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	protoICMP, protoTCP, protoUDP = 1, 6, 17
	ipSize, udpSize               = 20, 8
)

// Send implements virtionet.Link: the frames' filter. What has no business
// here never reaches the stack: other protocols, options, foreign senders, and
// ICMP to anybody but the router.
func (n *Network) Send(packet []byte) {
	n.port.in.RLock()
	defer n.port.in.RUnlock()
	if n.port.closed || len(packet) < headerSize+ethSize {
		return
	}
	f := packet[headerSize:]
	to, from := [6]byte(f), [6]byte(f[6:])
	if from[0]&1 != 0 || from == [6]byte{} || from == routerMAC() {
		return
	}
	switch be.Uint16(f[12:]) {
	case ethARP:
		n.arp(from, f[ethSize:])
	case ethIPv4:
		if ip, ok := trim(f[ethSize:]); ok {
			n.ip(to, from, ip)
		}
	}
}

// trim returns an IPv4 packet without what follows it, if it is one without
// options.
func trim(ip []byte) ([]byte, bool) {
	if len(ip) < ipSize || ip[0] != 0x45 {
		return nil, false
	}
	n := int(be.Uint16(ip[2:]))
	if n < ipSize || n > len(ip) {
		return nil, false
	}
	return ip[:n], true
}

func (n *Network) ip(to, from [6]byte, ip []byte) {
	src, dst := netip.AddrFrom4([4]byte(ip[12:])), netip.AddrFrom4([4]byte(ip[16:]))
	proto, fragment := ip[9], be.Uint16(ip[6:])&0x3fff != 0
	if proto == protoUDP && !fragment && len(ip) >= ipSize+udpSize && be.Uint16(ip[ipSize+2:]) == dhcpServer {
		if dst == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || dst == RouterAddr() {
			n.dhcp(from, ip[ipSize+udpSize:])
		}
		return
	}
	if to != routerMAC() || src != GuestAddr() {
		return
	}
	switch {
	case proto == protoICMP && dst == RouterAddr():
	case proto == protoTCP || proto == protoUDP:
		own := dst == RouterAddr() || dst == HostAddr()
		if Subnet().Contains(dst) && !own || dst.IsMulticast() || dst.IsUnspecified() || dst == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
			return
		}
	default:
		return
	}
	n.port.learn(from)
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(ip)})
	n.port.InjectInbound(ipv4.ProtocolNumber, p)
	p.DecRef()
}

// arp answers who has the router's address, or the one that is this machine,
// and takes note of who has the guest's.
func (n *Network) arp(from [6]byte, p []byte) {
	if len(p) < header.ARPSize {
		return
	}
	a := header.ARP(p)
	if !a.IsValid() || [6]byte(a.HardwareAddressSender()) != from {
		return
	}
	if netip.AddrFrom4([4]byte(a.ProtocolAddressSender())) == GuestAddr() {
		n.port.learn(from)
	}
	asked := netip.AddrFrom4([4]byte(a.ProtocolAddressTarget()))
	if a.Op() == header.ARPRequest && (asked == RouterAddr() || asked == HostAddr() && n.cfg.Policy.Host) {
		n.port.arp(header.ARPReply, asked, from, [4]byte(a.ProtocolAddressSender()))
	}
}

// arp sends an ARP packet.
func (e *endpoint) arp(op header.ARPOp, as netip.Addr, to [6]byte, address [4]byte) {
	router, sender := routerMAC(), as.As4()
	p := make(header.ARP, header.ARPSize)
	p.SetIPv4OverEthernet()
	p.SetOp(op)
	copy(p.HardwareAddressSender(), router[:])
	copy(p.ProtocolAddressSender(), sender[:])
	copy(p.HardwareAddressTarget(), to[:])
	copy(p.ProtocolAddressTarget(), address[:])
	e.frame(to, ethARP, p)
}

// whoHas asks who has an address.
func (e *endpoint) whoHas(a netip.Addr) {
	e.arp(header.ARPRequest, RouterAddr(), [6]byte{255, 255, 255, 255, 255, 255}, a.As4())
}
