package vhostuser_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/internal/vhostmsg"
	"github.com/moovm/moovm/virtio/vhostuser"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// socketpair returns both ends of a connection.
func socketpair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var c [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		n, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		c[i] = n.(*net.UnixConn)
	}
	return c[0], c[1]
}

func blkDevice(t testing.TB, c virtioblk.Config) *virtioblk.Device {
	t.Helper()
	if c.Backend == nil {
		c.Backend = virtioblk.NewRAM(4 << 20)
	}
	d, err := virtioblk.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// serve serves a connection on a goroutine; wait returns how it ended.
func serve(t testing.TB, c *net.UnixConn, dev virtio.Device, o vhostuser.Options) (wait func() error) {
	res := make(chan error, 1)
	go func() { res <- vhostuser.ServeConn(context.Background(), c, dev, o) }()
	return func() error {
		select {
		case err := <-res:
			res <- err
			return err
		case <-time.After(20 * time.Second):
			return errors.New("the server does not end")
		}
	}
}

// connect returns a front-end on a server for dev. Their end is awaited.
func connect(t testing.TB, dev virtio.Device, size int) (*virtiotest.VhostUser, *virtiotest.Guest, func() error) {
	t.Helper()
	mem, err := virtiotest.NewSharedMemory(size)
	if err != nil {
		t.Fatal(err)
	}
	a, b := socketpair(t)
	wait := serve(t, b, dev, vhostuser.Options{})
	v := virtiotest.NewVhostUser(t, a, mem)
	t.Cleanup(func() {
		v.Close()
		wait()
		mem.Close()
	})
	return v, virtiotest.NewGuestOn(mem.Bytes), wait
}

func TestBlockConformance(t *testing.T) {
	virtiotest.BlockConformance(t, func(t *testing.T, g *virtiotest.Guest, ro bool) virtiotest.Transport {
		dev := blkDevice(t, virtioblk.Config{Queues: 3, ReadOnly: ro})
		v, vg, _ := connect(t, dev, len(g.Bytes))
		*g = *vg // memory that can be shared
		return v
	})
}

// The device goes on where it stopped: stop and start lose nothing.
func TestStopStart(t *testing.T) {
	dev := blkDevice(t, virtioblk.Config{Queues: 2})
	v, g, _ := connect(t, dev, 4<<20)
	b := virtiotest.NewBlock(virtiotest.Start(t, v, g, virtiotest.BlockFeatures, 16))
	for range 5 {
		for range 7 {
			if st, _ := b.Request(0, virtiotest.BlkIn, 0, nil, make([]byte, 512)); st != 0 {
				t.Fatal(st)
			}
		}
		n := [4]byte{} // ring 0, disabled
		if err := v.Ack(vhostmsg.SetVringEnable, append(n[:], 0, 0, 0, 0)); err != nil {
			t.Fatal(err)
		}
		if err := v.Ack(vhostmsg.SetVringEnable, append(n[:], 1, 0, 0, 0)); err != nil {
			t.Fatal(err)
		}
		if err := v.Ack(vhostmsg.SetMemTable, v.MemTable(), v.Mem.FD); err != nil { // while running
			t.Fatal(err)
		}
	}
	v.Stop()
	if got := v.Bases(); got[0] != 35 || got[1] != 0 {
		t.Errorf("bases %v, want 35 and 0", got)
	}
}

// Memory regions can come and go one by one.
func TestMemSlots(t *testing.T) {
	dev := blkDevice(t, virtioblk.Config{})
	v, g, wait := connect(t, dev, 4<<20)
	b := virtiotest.NewBlock(virtiotest.Start(t, v, g, virtiotest.BlockFeatures, 16))
	extra, err := virtiotest.NewSharedMemory(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	reg := vhostmsg.Region{Guest: 1 << 40, Size: 1<<20 - 4096, User: 1 << 45, Offset: 4096}
	if err := v.Ack(vhostmsg.AddMemReg, reg.Append(make([]byte, 8)), extra.FD); err != nil {
		t.Fatal(err)
	}
	in := func() (status byte, used uint32) { // a read into the extra region
		hdr, mem := g.Alloc(64, 64)
		mem[32] = 0xff
		used = b.Do(0, virtiotest.Buf{Addr: hdr, Len: 16}, virtiotest.Buf{Addr: 1 << 40, Len: 512, Write: true},
			virtiotest.Buf{Addr: hdr + 32, Len: 1, Write: true})
		return mem[32], used
	}
	b.Request(0, virtiotest.BlkOut, 0, bytes.Repeat([]byte("x"), 512), nil)
	if st, used := in(); st != 0 || used != 513 || !bytes.Equal(extra.Bytes[4096:4608], bytes.Repeat([]byte("x"), 512)) || extra.Bytes[0] != 0 {
		t.Errorf("status %d, used length %d", st, used)
	}
	if err := v.Ack(vhostmsg.AddMemReg, reg.Append(make([]byte, 8)), extra.FD); err == nil {
		t.Error("an overlapping region is accepted")
	}
	if err := wait(); !errors.Is(err, vhostuser.ErrProtocol) || !strings.Contains(err.Error(), "overlap") {
		t.Errorf("the connection ends with %v", err)
	}

	v, g, wait = connect(t, dev, 4<<20)
	b = virtiotest.NewBlock(virtiotest.Start(t, v, g, virtiotest.BlockFeatures, 16))
	if err := v.Ack(vhostmsg.AddMemReg, reg.Append(make([]byte, 8)), extra.FD); err != nil {
		t.Fatal(err)
	}
	if err := v.Ack(vhostmsg.RemMemReg, reg.Append(make([]byte, 8))); err != nil {
		t.Fatal(err)
	}
	if _, used := in(); used != 0 {
		t.Error("a removed region is used")
	}
	if err := v.Ack(vhostmsg.RemMemReg, reg.Append(make([]byte, 8))); err == nil {
		t.Error("a region is removed twice")
	}
	wait()
}

// Bad messages close the connection, with a reason.
func TestBadMessages(t *testing.T) {
	le := binary.LittleEndian
	pair := func(a, b uint32) []byte { return le.AppendUint32(le.AppendUint32(nil, a), b) }
	num := func(v uint64) []byte { return le.AppendUint64(nil, v) }
	reg := func(n uint32, r vhostmsg.Region) []byte { return r.Append(pair(n, 0)) }
	mem, err := virtiotest.NewSharedMemory(64 << 10)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fd := []int{mem.FD}
	feigned, err := unix.MemfdCreate("[eventfd]", unix.MFD_CLOEXEC) // always readable: a ring that kicks itself
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(feigned)
	for name, c := range map[string]struct {
		m    vhostmsg.Message
		want string
	}{
		"unknown":                   {vhostmsg.Message{Type: 99}, "unknown"},
		"request 0":                 {vhostmsg.Message{}, "unknown"},
		"a reply":                   {vhostmsg.Message{Type: vhostmsg.GetFeatures, Reply: true}, "a reply"},
		"features":                  {vhostmsg.Message{Type: vhostmsg.SetFeatures, Payload: num(1 << 63)}, "not offered"},
		"protocol features":         {vhostmsg.Message{Type: vhostmsg.SetProtocolFeatures, Payload: num(1 << 63)}, "not offered"},
		"short":                     {vhostmsg.Message{Type: vhostmsg.SetFeatures, Payload: []byte{1}}, "payload"},
		"empty":                     {vhostmsg.Message{Type: vhostmsg.SetVringAddr}, "payload"},
		"ring 9":                    {vhostmsg.Message{Type: vhostmsg.SetVringNum, Payload: pair(9, 8)}, "ring 9"},
		"ring 2^32-1":               {vhostmsg.Message{Type: vhostmsg.GetVringBase, Payload: pair(^uint32(0), 8)}, "ring 4294967295"},
		"kick of ring 9":            {vhostmsg.Message{Type: vhostmsg.SetVringKick, Payload: num(9), FDs: fd}, "ring 9"},
		"ring size 0":               {vhostmsg.Message{Type: vhostmsg.SetVringNum, Payload: pair(0, 0)}, "size 0"},
		"ring size 65536":           {vhostmsg.Message{Type: vhostmsg.SetVringNum, Payload: pair(0, 65536)}, "size 65536"},
		"base":                      {vhostmsg.Message{Type: vhostmsg.SetVringBase, Payload: pair(0, 65536)}, "base"},
		"kick without a descriptor": {vhostmsg.Message{Type: vhostmsg.SetVringKick, Payload: num(0)}, "0 descriptors"},
		"kick by polling":           {vhostmsg.Message{Type: vhostmsg.SetVringKick, Payload: num(1 << 8)}, "polling"},
		"kick is a memfd":           {vhostmsg.Message{Type: vhostmsg.SetVringKick, Payload: num(0), FDs: fd}, "no eventfd"},
		"kick feigns an eventfd":    {vhostmsg.Message{Type: vhostmsg.SetVringKick, Payload: num(0), FDs: []int{feigned}}, "no eventfd"},
		"call is a device":          {vhostmsg.Message{Type: vhostmsg.SetVringCall, Payload: num(0), FDs: []int{int(null.Fd())}}, "no eventfd"},
		"no memory descriptors":     {vhostmsg.Message{Type: vhostmsg.SetMemTable, Payload: reg(1, vhostmsg.Region{Size: 4096})}, "0 descriptors"},
		"too many regions":          {vhostmsg.Message{Type: vhostmsg.SetMemTable, Payload: pair(9, 0)}, "9 memory regions"},
		"regions cut off":           {vhostmsg.Message{Type: vhostmsg.SetMemTable, Payload: pair(2, 0), FDs: fd}, "2 memory regions"},
		"region of 0 bytes":         {vhostmsg.Message{Type: vhostmsg.SetMemTable, Payload: reg(1, vhostmsg.Region{}), FDs: fd}, "empty"},
		"region unaligned":          {vhostmsg.Message{Type: vhostmsg.SetMemTable, Payload: reg(1, vhostmsg.Region{Size: 100}), FDs: fd}, "pages"},
		"region beyond the file":    {vhostmsg.Message{Type: vhostmsg.SetMemTable, Payload: reg(1, vhostmsg.Region{Size: 128 << 10}), FDs: fd}, "beyond the end"},
		"offset beyond the file":    {vhostmsg.Message{Type: vhostmsg.SetMemTable, Payload: reg(1, vhostmsg.Region{Size: 4096, Offset: 64 << 10}), FDs: fd}, "beyond the end"},
		"offset overflows":          {vhostmsg.Message{Type: vhostmsg.SetMemTable, Payload: reg(1, vhostmsg.Region{Size: 4096, Offset: ^uint64(4095)}), FDs: fd}, "too large"},
		"address overflows":         {vhostmsg.Message{Type: vhostmsg.SetMemTable, Payload: reg(1, vhostmsg.Region{Size: 8192, Guest: ^uint64(4095)}), FDs: fd}, "too large"},
		"a device for memory":       {vhostmsg.Message{Type: vhostmsg.AddMemReg, Payload: reg(0, vhostmsg.Region{Size: 4096}), FDs: []int{int(null.Fd())}}, "mapping"},
		"unknown region":            {vhostmsg.Message{Type: vhostmsg.RemMemReg, Payload: reg(0, vhostmsg.Region{Size: 4096})}, "no memory region"},
		"config cut off":            {vhostmsg.Message{Type: vhostmsg.SetConfig, Payload: append(pair(0, 8), make([]byte, 6)...)}, "configuration space"},
		"in flight: 0 queues":       {vhostmsg.Message{Type: vhostmsg.GetInflightFD, Payload: make([]byte, 24)}, "0 queues"},
		"in flight: too small":      {vhostmsg.Message{Type: vhostmsg.SetInflightFD, Payload: append(make([]byte, 16), 1, 0, 0, 1, 0, 0, 0, 0), FDs: fd}, "do not hold"},
		"in flight: offset": {vhostmsg.Message{Type: vhostmsg.SetInflightFD, Payload: append(append(num(8192), num(^uint64(4095))...), 1, 0, 16, 0, 0, 0, 0, 0), FDs: fd},
			"do not hold"},
		"back-end channel": {vhostmsg.Message{Type: vhostmsg.SetBackendReqFD, FDs: fd}, "no stream socket"},
		"log":              {vhostmsg.Message{Type: 6, Payload: make([]byte, 16), FDs: fd}, "unknown"},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := socketpair(t)
			defer a.Close()
			wait := serve(t, b, blkDevice(t, virtioblk.Config{Queues: 2}), vhostuser.Options{})
			conn := vhostmsg.Conn{C: a}
			if err := conn.Write(&c.m); err != nil {
				t.Fatal(err)
			}
			if err := wait(); !errors.Is(err, vhostuser.ErrProtocol) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("ended with %v, want a protocol error about %q", err, c.want)
			}
		})
	}
	for name, raw := range map[string][]byte{
		"version 2":         {1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0},
		"huge payload":      {1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x80},
		"a header cut off":  {1, 0, 0, 0, 1, 0},
		"a payload cut off": {2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := socketpair(t)
			wait := serve(t, b, blkDevice(t, virtioblk.Config{}), vhostuser.Options{})
			a.Write(raw)
			a.Close()
			if err := wait(); !errors.Is(err, vhostuser.ErrProtocol) {
				t.Errorf("ended with %v", err)
			}
		})
	}
}

// What each request must bring: a byte or a descriptor less is no request.
func TestRequestShapes(t *testing.T) {
	for m, shape := range map[vhostmsg.Type]struct{ size, fds int }{
		vhostmsg.SetFeatures: {8, 0}, vhostmsg.SetProtocolFeatures: {8, 0}, vhostmsg.SetStatus: {8, 0},
		vhostmsg.SetMemTable: {8, 0}, vhostmsg.AddMemReg: {40, 1}, vhostmsg.RemMemReg: {40, 0},
		vhostmsg.GetConfig: {12, 0}, vhostmsg.SetConfig: {12, 0}, vhostmsg.SetBackendReqFD: {0, 1},
		vhostmsg.GetInflightFD: {20, 0}, vhostmsg.SetInflightFD: {20, 1},
		vhostmsg.SetVringNum: {8, 0}, vhostmsg.SetVringBase: {8, 0}, vhostmsg.GetVringBase: {8, 0},
		vhostmsg.SetVringAddr: {40, 0}, vhostmsg.SetVringEnable: {8, 0},
		vhostmsg.SetVringKick: {8, 1}, vhostmsg.SetVringCall: {8, 1}, vhostmsg.SetVringErr: {8, 1},
	} {
		t.Run(m.String(), func(t *testing.T) {
			ends := func(size int, want string) {
				a, b := socketpair(t)
				defer a.Close()
				wait := serve(t, b, blkDevice(t, virtioblk.Config{}), vhostuser.Options{})
				conn := vhostmsg.Conn{C: a}
				if err := conn.Write(&vhostmsg.Message{Type: m, Payload: make([]byte, size)}); err != nil {
					t.Fatal(err)
				}
				if err := wait(); !errors.Is(err, vhostuser.ErrProtocol) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), m.String()) {
					t.Errorf("%d bytes: ended with %v, want a protocol error about %q", size, err, want)
				}
			}
			if shape.size > 0 {
				ends(shape.size-1, "bytes of payload")
			}
			if shape.fds > 0 {
				ends(shape.size, "0 descriptors, want 1")
			}
		})
	}
}

// A ring outside the memory the front-end gave is a lie of its own.
func TestRingOutsideMemory(t *testing.T) {
	v, g, wait := connect(t, blkDevice(t, virtioblk.Config{}), 4<<20)
	virtiotest.Start(t, v, g, virtiotest.BlockFeatures, 16)
	if err := v.Ack(vhostmsg.SetVringAddr, ringAddr(0, 0x1000, 0x1000, 0x1000)); err == nil {
		t.Error("accepted")
	}
	if err := wait(); !errors.Is(err, vhostuser.ErrProtocol) {
		t.Errorf("ended with %v", err)
	}
}

// Guest memory that is taken away ends the ring with an error, not the process.
func TestShrunkenMemory(t *testing.T) {
	for _, file := range []bool{false, true} {
		cfg := virtioblk.Config{}
		if file { // the kernel notices, not we
			path := filepath.Join(t.TempDir(), "disk")
			if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := virtioblk.OpenFile(path, false)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			cfg.Backend = f
		}
		v, g, wait := connect(t, blkDevice(t, cfg), 4<<20)
		b := virtiotest.NewBlock(virtiotest.Start(t, v, g, virtiotest.BlockFeatures, 16))
		if st, _ := b.Request(0, virtiotest.BlkIn, 0, nil, make([]byte, 512)); st != 0 {
			t.Fatal(st)
		}
		// The data buffers go, the rings stay.
		if err := unix.Ftruncate(v.Mem.FD, 64<<10); err != nil {
			t.Fatal(err)
		}
		hdr := uint64(virtiotest.GuestBase + 32<<10)
		mem := v.Mem.Bytes[32<<10:]
		clear(mem[:64])
		mem[32] = 0xff
		b.Rings[0].Add(virtiotest.Buf{Addr: hdr, Len: 16}, virtiotest.Buf{Addr: virtiotest.GuestBase + 2<<20, Len: 512, Write: true},
			virtiotest.Buf{Addr: hdr + 32, Len: 1, Write: true})
		b.Kick(0)
		if file {
			b.Wait(0)
			if mem[32] != virtiotest.BlkIOErr {
				t.Errorf("status %d", mem[32])
			}
		} else {
			// The ring has stopped by itself.
			if _, _, err := v.Call(vhostmsg.GetVringBase, make([]byte, 8)); err != nil {
				t.Error(err)
			}
		}
		// Then everything.
		if err := unix.Ftruncate(v.Mem.FD, 0); err != nil {
			t.Fatal(err)
		}
		if file {
			v.Notify(0)
			if _, _, err := v.Call(vhostmsg.GetVringBase, make([]byte, 8)); err != nil {
				t.Error(err)
			}
		}
		v.Conn.C.Close()
		if err := wait(); err != nil {
			t.Errorf("ended with %v", err)
		}
		if err := unix.Ftruncate(v.Mem.FD, 4<<20); err != nil {
			t.Fatal(err)
		}
	}
}

// A back-end that dies with requests in flight is continued by the next one:
// none is lost, none is done twice.
func TestInflight(t *testing.T) {
	mem, err := virtiotest.NewSharedMemory(4 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	g := virtiotest.NewGuestOn(mem.Bytes)
	gate := make(chan struct{})
	entered := make(chan int64, 64)
	hang := &virtioblk.Faulty{Backend: virtioblk.NewRAM(1 << 20), Before: func(op virtioblk.Op, off, n int64) error {
		if off/512%2 == 1 { // odd sectors do not come back
			entered <- off / 512
			<-gate
		}
		return nil
	}}
	a, b := socketpair(t)
	first := serve(t, b, blkDevice(t, virtioblk.Config{Backend: hang}), vhostuser.Options{CloseWait: time.Millisecond})
	v := virtiotest.NewVhostUser(t, a, mem)
	defer v.Close()
	d := virtiotest.Start(t, v, g, virtiotest.BlockFeatures, 16)
	status := map[uint16][]byte{}
	sector := map[uint16]uint64{}
	add := func(s uint64) {
		addr, m := g.Alloc(1024, 1024)
		binary.LittleEndian.PutUint64(m[8:], s)
		m[16] = 0xff
		head, err := d.Rings[0].Add(virtiotest.Buf{Addr: addr, Len: 16}, virtiotest.Buf{Addr: addr + 512, Len: 512, Write: true},
			virtiotest.Buf{Addr: addr + 16, Len: 1, Write: true})
		if err != nil {
			t.Fatal(err)
		}
		status[head], sector[head] = m[16:17], s
		d.Kick(0)
	}
	take := func() {
		t.Helper()
		head, _ := d.Wait(0)
		if st := status[head]; st == nil || st[0] != 0 {
			t.Fatalf("head %d (sector %d) came back with status %v", head, sector[head], st)
		}
		delete(status, head)
	}
	add(1)
	add(2)
	add(3)
	add(4)
	<-entered
	<-entered
	take() // 2 and 4, while 1 and 3 hang
	take()
	// It dies: nothing it still does reaches the ring.
	v.Conn.C.Close()
	if err := first(); !errors.Is(err, vhostuser.ErrStuck) {
		t.Fatalf("the first ended with %v", err)
	}
	add(6) // arrives while nobody is there

	var mu sync.Mutex
	var order []int64
	rec := &virtioblk.Faulty{Backend: virtioblk.NewRAM(1 << 20), Before: func(op virtioblk.Op, off, n int64) error {
		mu.Lock()
		defer mu.Unlock()
		order = append(order, off/512)
		return nil
	}}
	a, b = socketpair(t)
	second := serve(t, b, blkDevice(t, virtioblk.Config{Backend: rec, Workers: 1}), vhostuser.Options{})
	v.Reconnect(a)
	for range 3 {
		take()
	}
	if len(status) != 0 {
		t.Errorf("lost: %v", status)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(order) != 3 || order[0] != 1 || order[1] != 3 || order[2] != 6 {
		t.Errorf("the second back-end did %v, want 1 3 6", order)
	}
	v.Stop()
	if got := v.Bases(); got[0] != 5 {
		t.Errorf("base %d, want 5", got[0])
	}
	v.Conn.C.Close()
	if err := second(); err != nil {
		t.Error(err)
	}
	close(gate)
}

// A backend that hangs does not hold up the end of the server, not even while a
// message waits for it.
func TestServerStopsWithHangingBackend(t *testing.T) {
	gate, entered := make(chan struct{}), make(chan struct{}, 1)
	hang := &virtioblk.Faulty{Backend: virtioblk.NewRAM(1 << 20), Before: func(virtioblk.Op, int64, int64) error {
		entered <- struct{}{}
		<-gate
		return nil
	}}
	mem, err := virtiotest.NewSharedMemory(4 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	a, b := socketpair(t)
	done := make(chan error, 1)
	go func() {
		done <- vhostuser.ServeConn(ctx, b, blkDevice(t, virtioblk.Config{Backend: hang}), vhostuser.Options{CloseWait: time.Millisecond})
	}()
	v := virtiotest.NewVhostUser(t, a, mem)
	defer v.Close()
	d := virtiotest.Start(t, v, virtiotest.NewGuestOn(mem.Bytes), virtiotest.BlockFeatures, 16)
	addr, m := d.Guest.Alloc(64, 64)
	m[0] = virtiotest.BlkFlush
	d.Rings[0].Add(virtiotest.Buf{Addr: addr, Len: 16}, virtiotest.Buf{Addr: addr + 16, Len: 1, Write: true})
	d.Kick(0)
	<-entered
	if err := v.Send(&vhostmsg.Message{Type: vhostmsg.GetVringBase, Payload: make([]byte, 8)}); err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, vhostuser.ErrStuck) {
			t.Errorf("ended with %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the server does not end")
	}
	close(gate)
}

// A new size is announced on the back-end channel.
func TestConfigChange(t *testing.T) {
	ram := virtioblk.NewRAM(1 << 20)
	dev := blkDevice(t, virtioblk.Config{Backend: ram})
	v, g, _ := connect(t, dev, 4<<20)
	mine, theirs := socketpair(t)
	defer mine.Close()
	f, err := theirs.File()
	if err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	if err := v.Ack(vhostmsg.SetBackendReqFD, nil, int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	f.Close()
	virtiotest.Start(t, v, g, virtiotest.BlockFeatures, 16)
	ram.Resize(2 << 20)
	if err := dev.Resized(); err != nil {
		t.Fatal(err)
	}
	var m vhostmsg.Message
	if err := (&vhostmsg.Conn{C: mine}).Read(&m); err != nil || m.Type != vhostmsg.BackendConfigChange {
		t.Fatalf("%v, %v", m.Type, err)
	}
	var c [8]byte
	v.ReadConfig(0, c[:])
	if n := binary.LittleEndian.Uint64(c[:]); n != 2<<20/512 {
		t.Errorf("capacity %d", n)
	}
}

func TestListenAndServe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := vhostuser.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- vhostuser.Serve(ctx, l, blkDevice(t, virtioblk.Config{}), vhostuser.Options{}) }()
	for range 3 { // one after the other
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		mem, err := virtiotest.NewSharedMemory(4 << 20)
		if err != nil {
			t.Fatal(err)
		}
		v := virtiotest.NewVhostUser(t, c, mem)
		b := virtiotest.NewBlock(virtiotest.Start(t, v, virtiotest.NewGuestOn(mem.Bytes), virtiotest.BlockFeatures, 16))
		if st, _ := b.Request(0, virtiotest.BlkFlush, 0, nil, nil); st != 0 {
			t.Error(st)
		}
		v.Close()
		mem.Close()
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
