package usernet

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// The parts of DHCP that a network with one address needs (RFC 2131, 2132).
const (
	dhcpServer, dhcpClient = 67, 68
	dhcpFixed              = 240 // with the magic cookie
	dhcpCookie             = 0x63825363
	dhcpLease              = 24 * 3600 // seconds

	optMask, optRouter, optDNS, optMTU            = 1, 3, 6, 26
	optAddress, optLease, optType, optServer      = 50, 51, 53, 54
	dhcpDiscover, dhcpOffer, dhcpRequest, dhcpAck = 1, 2, 3, 5
	dhcpNak, dhcpInform                           = 6, 8
)

// dhcpOptions returns an option's value in the options p, nil if it is not
// there or p makes no sense.
func dhcpOption(p []byte, code byte) []byte {
	for len(p) > 1 {
		switch p[0] {
		case 0:
			p = p[1:]
			continue
		case 255:
			return nil
		}
		n := 2 + int(p[1])
		if n > len(p) {
			return nil
		}
		if p[0] == code {
			return p[2:n]
		}
		p = p[n:]
	}
	return nil
}

// dhcp answers a message of the guest's.
func (n *Network) dhcp(from [6]byte, m []byte) {
	if len(m) < dhcpFixed || m[0] != 1 || m[1] != 1 || m[2] != 6 || be.Uint32(m[236:]) != dhcpCookie || [6]byte(m[28:]) != from {
		return
	}
	options := m[dhcpFixed:]
	typ := dhcpOption(options, optType)
	if len(typ) != 1 {
		return
	}
	router, guest := RouterAddr().As4(), GuestAddr().As4()
	if s := dhcpOption(options, optServer); len(s) == 4 && [4]byte(s) != router {
		return // it has chosen another server
	}
	answer := byte(dhcpAck)
	switch typ[0] {
	case dhcpDiscover:
		answer = dhcpOffer
	case dhcpRequest:
		want := m[12:16] // its address, when it renews the lease
		if a := dhcpOption(options, optAddress); len(a) == 4 {
			want = a
		}
		if [4]byte(want) != guest {
			answer = dhcpNak
		}
	case dhcpInform:
	default:
		return
	}
	r := make([]byte, dhcpFixed, 300)
	copy(r, m[:16]) // operation to seconds, flags, and the client's address
	r[0], r[3] = 2, 0
	copy(r[28:44], m[28:44])
	be.PutUint32(r[236:], dhcpCookie)
	r = append(r, optType, 1, answer, optServer, 4)
	r = append(r, router[:]...)
	if answer != dhcpNak {
		if typ[0] != dhcpInform {
			copy(r[16:], guest[:])
			r = append(r, optLease, 4)
			r = be.AppendUint32(r, dhcpLease)
		}
		r = append(r, optMask, 4, 255, 255, 255, 0, optRouter, 4)
		r = append(r, router[:]...)
		r = append(r, optDNS, 4)
		r = append(r, router[:]...)
		r = append(r, optMTU, 2)
		r = be.AppendUint16(r, uint16(n.cfg.MTU))
	}
	r = append(r, 255)
	r = append(r, make([]byte, max(0, 300-len(r)))...) // some clients take no less
	to, addr := from, GuestAddr()
	if m[10]&0x80 != 0 || answer == dhcpNak { // it cannot be addressed yet
		to, addr = [6]byte{255, 255, 255, 255, 255, 255}, netip.AddrFrom4([4]byte{255, 255, 255, 255})
	}
	n.port.frame(to, ethIPv4, datagram(RouterAddr(), addr, dhcpServer, dhcpClient, r))
}

// datagram is an IPv4 packet.
func datagram(src, dst netip.Addr, from, to uint16, payload []byte) []byte {
	s, d := tcpip.AddrFrom4(src.As4()), tcpip.AddrFrom4(dst.As4())
	p := make([]byte, ipSize+udpSize, ipSize+udpSize+len(payload))
	p = append(p, payload...)
	header.IPv4(p).Encode(&header.IPv4Fields{TotalLength: uint16(len(p)), TTL: 64, Protocol: protoUDP, SrcAddr: s, DstAddr: d})
	header.IPv4(p).SetChecksum(^header.IPv4(p).CalculateChecksum())
	u := header.UDP(p[ipSize:])
	u.Encode(&header.UDPFields{SrcPort: from, DstPort: to, Length: uint16(len(u))})
	sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, s, d, uint16(len(u)))
	sum = checksum.Checksum(payload, sum)
	if c := ^u.CalculateChecksum(sum); c != 0 {
		u.SetChecksum(c)
	} else {
		u.SetChecksum(0xffff)
	}
	return p
}
