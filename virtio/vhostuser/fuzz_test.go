package vhostuser_test

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/internal/vhostmsg"
	"github.com/moovm/moovm/virtio/vhostuser"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

const (
	fuzzMemory = 64 << 10
	fuzzUser   = 0x7000_0000_0000
)

// Records of a script: the request (1), flags (1), which descriptors (1), the
// length of the payload (1), the payload. Some requests are not messages.
const (
	recKick   = 0xf0 // signals the kick event
	recPoke   = 0xf1 // payload: offset in guest memory (2), bytes
	recShrink = 0xf2 // payload: new size of the memory file in pages (1)
	recYield  = 0xf3
	// payload: offset in the in-flight memory (2), bytes
	recScribble = 0xf4
)

func record(typ, flags, fds byte, p []byte) []byte {
	return append([]byte{typ, flags, fds, byte(len(p))}, p...)
}

// setUp is the script a proper front-end sends to start ring 0.
func setUp(features uint64) []byte {
	le := binary.LittleEndian
	pair := func(a, b uint32) []byte { return le.AppendUint32(le.AppendUint32(nil, a), b) }
	g := virtiotest.NewGuest(fuzzMemory)
	r := virtiotest.NewRing(g, 8, features)
	addr := pair(0, 0)
	for _, a := range []uint64{r.Desc, r.Device, r.Driver, 0} {
		addr = le.AppendUint64(addr, a-virtiotest.GuestBase+fuzzUser)
	}
	inflight := append(make([]byte, 16), 1, 0, 8, 0, 0, 0, 0, 0)
	le.PutUint64(inflight, 4096)
	return bytes.Join([][]byte{
		record(byte(vhostmsg.SetProtocolFeatures), 0, 0, le.AppendUint64(nil, 0xb229)),
		record(byte(vhostmsg.SetOwner), 0, 0, nil),
		record(byte(vhostmsg.SetInflightFD), 8, 3, inflight),
		record(byte(vhostmsg.SetFeatures), 8, 0, le.AppendUint64(nil, features)),
		record(byte(vhostmsg.SetMemTable), 8, 1, vhostmsg.Region{Guest: virtiotest.GuestBase, Size: fuzzMemory, User: fuzzUser}.Append(pair(1, 0))),
		record(byte(vhostmsg.SetVringNum), 0, 0, pair(0, 8)),
		record(byte(vhostmsg.SetVringBase), 0, 0, pair(0, 0)),
		record(byte(vhostmsg.SetVringAddr), 0, 0, addr),
		record(byte(vhostmsg.SetVringCall), 0, 2, make([]byte, 8)),
		record(byte(vhostmsg.SetVringKick), 0, 2, make([]byte, 8)),
		record(byte(vhostmsg.SetVringEnable), 8, 0, pair(0, 1)),
	}, nil)
}

// FuzzMessages sends the server anything: messages with any payload and
// descriptors, over guest memory with any content that may shrink. The server
// ends with its connection, and neither panics nor hangs nor touches what it
// should not.
func FuzzMessages(f *testing.F) {
	dir := f.TempDir()
	base, img := filepath.Join(dir, "base"), filepath.Join(dir, "image.cow")
	want := bytes.Repeat([]byte("base"), 1<<18)
	if err := os.WriteFile(base, want, 0o600); err != nil {
		f.Fatal(err)
	}
	if err := cowdisk.Create(img, cowdisk.CreateOptions{Backing: "base"}); err != nil {
		f.Fatal(err)
	}
	cow, err := cowdisk.Open(img, cowdisk.Options{})
	if err != nil {
		f.Fatal(err)
	}
	// The image's file is as long as the disk: any sector may be in it.
	if _, err := cow.WriteAt(want[:4096], int64(len(want)-4096)); err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		cow.Close()
		if b, err := os.ReadFile(base); err != nil || !bytes.Equal(b, want) {
			f.Errorf("the base image changed (%v)", err)
		}
	})

	g := virtiotest.NewGuest(fuzzMemory)
	r := virtiotest.NewRing(g, 8, 0)
	at, hdr := g.Alloc(64, 64)
	hdr[0] = virtiotest.BlkOut
	r.Add(virtiotest.Buf{Addr: at, Len: 16}, virtiotest.Buf{Addr: at + 512, Len: 512}, virtiotest.Buf{Addr: at + 32, Len: 1, Write: true})
	r.Publish()
	pair := func(a, b uint32) []byte {
		return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, a), b)
	}
	setInflight := record(byte(vhostmsg.SetInflightFD), 8, 3, append(binary.LittleEndian.AppendUint64(nil, inflightSize), 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 16, 0, 0, 0, 0, 0))
	wait := bytes.Repeat(record(recYield, 0, 0, nil), 15)
	start := setUp(virtio.FeatureVersion1 | virtio.FeatureIndirectDesc)
	tail := [][]byte{
		record(recYield, 0, 0, nil),
		record(recKick, 0, 0, nil),
		record(byte(vhostmsg.GetVringBase), 0, 0, pair(0, 0)),
		record(recShrink, 0, 0, []byte{0}),
		record(byte(vhostmsg.GetConfig), 0, 0, append(pair(0, 60), make([]byte, 64)...)),
		record(byte(vhostmsg.AddMemReg), 8, 1, vhostmsg.Region{Guest: 1 << 40, Size: 4096, User: 1 << 46}.Append(make([]byte, 8))),
		record(byte(vhostmsg.RemMemReg), 8, 0, vhostmsg.Region{Guest: 1 << 40, Size: 4096, User: 1 << 46}.Append(make([]byte, 8))),
		record(byte(vhostmsg.ResetDevice), 8, 0, nil),
		record(byte(vhostmsg.GetInflightFD), 0, 0, append(make([]byte, 16), 1, 0, 8, 0, 0, 0, 0, 0)),
		record(recPoke, 0, 0, []byte{0, 0, 1, 2, 3, 4}),
		// The front-end changes what it keeps for the device, whose image has
		// put its name there, and hands it over once more.
		bytes.Join([][]byte{
			record(byte(vhostmsg.GetVringBase), 0, 0, pair(0, 0)), setInflight,
			wait, // until it is done
			record(recScribble, 0, 0, []byte{0, 0x20, 0xff, 0xff, 1, 0, 0, 0x80}), // words
			record(recScribble, 0, 0, []byte{0x40, 0x10, 1}),                      // the summary
			setInflight, wait,
			record(recScribble, 0, 0, []byte{0x40, 0x10, 0xff, 0xff}), // beyond the disk
			setInflight,
		}, nil),
	}
	f.Add(g.Bytes[:4096], start)
	for _, s := range tail {
		f.Add(g.Bytes[:4096], append(bytes.Clone(start), s...))
	}
	f.Add(g.Bytes[:4096], append(bytes.Clone(start), bytes.Join(tail, nil)...))
	f.Add([]byte{}, record(byte(vhostmsg.GetFeatures), 0, 0, nil))

	f.Fuzz(func(t *testing.T, mem, script []byte) {
		guest, err := virtiotest.NewSharedMemory(fuzzMemory)
		if err != nil {
			t.Fatal(err)
		}
		defer guest.Close()
		copy(guest.Bytes, mem)
		small := inflightMemory(t) // for what is in flight, and pending
		defer unix.Close(small)
		ev, err := virtio.NewEvent()
		if err != nil {
			t.Fatal(err)
		}
		defer ev.Close()
		dev := blkDevice(t, virtioblk.Config{Backend: cow, Queues: 2, QueueSize: 16, Workers: 4})
		a, b := socketpair(t)
		wait := serve(t, b, dev, vhostuser.Options{Logger: slog.New(slog.DiscardHandler)})
		go drain(a)
		conn := vhostmsg.Conn{C: a}
		for n := 0; len(script) >= 4 && n < 64; n++ {
			typ, flags, kind, size := script[0], script[1], script[2], int(script[3])
			script = script[4:]
			p := script[:min(size, len(script))]
			script = script[len(p):]
			switch typ {
			case recKick:
				ev.Signal()
				continue
			case recYield:
				time.Sleep(50 * time.Microsecond)
				continue
			case recPoke:
				if len(p) > 2 {
					// By the file, which may have shrunk.
					unix.Pwrite(guest.FD, p[2:], int64(binary.LittleEndian.Uint16(p))%fuzzMemory)
				}
				continue
			case recScribble:
				if len(p) > 2 {
					unix.Pwrite(small, p[2:], int64(binary.LittleEndian.Uint16(p))%inflightSize)
				}
				continue
			case recShrink:
				if len(p) > 0 {
					unix.Ftruncate(guest.FD, int64(p[0])%17*4096)
				}
				continue
			}
			m := vhostmsg.Message{Type: vhostmsg.Type(typ), Reply: flags&4 != 0, NeedReply: flags&8 != 0, Payload: p}
			for range 1 + kind>>4&7 {
				switch kind & 3 {
				case 1:
					m.FDs = append(m.FDs, guest.FD)
				case 2:
					m.FDs = append(m.FDs, ev.FD())
				case 3:
					m.FDs = append(m.FDs, small)
				}
			}
			if conn.Write(&m) != nil {
				break
			}
		}
		a.CloseWrite() // it reads all of it, then the end
		if err := wait(); err != nil && err.Error() == "the server does not end" {
			t.Fatal(err)
		}
		a.Close()
		if n := dev.Stats().InFlight; n > 4 {
			t.Errorf("%d requests in flight", n)
		}
	})
}

const inflightSize = 16 << 10

// inflightMemory is a region as the server makes it: it cannot shrink.
func inflightMemory(t *testing.T) int {
	t.Helper()
	fd, err := unix.MemfdCreate("inflight", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, inflightSize); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK); err != nil {
		t.Fatal(err)
	}
	return fd
}

// drain reads what the server sends, with its descriptors, until the end.
func drain(c *net.UnixConn) {
	conn := vhostmsg.Conn{C: c}
	for {
		var m vhostmsg.Message
		if conn.Read(&m) != nil {
			return
		}
		m.CloseFDs()
	}
}
