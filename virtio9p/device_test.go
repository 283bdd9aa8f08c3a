package virtio9p_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/hugelgupf/p9/fsimpl/staticfs"
	fstest "github.com/hugelgupf/p9/fsimpl/test"
	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
	"go.uber.org/goleak"

	"github.com/moovm/moovm/virtio9p"
	"github.com/moovm/moovm/virtio9p/fence"
	"github.com/moovm/moovm/virtio9p/virtio9ptest"
	"github.com/moovm/moovm/virtio9p/virtio9ptest/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var content = func() string {
	var b strings.Builder
	for i := 0; b.Len() < 700_000; i++ {
		fmt.Fprintf(&b, "line %d\n", i)
	}
	return b.String()
}()

func static(t testing.TB) p9.Attacher {
	t.Helper()
	a, err := staticfs.New(staticfs.WithFile("hello", "Hello, guest.\n"), staticfs.WithFile("long", content))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func device(t testing.TB, a p9.Attacher) *virtio9p.Device {
	t.Helper()
	d, err := virtio9p.New(virtio9p.Config{Tag: "moovm", Attacher: a})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

var layouts = map[string]virtio9ptest.Layout{
	"whole":           virtio9ptest.Whole,
	"zero-copy":       virtio9ptest.ZeroCopy,
	"zero-copy-write": virtio9ptest.ZeroCopyWrite,
	"splinters":       virtio9ptest.Splinters,
}

func TestNew(t *testing.T) {
	a := static(t)
	for _, tag := range []string{"", strings.Repeat("x", 33), "a/b", "a\x00"} {
		if _, err := virtio9p.New(virtio9p.Config{Tag: tag, Attacher: a}); !errors.Is(err, virtio9p.ErrTag) {
			t.Errorf("tag %q: %v", tag, err)
		}
	}
	if _, err := virtio9p.New(virtio9p.Config{Tag: "x"}); !errors.Is(err, virtio9p.ErrAttacher) {
		t.Errorf("no attacher: %v", err)
	}
}

func TestConfigSpace(t *testing.T) {
	d := device(t, static(t))
	if d.ID() != 9 || d.Features() != 1 || len(d.QueueSizes()) != 1 || d.QueueSizes()[0] != 128 {
		t.Errorf("ID %d, features %#x, queues %v", d.ID(), d.Features(), d.QueueSizes())
	}
	want := []byte("\x05\x00moovm\x00\x00\x00")
	d.WriteConfig(0, []byte("xxxx"))
	for off := range want {
		for n := range len(want) - off {
			got := bytes.Repeat([]byte{0xaa}, n)
			d.ReadConfig(uint32(off), got)
			if !bytes.Equal(got, want[off:off+n]) {
				t.Errorf("config at %d: %q", off, got)
			}
		}
	}
	got := []byte{1, 2}
	d.ReadConfig(1<<32-1, got)
	if !bytes.Equal(got, []byte{0, 0}) {
		t.Errorf("config at the end: %v", got)
	}
}

// The library's own suite, through descriptors of every layout.
func TestFileSuite(t *testing.T) {
	for name, layout := range layouts {
		t.Run(name, func(t *testing.T) {
			c := virtio9ptest.Start(t, device(t, static(t)), 8192, layout).Client()
			fstest.TestReadOnlyFS(t, clientAttacher{c}, fstest.WithDir("", "hello", "long"),
				fstest.WithFile("hello", "Hello, guest.\n", p9.Attr{Mode: p9.ModeRegular | 0o666, Size: 14}, p9.AttrMask{Mode: true, Size: true}),
				fstest.WithFile("long", content, p9.Attr{Mode: p9.ModeRegular | 0o666, Size: uint64(len(content))}, p9.AttrMask{Mode: true, Size: true}))
		})
	}
}

type clientAttacher struct{ c *p9.Client }

func (a clientAttacher) Attach() (p9.File, error) { return a.c.Attach("") }

// What Linux sends to mount, list, read and unmount, and the used lengths.
func TestLinuxSession(t *testing.T) {
	for name, layout := range layouts {
		t.Run(name, func(t *testing.T) {
			dev := device(t, static(t))
			d := virtio9ptest.Start(t, dev, fence.DefaultMsize, layout)
			do := func(msg []byte, room int) wire.Reply {
				t.Helper()
				r, err := wire.Parse(d.Do(msg, room)) // so the used length is exact
				if err != nil {
					t.Fatal(err)
				}
				return r
			}
			const page = 4096
			if r := do(wire.Version(512000), page); !bytes.Equal(r.Body, wire.Version(512000)[7:]) {
				t.Fatalf("Rversion %q", r.Body)
			}
			n := uint64(len(wire.Version(512000)))
			if s := dev.Stats(); s != (virtio9p.Stats{Tag: "moovm", Requests: 1, RequestBytes: n, ReplyBytes: n}) {
				t.Errorf("after one request and its reply of %d bytes: %+v", n, s)
			}
			do(wire.Attach(0, 0), page)
			if r := do(wire.Msg(wire.Tstatfs, 0, uint32(0)), page); len(r.Body) != 60 {
				t.Errorf("Rstatfs of %d bytes", len(r.Body))
			}
			if r := do(wire.Getattr(0, 0), page); len(r.Body) != 153 {
				t.Errorf("Rgetattr of %d bytes", len(r.Body))
			}
			if r := do(wire.Msg(wire.Txattrwalk, 0, uint32(0), uint32(9), "security.capability"), page); r.Errno() != int(linux.EOPNOTSUPP) {
				t.Errorf("Txattrwalk: errno %d", r.Errno())
			}
			// getdents: clone, open, read until nothing comes, clunk.
			do(wire.Walk(0, 0, 1), page)
			do(wire.Open(0, 1, 0o200000|0o2000000), page)
			var names []string
			var cookie uint64
			for {
				ds := wire.Dirents(do(wire.Readdir(0, 1, cookie, 511976), 511976+11).Data())
				if len(ds) == 0 {
					break
				}
				for _, e := range ds {
					names = append(names, e.Name)
					cookie = e.Offset
				}
			}
			if fmt.Sprint(names) != "[hello long]" {
				t.Errorf("names %v", names)
			}
			do(wire.Clunk(0, 1), page)
			// open, read, close
			do(wire.Walk(0, 0, 2, "long"), page)
			do(wire.Walk(0, 2, 3), page)
			do(wire.Open(0, 3, 0o100000), page)
			var got []byte
			for {
				b := do(wire.Read(0, 3, uint64(len(got)), 511976), 511976+11).Data()
				if len(b) == 0 {
					break
				}
				got = append(got, b...)
			}
			if string(got) != content {
				t.Errorf("read %d bytes that are not those of the file", len(got))
			}
			do(wire.Clunk(0, 3), page)
			// An error in the 11 bytes of a zero-copy read's reply header.
			if r := do(wire.Read(0, 3, 0, 4096), 11); r.Errno() != int(linux.EBADF) {
				t.Errorf("errno %d", r.Errno())
			}
			do(wire.Clunk(0, 2), page)
			do(wire.Clunk(0, 0), page)
		})
	}
}

// Whatever arrives, its chain comes back, and a reset ends everything.
func TestHostileChains(t *testing.T) {
	d := virtio9ptest.Start(t, device(t, static(t)), 8192, virtio9ptest.Splinters)
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range 30 {
		d.Do(wire.Version(8192), 100)
		d.Do(wire.Attach(1, 0), 100)
		for range 30 {
			var msg []byte
			switch rng.IntN(3) {
			case 0:
				msg = make([]byte, 1+rng.IntN(100))
				for i := range msg {
					msg[i] = byte(rng.Uint32())
				}
			case 1:
				msg = wire.Read(1, uint32(rng.IntN(3)), rng.Uint64(), rng.Uint32())
			case 2:
				msg = wire.Walk(1, 0, uint32(rng.IntN(5)), "long")
				msg = msg[:1+rng.IntN(len(msg))]
			}
			room := 1 + rng.IntN(200)
			b := d.Do(msg, room)
			if len(b) == 0 {
				continue
			}
			if _, err := wire.Parse(b); err != nil {
				t.Errorf("%x: %v", msg, err)
			}
		}
		if round%5 == 4 {
			d.Restart()
			if r, err := wire.Parse(d.Do(wire.Getattr(1, 0), 200)); err != nil || r.Errno() == 0 {
				t.Errorf("after a reset a fid is still there: %+v, %v", r, err)
			}
		}
	}
}

// A reset in the middle of requests returns each chain once and leaves nothing.
func TestResetUnderLoad(t *testing.T) {
	d := virtio9ptest.Start(t, device(t, static(t)), 65536, virtio9ptest.Splinters)
	for range 10 {
		d.Do(wire.Version(65536), 100)
		d.Do(wire.Attach(1, 0), 100)
		d.Do(wire.Walk(2, 0, 1, "long"), 100)
		d.Do(wire.Open(3, 1, 0), 100)
		for tag := range uint16(20) {
			if err := d.Send(wire.Read(tag, 1, 0, 60000), 60011, func([]byte) {}); err != nil {
				t.Fatal(err)
			}
		}
		d.Restart()
	}
}

func TestConcurrentReaders(t *testing.T) {
	c := virtio9ptest.Start(t, device(t, static(t)), 65536, virtio9ptest.Whole).Client()
	root, err := c.Attach("")
	if err != nil {
		t.Fatal(err)
	}
	errs := make(chan error)
	for range 16 {
		go func() {
			_, f, err := root.Walk([]string{"long"})
			if err == nil {
				_, _, err = f.Open(p9.ReadOnly)
			}
			if err == nil {
				var b []byte
				b, err = io.ReadAll(io.NewSectionReader(f, 0, 1<<62))
				if err == nil && string(b) != content {
					err = fmt.Errorf("%d bytes that are not those of the file", len(b))
				}
				f.Close()
			}
			errs <- err
		}()
	}
	for range 16 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func BenchmarkRead(b *testing.B) {
	d := virtio9ptest.Start(b, device(b, static(b)), fence.DefaultMsize, virtio9ptest.ZeroCopy)
	d.Do(wire.Version(fence.DefaultMsize), 100)
	d.Do(wire.Attach(1, 0), 100)
	d.Do(wire.Walk(1, 0, 1, "long"), 100)
	d.Do(wire.Open(1, 1, 0), 100)
	b.SetBytes(500_000)
	for b.Loop() {
		d.Do(wire.Read(1, 1, 0, 500_000), 500_011)
	}
}
