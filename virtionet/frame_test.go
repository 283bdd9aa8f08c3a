package virtionet

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"
)

// The buffer against a list: what goes in comes out, in order, and it refuses
// only when it is rather full.
func TestBufferModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const size, longest = 300, 100
		b := newBuffer(size)
		var model [][]byte
		t.Repeat(map[string]func(*rapid.T){
			"push": func(t *rapid.T) {
				p := rapid.SliceOfN(rapid.Byte(), HeaderSize, longest).Draw(t, "packet")
				h := header(p[:HeaderSize])
				used := 0
				for _, q := range model {
					used += recordHead + len(q)
				}
				ok := b.push(&h, p)
				if ok {
					model = append(model, p)
				} else if used+2*(recordHead+len(p))+recordHead+longest <= size {
					// What is free may lie in two pieces, and a third, where a
					// record did not fit before the end, is not free yet.
					t.Fatalf("%d bytes of %d in use, no room for %d", used, size, len(p))
				}
			},
			"pop": func(t *rapid.T) {
				p := b.peek()
				if (p == nil) != (len(model) == 0) {
					t.Fatalf("peek = %x, want %d packets", p, len(model))
				}
				if p == nil {
					return
				}
				if !bytes.Equal(p, model[0]) {
					t.Fatalf("peek = %x, want %x", p, model[0])
				}
				model = model[1:]
				b.pop()
			},
			"reset": func(t *rapid.T) {
				if rapid.IntRange(0, 9).Draw(t, "really") == 0 {
					b.reset()
					model = nil
				}
			},
		})
	})
}

// sum16 is the definition of the Internet checksum (RFC 1071).
func sum16(b []byte) uint16 {
	s := uint32(0)
	for i, c := range b {
		s += uint32(c) << (8 * uint(1-i&1))
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

func TestSumModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := rapid.SliceOf(rapid.Byte()).Draw(t, "bytes")
		if got, want := fold(sum(0, b)), sum16(b); got != want {
			t.Fatalf("%#x, want %#x", got, want)
		}
	})
}

// tcpPacket is a TCP packet that asks to be segmented; v6 says of which kind.
func tcpPacket(v6 bool, options int, data []byte, size int) []byte {
	l4 := ethHeader + 20
	if v6 {
		l4 = ethHeader + 40
	}
	p := make([]byte, HeaderSize+l4+minTCP+options+len(data))
	f := p[HeaderSize:]
	p[hdrFlags], p[hdrGSOType] = flagNeedsCsum, gsoTCPv4
	le.PutUint16(p[hdrGSOSize:], uint16(size))
	le.PutUint16(p[hdrCsumStart:], uint16(l4))
	le.PutUint16(p[hdrCsumOffset:], 16)
	ip := f[ethHeader:]
	be.PutUint16(f[12:], etherIPv4)
	ip[0], ip[9] = 0x45, protoTCP
	be.PutUint16(ip[4:], 0xffff) // the identification wraps
	if v6 {
		p[hdrGSOType] = gsoTCPv6
		be.PutUint16(f[12:], etherIPv6)
		copy(ip, make([]byte, 10))
		ip[0], ip[6] = 0x60, protoTCP
		ip[8], ip[24] = 0xfd, 0xfe
	}
	tcp := f[l4:]
	be.PutUint32(tcp[4:], 0xfffffff0) // so does the sequence number
	tcp[12] = byte((minTCP + options) / 4 << 4)
	tcp[13] = tcpFIN | tcpPSH | tcpCWR | 16
	copy(tcp[minTCP+options:], data)
	return p
}

// Segments hold all data in order, with right lengths, checksums and flags.
func TestSegmentsModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v6 := rapid.Bool().Draw(t, "v6")
		options := 4 * rapid.IntRange(0, 10).Draw(t, "options")
		data := rapid.SliceOfN(rapid.Byte(), 2, 5000).Draw(t, "data")
		size := rapid.IntRange(1, min(1400, len(data)-1)).Draw(t, "size")
		p := tcpPacket(v6, options, data, size)
		h, ok := checkHeader(p, Offloads{Checksum: true, Segmentation: true}, 1500)
		if !ok {
			t.Fatal("refused")
		}
		copy(p, h[:])
		s, dst, got := newSegments(p), make([]byte, HeaderSize+maxFrame), []byte(nil)
		for i := 0; ; i++ {
			n := s.next(dst)
			if n == 0 {
				break
			}
			f := dst[HeaderSize:n]
			l, ok := parse(f)
			at, ok2 := l.payload(f)
			if !ok || !ok2 || l.v6 != v6 {
				t.Fatalf("segment %d: %x", i, f)
			}
			seg := f[at:]
			last := len(got)+len(seg) == len(data)
			if !last && len(seg) != size {
				t.Fatalf("segment %d has %d bytes", i, len(seg))
			}
			tcp := f[l.l4:]
			if seq := be.Uint32(tcp[4:]); seq != 0xfffffff0+uint32(len(got)) {
				t.Fatalf("segment %d has sequence number %#x", i, seq)
			}
			want := byte(16)
			if i == 0 {
				want |= tcpCWR
			}
			if last {
				want |= tcpFIN | tcpPSH
			}
			if tcp[13] != want {
				t.Fatalf("segment %d has flags %#x, want %#x", i, tcp[13], want)
			}
			pseudo := []byte{0, protoTCP, byte(len(tcp) >> 8), byte(len(tcp))}
			ip := f[ethHeader:l.l4]
			if v6 {
				pseudo = append(pseudo, ip[8:40]...)
				if n := int(be.Uint16(ip[4:])); n != len(tcp) {
					t.Fatalf("segment %d: length %d", i, n)
				}
			} else {
				pseudo = append(pseudo, ip[12:20]...)
				if sum16(ip) != 0 || int(be.Uint16(ip[2:])) != 20+len(tcp) || be.Uint16(ip[4:]) != 0xffff+uint16(i) {
					t.Fatalf("segment %d: IP header %x", i, ip)
				}
			}
			if c := sum16(append(pseudo, tcp...)); c != 0 {
				t.Fatalf("segment %d: TCP checksum is off by %#x", i, c)
			}
			got = append(got, seg...)
		}
		if !bytes.Equal(got, data) {
			t.Fatal("the data changed")
		}
	})
}

// The two directions of a flow have the same hash, and others have others.
func TestFlow(t *testing.T) {
	a := tcpPacket(false, 0, []byte("x"), 1)[HeaderSize:]
	copy(a[26:], []byte{10, 0, 0, 1, 10, 0, 0, 2, 0x12, 0x34, 0, 80})
	b := bytes.Clone(a)
	copy(b[26:], []byte{10, 0, 0, 2, 10, 0, 0, 1, 0, 80, 0x12, 0x34})
	if flow(a) != flow(b) || flow(a) == 0 {
		t.Errorf("%#x and %#x", flow(a), flow(b))
	}
	b[37]++
	if flow(a) == flow(b) {
		t.Error("another flow has the same hash")
	}
}

// Whatever the header and the frame are, what is let through can be worked on.
func FuzzPacket(f *testing.F) {
	f.Add(tcpPacket(false, 0, make([]byte, 3000), 1000), 1500)
	f.Add(tcpPacket(true, 8, make([]byte, 3000), 1000), 1500)
	f.Add(make([]byte, 100), 68)
	f.Fuzz(func(t *testing.T, p []byte, mtu int) {
		if len(p) < HeaderSize+ethHeader || len(p) > HeaderSize+maxFrame || mtu < minMTU || mtu > maxMTU {
			return
		}
		flow(p[HeaderSize:])
		h, ok := checkHeader(p, Offloads{Checksum: true, Segmentation: true}, mtu)
		if !ok {
			return
		}
		copy(p, h[:])
		if h[hdrGSOType] != gsoNone {
			s, dst, n := newSegments(p), make([]byte, HeaderSize+maxFrame), 0
			for m := s.next(dst); m > 0; m = s.next(dst) {
				if m > HeaderSize+ethHeader+vlanTag+mtu {
					t.Fatalf("a segment of %d bytes, MTU %d", m, mtu)
				}
				n += m - HeaderSize - s.head
			}
			if n != len(p)-HeaderSize-s.head {
				t.Fatalf("%d bytes in segments of a packet of %d", n, len(p))
			}
			return
		}
		if len(p) > HeaderSize+ethHeader+vlanTag+mtu {
			t.Fatalf("a packet of %d bytes, MTU %d", len(p), mtu)
		}
		if h[hdrFlags] != 0 {
			completeChecksum(p[HeaderSize:], p)
		}
	})
}
