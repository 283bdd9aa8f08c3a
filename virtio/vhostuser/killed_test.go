package vhostuser_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/virtio/vhostuser"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

// A server of an overlay is killed after writes that had completed and that
// nobody had flushed: the next one still has them all, and the image has them
// once it has flushed. What a first write made of the overlay lives in the
// front-end's memory meanwhile.
func TestOverlayServerKilled(t *testing.T) {
	const size, block = 8 << 20, 4096
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	want := make([]byte, size)
	rng := rand.New(rand.NewSource(1))
	rng.Read(want)
	if err := os.WriteFile(base, want, 0o600); err != nil {
		t.Fatal(err)
	}
	overlayOn(t, dir, base).Close()
	img := filepath.Join(dir, "overlay.cow")
	d := startDaemon(t, "cow", img, 1)

	mem, err := virtiotest.NewSharedMemory(4 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	v := virtiotest.NewVhostUser(t, dial(t, d.sock), mem)
	defer v.Close()
	b := virtiotest.NewBlock(virtiotest.Start(t, v, virtiotest.NewGuestOn(mem.Bytes), virtiotest.BlockFeatures, 16))
	request := func(typ uint32, off int, out, in []byte) {
		t.Helper()
		if st, _ := b.Request(0, typ, uint64(off/512), out, in); st != 0 {
			t.Fatalf("request %d at %d: status %d", typ, off, st)
		}
	}
	compare := func() {
		t.Helper()
		got := make([]byte, 64<<10)
		for off := 0; off < size; off += len(got) {
			request(virtiotest.BlkIn, off, nil, got)
			if !bytes.Equal(got, want[off:off+len(got)]) {
				t.Fatalf("after %d kills the disk differs within 64 KiB of %#x", d.kills, off)
			}
		}
	}
	for round := range 4 {
		for range 50 {
			off := rng.Intn(size/block) * block
			rng.Read(want[off : off+block])
			request(virtiotest.BlkOut, off, want[off:off+block], nil)
		}
		zeroes := rng.Intn(size/block-16) * block
		clear(want[zeroes:][:16*block])
		request(virtiotest.BlkWriteZeroes, 0, virtiotest.Segment(uint64(zeroes/512), 16*block/512, 1), nil)
		if round == 1 {
			request(virtiotest.BlkFlush, 0, nil, nil)
		}
		d.kill()
		before := v.QueueInterrupts(0)
		v.Reconnect(dial(t, d.sock))
		// The one that was killed may have owed it to the driver.
		virtiotest.Eventually(t, "an interrupt without a new request", func() bool { return v.QueueInterrupts(0) > before })
		compare()
	}
	request(virtiotest.BlkFlush, 0, nil, nil)
	d.cmd.Process.Kill()
	d.cmd.Wait()
	disk, err := cowdisk.Open(img, cowdisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	got := make([]byte, size)
	if _, err := disk.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the image lacks what was flushed")
	}
}

// slowPending is a backend with pending state whose flushes take as long as
// gate is open.
type slowPending struct {
	*virtioblk.RAM
	entered, gate chan struct{}
	mem           atomic.Int64 // length of what is shared
}

func (s *slowPending) PendingLen() int64 { return 100 }

func (s *slowPending) SharePending(mem []byte) error {
	if mem == nil {
		close(s.entered)
		<-s.gate
	}
	s.mem.Store(int64(len(mem)))
	return nil
}

// A flush at the end of a connection may take longer than CloseWait; the end of
// the server does not wait for it for ever.
func TestSlowFlushAtHangUp(t *testing.T) {
	for _, ends := range []bool{false, true} {
		s := &slowPending{RAM: virtioblk.NewRAM(1 << 20), entered: make(chan struct{}), gate: make(chan struct{})}
		mem, err := virtiotest.NewSharedMemory(4 << 20)
		if err != nil {
			t.Fatal(err)
		}
		defer mem.Close()
		a, b := socketpair(t)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		served := make(chan error, 1)
		go func() {
			served <- vhostuser.ServeConn(ctx, b, blkDevice(t, virtioblk.Config{Backend: s}), vhostuser.Options{CloseWait: 10 * time.Millisecond})
		}()
		v := virtiotest.NewVhostUser(t, a, mem)
		virtiotest.Start(t, v, virtiotest.NewGuestOn(mem.Bytes), virtiotest.BlockFeatures, 16)
		virtiotest.Eventually(t, "the device to use the region", func() bool { return s.mem.Load() == 100 })
		v.Close()
		<-s.entered
		if ends {
			cancel()
			if err := <-served; !errors.Is(err, vhostuser.ErrStuck) {
				t.Errorf("a server that was stopped meanwhile: %v", err)
			}
			close(s.gate)
			virtiotest.Eventually(t, "the flush to end", func() bool { return s.mem.Load() == 0 })
			continue
		}
		select {
		case err := <-served:
			t.Errorf("the server did not wait for the flush: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
		close(s.gate)
		if err := <-served; err != nil || s.mem.Load() != 0 {
			t.Errorf("%v, %d bytes are still shared", err, s.mem.Load())
		}
	}
}
