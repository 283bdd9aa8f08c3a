package virtionet

import "encoding/binary"

var be, le = binary.BigEndian, binary.LittleEndian

const (
	etherIPv4, etherIPv6 = 0x0800, 0x86dd
	etherVLAN, etherQinQ = 0x8100, 0x88a8
	protoTCP, protoUDP   = 6, 17
	minTCP               = 20
)

// layout is where the headers of a TCP or UDP frame are.
type layout struct {
	v6    bool
	proto byte
	ip    int // offset of the IP header
	l4    int // of the TCP or UDP header
}

// parse finds the headers of a TCP or UDP packet that is no fragment and has
// no IPv6 extension headers; it reports false for everything else.
func parse(f []byte) (l layout, ok bool) {
	if len(f) < ethHeader {
		return l, false
	}
	typ := be.Uint16(f[12:])
	l.ip = ethHeader
	if (typ == etherVLAN || typ == etherQinQ) && len(f) >= ethHeader+vlanTag {
		typ, l.ip = be.Uint16(f[16:]), ethHeader+vlanTag
	}
	p := f[l.ip:]
	switch {
	case typ == etherIPv4 && len(p) >= 20 && p[0]>>4 == 4:
		n := int(p[0]&15) * 4
		if n < 20 || be.Uint16(p[6:])&0x3fff != 0 {
			return l, false
		}
		l.proto, l.l4 = p[9], l.ip+n
	case typ == etherIPv6 && len(p) >= 40 && p[0]>>4 == 6:
		l.v6, l.proto, l.l4 = true, p[6], l.ip+40
	default:
		return l, false
	}
	return l, (l.proto == protoTCP || l.proto == protoUDP) && len(f) >= l.l4+8
}

// payload is the offset of a TCP packet's data; false if its header is not
// all there.
func (l layout) payload(f []byte) (int, bool) {
	if l.proto != protoTCP || len(f) < l.l4+minTCP {
		return 0, false
	}
	n := int(f[l.l4+12]>>4) * 4
	return l.l4 + n, n >= minTCP && len(f) >= l.l4+n
}

// flow is a hash of a packet's addresses and ports that is the same in both
// directions; 0 for what has none.
func flow(f []byte) uint32 {
	l, ok := parse(f)
	if !ok {
		return 0
	}
	addrs, n := f[l.ip+12:], 4
	if l.v6 {
		addrs, n = f[l.ip+8:], 16
	}
	h := uint32(be.Uint16(f[l.l4:]) ^ be.Uint16(f[l.l4+2:]))
	for i := 0; i < n; i += 4 {
		h ^= be.Uint32(addrs[i:]) ^ be.Uint32(addrs[n+i:])
	}
	h *= 0x9e3779b1
	return h ^ h>>16
}

// header is a virtio_net_hdr.
type header [HeaderSize]byte

// checkHeader returns the header of a packet as it is passed on: what the
// sender says, if the offloads o allow it and the frame bears it out; hdr_len
// is computed and what has no meaning is 0. False means that the packet makes
// no sense, or is larger than mtu allows.
func checkHeader(packet []byte, o Offloads, mtu int) (h header, ok bool) {
	in, f := packet[:HeaderSize], packet[HeaderSize:]
	limit := mtu + ethHeader
	if len(f) >= ethHeader && be.Uint16(f[12:]) == etherVLAN {
		limit += vlanTag
	}
	start, offset := int(le.Uint16(in[hdrCsumStart:])), int(le.Uint16(in[hdrCsumOffset:]))
	if in[hdrFlags]&flagNeedsCsum != 0 {
		if !o.Checksum || start < ethHeader || start+offset+2 > len(f) {
			return h, false
		}
		h[hdrFlags] = flagNeedsCsum
		le.PutUint16(h[hdrCsumStart:], uint16(start))
		le.PutUint16(h[hdrCsumOffset:], uint16(offset))
	}
	gso := in[hdrGSOType]
	if gso == gsoNone {
		return h, len(f) <= limit
	}
	size := int(le.Uint16(in[hdrGSOSize:]))
	l, ok := parse(f)
	if !ok || !o.Segmentation || h[hdrFlags] == 0 || gso != gsoTCPv4 && gso != gsoTCPv6 || l.v6 != (gso == gsoTCPv6) {
		return h, false
	}
	data, ok := l.payload(f)
	if !ok || start != l.l4 || offset != 16 || size == 0 || data+size > limit {
		return h, false
	}
	if data+size >= len(f) { // one segment: nothing to cut
		return h, len(f) <= limit
	}
	h[hdrGSOType] = gso
	le.PutUint16(h[hdrLen:], uint16(data))
	le.PutUint16(h[hdrGSOSize:], uint16(size))
	return h, true
}

// sum adds b to a ones' complement sum of 16-bit words that is not folded yet.
func sum(s uint64, b []byte) uint64 {
	for ; len(b) >= 4; b = b[4:] {
		s += uint64(be.Uint32(b))
	}
	if len(b) >= 2 {
		s += uint64(be.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	return s
}

// fold is the checksum of a sum.
func fold(s uint64) uint16 {
	for s>>16 != 0 {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

// completeChecksum does what NEEDS_CSUM asks for, in the frame f. The header
// h is one of checkHeader's.
func completeChecksum(f []byte, h []byte) {
	start := int(le.Uint16(h[hdrCsumStart:]))
	at := f[start+int(le.Uint16(h[hdrCsumOffset:])):]
	c := fold(sum(0, f[start:]))
	if c == 0 { // 0 would mean none in UDP, and is the same in all others
		c = 0xffff
	}
	be.PutUint16(at, c)
}

// segments cuts a TCP packet with a header of checkHeader's into segments.
type segments struct {
	f    []byte // the frame
	l    layout
	data int // offset of what is left
	head int // length of all headers
	size int // data bytes of a segment
	n    int // segments made
}

func newSegments(packet []byte) segments {
	f := packet[HeaderSize:]
	l, _ := parse(f) // as checkHeader found it
	head := int(le.Uint16(packet[hdrLen:]))
	return segments{f: f, l: l, data: head, head: head, size: int(le.Uint16(packet[hdrGSOSize:]))}
}

// TCP flags that not every segment keeps (RFC 9293, RFC 3168).
const tcpFIN, tcpPSH, tcpCWR = 1, 8, 128

// next makes the next segment in dst, a complete packet, and returns its
// length; 0 at the end.
func (s *segments) next(dst []byte) int {
	if s.data >= len(s.f) {
		return 0
	}
	d := dst[HeaderSize:]
	clear(dst[:HeaderSize])
	copy(d, s.f[:s.head])
	n := copy(d[s.head:], s.f[s.data:min(s.data+s.size, len(s.f))])
	d = d[:s.head+n]
	ip, tcp := d[s.l.ip:], d[s.l.l4:]
	pseudo := uint64(protoTCP) + uint64(len(tcp))
	if s.l.v6 {
		be.PutUint16(ip[4:], uint16(len(tcp)))
		pseudo = sum(pseudo, ip[8:40])
	} else {
		be.PutUint16(ip[2:], uint16(len(ip)))
		be.PutUint16(ip[4:], be.Uint16(ip[4:])+uint16(s.n))
		be.PutUint16(ip[10:], 0)
		be.PutUint16(ip[10:], fold(sum(0, d[s.l.ip:s.l.l4])))
		pseudo = sum(pseudo, ip[12:20])
	}
	be.PutUint32(tcp[4:], be.Uint32(tcp[4:])+uint32(s.data-s.head))
	s.data += n
	if s.n > 0 {
		tcp[13] &^= tcpCWR
	}
	if s.data < len(s.f) {
		tcp[13] &^= tcpFIN | tcpPSH
	}
	be.PutUint16(tcp[16:], 0)
	be.PutUint16(tcp[16:], fold(sum(pseudo, tcp)))
	s.n++
	return HeaderSize + len(d)
}
