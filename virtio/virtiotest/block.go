package virtiotest

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/rand"
	"testing"

	"github.com/moovm/moovm/virtio"
)

// Feature bits of a block device (section 5.2.3).
const (
	blkSizeMax     uint64 = 1 << 1
	blkSegMax      uint64 = 1 << 2
	blkReadOnly    uint64 = 1 << 5
	blkBlkSize     uint64 = 1 << 6
	blkFlush       uint64 = 1 << 9
	blkTopology    uint64 = 1 << 10
	blkConfigWCE   uint64 = 1 << 11
	blkMQ          uint64 = 1 << 12
	blkDiscard     uint64 = 1 << 13
	blkWriteZeroes uint64 = 1 << 14

	// BlockFeatures are the features of a block device Block can work with.
	BlockFeatures = RingFeatures | blkSizeMax | blkSegMax | blkReadOnly | blkBlkSize | blkFlush |
		blkTopology | blkConfigWCE | blkMQ | blkDiscard | blkWriteZeroes
)

// BlockOpener makes a block device with a transport on a disk of at least
// 2 MiB, all zeros, not shared with other tests.
type BlockOpener func(t *testing.T, g *Guest, readOnly bool) Transport

// BlockConformance runs what the specification (virtio 1.2) says about block
// devices; each subtest is named by the section it comes from.
func BlockConformance(t *testing.T, open BlockOpener) {
	runRO := func(name string, readOnly bool, want uint64, f func(t *testing.T, b *Block)) {
		t.Run(name, func(t *testing.T) {
			g := NewGuest(4 << 20)
			f(t, NewBlock(Start(t, open(t, g, readOnly), g, want, 64)))
		})
	}
	run := func(name string, f func(t *testing.T, b *Block)) { runRO(name, false, BlockFeatures, f) }
	capacity := func(b *Block) uint64 { return configUint(b, 0, 8) }
	rnd := rand.New(rand.NewSource(1))
	pattern := func(n int) []byte {
		p := make([]byte, n)
		rnd.Read(p)
		return p
	}
	read := func(t *testing.T, b *Block, sector uint64, n int) []byte {
		t.Helper()
		in := make([]byte, n)
		if st, used := b.Request(0, BlkIn, sector, nil, in); st != BlkOK || used != uint32(n)+1 {
			t.Fatalf("reading sector %d: status %d, used length %d", sector, st, used)
		}
		return in
	}
	write := func(t *testing.T, b *Block, sector uint64, p []byte) {
		t.Helper()
		if st, used := b.Request(0, BlkOut, sector, p, nil); st != BlkOK || used != 1 {
			t.Fatalf("writing sector %d: status %d, used length %d", sector, st, used)
		}
	}

	run("5.2.4 device ID and configuration", func(t *testing.T, b *Block) {
		if b.DeviceID() != 2 {
			t.Errorf("device ID %d", b.DeviceID())
		}
		if c := capacity(b); c < 2<<20/512 {
			t.Fatalf("capacity %d sectors", c)
		}
		f := Offered(b)
		for _, c := range []struct {
			bit    uint64
			off    uint32
			n      int
			lo, hi uint64
		}{
			{blkSizeMax, 8, 4, 4096, math.MaxUint32}, {blkSegMax, 12, 4, 1, virtio.MaxQueueSize}, {blkBlkSize, 20, 4, 512, 4096},
			{blkTopology, 24, 1, 0, 16}, {blkMQ, 34, 2, 2, 65535}, {blkDiscard, 36, 4, 1, math.MaxUint32},
			{blkDiscard, 40, 4, 1, math.MaxUint32}, {blkWriteZeroes, 48, 4, 1, math.MaxUint32}, {blkWriteZeroes, 52, 4, 1, math.MaxUint32},
		} {
			if v := configUint(b, c.off, c.n); f&c.bit != 0 && (v < c.lo || v > c.hi) {
				t.Errorf("field at %d is %d, want %d to %d", c.off, v, c.lo, c.hi)
			}
		}
		n := 0
		for b.QueueMax(n) != 0 {
			n++
		}
		if f&blkMQ != 0 && uint64(n) != configUint(b, 34, 2) {
			t.Errorf("num_queues %d, queues %d", configUint(b, 34, 2), n)
		}
	})
	run("5.2.6 IN and OUT", func(t *testing.T, b *Block) {
		a, z := pattern(512), pattern(256<<10)
		write(t, b, 0, a)
		write(t, b, 3, z)
		if !bytes.Equal(read(t, b, 0, 512), a) || !bytes.Equal(read(t, b, 3, len(z)), z) {
			t.Error("read back something else")
		}
		if !bytes.Equal(read(t, b, 1, 1024), make([]byte, 1024)) {
			t.Error("what was not written is not zero")
		}
	})
	run("5.2.6 the last sector, and not one more", func(t *testing.T, b *Block) {
		last := capacity(b) - 1
		p := pattern(512)
		write(t, b, last, p)
		if !bytes.Equal(read(t, b, last, 512), p) {
			t.Error("read back something else")
		}
		for _, c := range []struct {
			sector uint64
			n      int
		}{{last, 1024}, {last + 1, 512}, {last + 2, 512}, {1 << 55, 512}, {1<<55 - 1, 1024}, {1 << 54, 512}, {math.MaxUint64, 512},
			{math.MaxUint64 - 1, 1024}, {1 << 63, 512}} {
			if st, used := b.Request(0, BlkOut, c.sector, make([]byte, c.n), nil); st != BlkIOErr || used != 1 {
				t.Errorf("write of %d at %#x: status %d, used %d", c.n, c.sector, st, used)
			}
			if st, used := b.Request(0, BlkIn, c.sector, nil, make([]byte, c.n)); st != BlkIOErr || used > 1 {
				t.Errorf("read of %d at %#x: status %d, used %d", c.n, c.sector, st, used)
			}
		}
		if !bytes.Equal(read(t, b, last, 512), p) || !bytes.Equal(read(t, b, 0, 512), make([]byte, 512)) {
			t.Error("a refused write changed something")
		}
	})
	run("5.2.6 data that is no multiple of 512 bytes is IOERR", func(t *testing.T, b *Block) {
		for _, n := range []int{1, 511, 513, 1000} {
			if st, _ := b.Request(0, BlkOut, 0, pattern(n), nil); st != BlkIOErr {
				t.Errorf("write of %d: status %d", n, st)
			}
			if st, _ := b.Request(0, BlkIn, 0, nil, make([]byte, n)); st != BlkIOErr {
				t.Errorf("read of %d: status %d", n, st)
			}
		}
		if !bytes.Equal(read(t, b, 0, 1024), make([]byte, 1024)) {
			t.Error("a refused write changed something")
		}
	})
	run("2.7.4 no framing assumptions", func(t *testing.T, b *Block) {
		p := pattern(1024)
		write(t, b, 8, p)
		binary.LittleEndian.PutUint32(b.mem, BlkIn)
		binary.LittleEndian.PutUint64(b.mem[8:], 8)
		for _, cuts := range [][2][]uint32{ // lengths of readable and writable buffers
			{{16}, {1025}}, // the status shares the data's buffer
			{{1, 15}, {1024, 1}},
			{{4, 4, 8}, {1, 1023, 1}},
			{{16}, {511, 2, 511, 1}},
			{{15, 1}, {1, 1, 1, 1020, 2}},
		} {
			var bufs []Buf
			clear(b.mem[4096 : 4096+2048])
			b.mem[4096+1024] = 0xff
			at := b.base
			for _, n := range cuts[0] {
				bufs = append(bufs, Buf{Addr: at, Len: n})
				at += uint64(n)
			}
			at = b.base + 4096
			for _, n := range cuts[1] {
				bufs = append(bufs, Buf{Addr: at, Len: n, Write: true})
				at += uint64(n)
			}
			if used := b.Do(0, bufs...); used != 1025 || b.mem[4096+1024] != BlkOK {
				t.Errorf("%v: used length %d, status %d", cuts, used, b.mem[4096+1024])
			}
			if !bytes.Equal(b.mem[4096:4096+1024], p) {
				t.Errorf("%v: wrong data", cuts)
			}
		}
		// Header and data of a write in one buffer.
		binary.LittleEndian.PutUint32(b.mem, BlkOut)
		binary.LittleEndian.PutUint64(b.mem[8:], 100)
		q := pattern(512)
		copy(b.mem[16:], q)
		if used := b.Do(0, Buf{Addr: b.base, Len: 16 + 300}, Buf{Addr: b.base + 316, Len: 212},
			Buf{Addr: b.base + 2048, Len: 1, Write: true}); used != 1 || b.mem[2048] != BlkOK {
			t.Errorf("used length %d, status %d", used, b.mem[2048])
		}
		if !bytes.Equal(read(t, b, 100, 512), q) {
			t.Error("header and data in one buffer: wrong data")
		}
	})
	run("5.2.6 the status is one byte", func(t *testing.T, b *Block) {
		binary.LittleEndian.PutUint32(b.mem, BlkOut)
		binary.LittleEndian.PutUint64(b.mem[8:], math.MaxUint64)
		copy(b.mem[4096:], "\xaa\xaa\xaa\xaa")
		b.Do(0, Buf{Addr: b.base, Len: 16 + 512}, Buf{Addr: b.base + 4096, Len: 3, Write: true})
		if got := b.mem[4096:4100]; string(got) != "\xaa\xaa\x01\xaa" {
			t.Errorf("%x", got)
		}
	})
	run("5.2.6 a chain without header or status does no harm", func(t *testing.T, b *Block) {
		clear(b.mem[:64])
		if used := b.Do(0, Buf{Addr: b.base, Len: 16}); used != 0 {
			t.Errorf("no status: used length %d", used)
		}
		if used := b.Do(0, Buf{Addr: b.base + 32, Len: 1, Write: true}); used > 1 {
			t.Errorf("no header: used length %d", used)
		}
		b.Do(0, Buf{Addr: b.base, Len: 15}, Buf{Addr: b.base + 32, Len: 1, Write: true})
		if b.mem[32] != BlkIOErr {
			t.Errorf("short header: status %d", b.mem[32])
		}
		read(t, b, 0, 512)
	})
	run("5.2.6.1 unknown request types are UNSUPP", func(t *testing.T, b *Block) {
		for _, typ := range []uint32{2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 18, 24, 26, 255, 0x80000000, 0x80000001, math.MaxUint32} {
			if st, _ := b.Request(0, typ, 0, make([]byte, 512), make([]byte, 512)); st != BlkUnsupp {
				t.Errorf("type %#x: status %d", typ, st)
			}
		}
	})
	run("5.2.6 GET_ID is 20 bytes", func(t *testing.T, b *Block) {
		id := bytes.Repeat([]byte{0xee}, 20)
		if st, used := b.Request(0, BlkGetID, 0, nil, id); st != BlkOK || used != 21 {
			t.Fatalf("status %d, used length %d", st, used)
		}
		if i := bytes.IndexByte(id, 0); i >= 0 && !bytes.Equal(id[i:], make([]byte, 20-i)) {
			t.Errorf("%q is not padded with zeros", id)
		}
		long := bytes.Repeat([]byte{0xee}, 40)
		if st, _ := b.Request(0, BlkGetID, 0, nil, long); st == BlkOK && !bytes.Equal(long[20:], bytes.Repeat([]byte{0xee}, 20)) {
			t.Errorf("%x: more than 20 bytes written", long)
		}
		if st, used := b.Request(0, BlkGetID, 0, nil, make([]byte, 3)); used > 4 {
			t.Errorf("3 bytes of room: status %d, used length %d", st, used)
		}
	})
	run("5.2.6 FLUSH", func(t *testing.T, b *Block) {
		write(t, b, 0, pattern(512))
		if st, used := b.Request(0, BlkFlush, 0, nil, nil); st != BlkOK || used != 1 {
			t.Errorf("status %d, used length %d", st, used)
		}
	})
	for _, op := range []struct {
		name    string
		typ     uint32
		feature uint64
		max     uint32 // offset of its limits
	}{{"DISCARD", BlkDiscard, blkDiscard, 36}, {"WRITE_ZEROES", BlkWriteZeroes, blkWriteZeroes, 48}} {
		run("5.2.6 "+op.name, func(t *testing.T, b *Block) {
			if b.Features&op.feature == 0 {
				t.Skip("the device does not offer it")
			}
			write(t, b, 0, bytes.Repeat([]byte{0x55}, 64<<10))
			segs := append(Segment(1, 2, 0), Segment(16, 32, 0)...)
			if configUint(b, op.max+4, 4) < 2 {
				segs = segs[:16]
			}
			if st, used := b.Request(0, op.typ, 0, segs, nil); st != BlkOK || used != 1 {
				t.Fatalf("status %d, used length %d", st, used)
			}
			got := read(t, b, 0, 64<<10)
			for i, c := range got {
				s := i / 512
				inside := s == 1 || s == 2 || len(segs) > 16 && s >= 16 && s < 48
				if !inside && c != 0x55 || inside && op.typ == BlkWriteZeroes && c != 0 {
					t.Fatalf("byte %d of sector %d is %#x", i%512, s, c)
				}
			}
			if op.typ == BlkWriteZeroes { // may unmap: still zeros
				if st, _ := b.Request(0, op.typ, 0, Segment(64, 8, 1), nil); st != BlkOK {
					t.Errorf("with unmap: status %d", st)
				}
				if !bytes.Equal(read(t, b, 64, 4096), make([]byte, 4096)) {
					t.Error("with unmap: not zero")
				}
			}
			write(t, b, 0, bytes.Repeat([]byte{0x55}, 4096))
			c := capacity(b)
			limit := uint32(configUint(b, op.max, 4))
			for name, s := range map[string]struct {
				p    []byte
				want byte
			}{
				"beyond the end":   {Segment(c, 1, 0), BlkIOErr},
				"across the end":   {Segment(c-1, 2, 0), BlkIOErr},
				"sector 2^55":      {Segment(1<<55, 1, 0), BlkIOErr},
				"sector 2^64-1":    {Segment(math.MaxUint64, 2, 0), BlkIOErr},
				"above its limit":  {Segment(0, limit+1, 0), BlkIOErr},
				"17 bytes":         {append(Segment(0, 1, 0), 0), BlkIOErr},
				"8 bytes":          {make([]byte, 8), BlkIOErr},
				"unknown flag":     {Segment(0, 1, 2), BlkUnsupp},
				"all flags":        {Segment(0, 1, math.MaxUint32), BlkUnsupp},
				"the second fails": {append(Segment(0, 1, 0), Segment(c, 1, 0)...), BlkIOErr},
				"too many":         {bytes.Repeat(Segment(0, 1, 0), int(configUint(b, op.max+4, 4))+1), BlkIOErr},
			} {
				if st, _ := b.Request(0, op.typ, 0, s.p, nil); st != s.want {
					t.Errorf("%s: status %d, want %d", name, st, s.want)
				}
			}
			if op.typ == BlkDiscard {
				if st, _ := b.Request(0, op.typ, 0, Segment(0, 1, 1), nil); st != BlkUnsupp {
					t.Errorf("discard with unmap: status %d", st)
				}
			}
			if !bytes.Equal(read(t, b, 0, 4096), bytes.Repeat([]byte{0x55}, 4096)) {
				t.Error("a refused request changed something")
			}
		})
		runRO("5.2.6 "+op.name+" not negotiated is UNSUPP", false, BlockFeatures&^op.feature, func(t *testing.T, b *Block) {
			if st, _ := b.Request(0, op.typ, 0, Segment(0, 1, 0), nil); st != BlkUnsupp {
				t.Errorf("status %d", st)
			}
		})
	}
	runRO("5.2.6.2 a read-only device refuses writes with IOERR", true, BlockFeatures, func(t *testing.T, b *Block) {
		if b.Features&blkReadOnly == 0 {
			t.Error("RO is not offered")
		}
		for name, st := range map[string]func() byte{
			"OUT":          func() byte { s, _ := b.Request(0, BlkOut, 0, pattern(512), nil); return s },
			"DISCARD":      func() byte { s, _ := b.Request(0, BlkDiscard, 0, Segment(0, 1, 0), nil); return s },
			"WRITE_ZEROES": func() byte { s, _ := b.Request(0, BlkWriteZeroes, 0, Segment(0, 1, 0), nil); return s },
		} {
			if s := st(); s != BlkIOErr {
				t.Errorf("%s: status %d", name, s)
			}
		}
		if !bytes.Equal(read(t, b, 0, 512), make([]byte, 512)) {
			t.Error("a refused write changed something")
		}
		if st, _ := b.Request(0, BlkFlush, 0, nil, nil); st != BlkOK {
			t.Errorf("FLUSH: status %d, firmware needs it to succeed", st)
		}
	})
	runRO("5.2.4 CONFIG_WCE switches the cache mode", false, BlockFeatures, func(t *testing.T, b *Block) {
		if b.Features&blkConfigWCE == 0 {
			t.Skip("the device does not offer it")
		}
		for _, v := range []byte{0, 1, 0} {
			b.WriteConfig(32, []byte{v})
			if got := configUint(b, 32, 1); got != uint64(v) {
				t.Errorf("writeback reads %d, written %d", got, v)
			}
			write(t, b, 0, pattern(512))
		}
		c := capacity(b)
		b.WriteConfig(0, []byte{1, 2, 3, 4})
		if capacity(b) != c {
			t.Error("capacity can be written")
		}
		b.SetStatus(0)
		Eventually(t, "status 0", func() bool { return b.Status() == 0 })
		if configUint(b, 32, 1) != 1 {
			t.Error("a reset does not restore write-back")
		}
	})
	run("5.2.5 every queue works", func(t *testing.T, b *Block) {
		for i := range b.Rings {
			p := pattern(512)
			if st, _ := b.Request(i, BlkOut, uint64(i), p, nil); st != BlkOK {
				t.Errorf("queue %d: write: status %d", i, st)
			}
			in := make([]byte, 512)
			if st, _ := b.Request(i, BlkIn, uint64(i), nil, in); st != BlkOK || !bytes.Equal(in, p) {
				t.Errorf("queue %d: read: status %d", i, st)
			}
		}
	})
	for _, f := range []uint64{BlockFeatures, BlockFeatures &^ virtio.FeatureEventIdx} {
		runRO("2.7 many requests in flight", false, f, func(t *testing.T, b *Block) {
			r := b.Rings[0]
			hdr, mem := b.Guest.Alloc(64*32, 16)
			data, dmem := b.Guest.Alloc(64*512, 512)
			want := make([]byte, 20*512)
			for i := range want {
				want[i] = byte(i / 512)
			}
			write(t, b, 0, want)
			for range 50 {
				heads := map[uint16]int{}
				for i := range 20 {
					h := mem[32*i:]
					binary.LittleEndian.PutUint32(h, BlkIn)
					binary.LittleEndian.PutUint64(h[8:], uint64(i))
					h[16] = 0xff
					head, err := r.Add(Buf{Addr: hdr + 32*uint64(i), Len: 16}, Buf{Addr: data + 512*uint64(i), Len: 512, Write: true},
						Buf{Addr: hdr + 32*uint64(i) + 16, Len: 1, Write: true})
					if err != nil {
						t.Fatal(err)
					}
					heads[head] = i
					if i%7 == 0 {
						b.Kick(0)
					}
				}
				b.Kick(0)
				for range 20 {
					head, n := b.Wait(0)
					i, ok := heads[head]
					if !ok || n != 513 || mem[32*i+16] != BlkOK || dmem[512*i] != byte(i) {
						t.Fatalf("head %d (known %v): length %d, status %d, data %d", head, ok, n, mem[32*i+16], dmem[512*i])
					}
					delete(heads, head)
				}
			}
		})
	}
}
