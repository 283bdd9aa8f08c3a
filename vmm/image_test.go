package vmm

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func newTestRAM(t testing.TB, size int64) *ram {
	t.Helper()
	r, err := newRAM(size, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func freezeRAM(t testing.TB, r *ram) *image {
	t.Helper()
	im, err := r.freeze()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { im.release() })
	return im
}

func ramFrom(t testing.TB, im *image) *ram {
	t.Helper()
	r, err := reserveRAM(im.size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	if err := r.show(im); err != nil {
		t.Fatal(err)
	}
	return r
}

func word(t testing.TB, r *ram, addr uint64) uint64 {
	t.Helper()
	var b [8]byte
	if err := r.mem.Read(addr, b[:]); err != nil {
		t.Fatal(err)
	}
	var v uint64
	for i, c := range b {
		v |= uint64(c) << (8 * i)
	}
	return v
}

// checkingGuest counts in a word and looks whether it reads what it wrote; if
// it does not, it says LOST and ends.
func checkingGuest() asm {
	// again: inc rcx; mov [rbx], rcx; mov rax, [rbx]; cmp rax, rcx; je again
	return asm{}.print("!").bytes(0xbb, 0, 0, 0x20, 0, 0x31, 0xc9,
		0x48, 0xff, 0xc1, 0x48, 0x89, 0x0b, 0x48, 0x8b, 0x03, 0x48, 0x39, 0xc8, 0x74, 0xf2).print("LOST").powerOff()
}

const countedAt = 0x20_0000

// TestKVMFollowsRemapping is what forks stand on: where memory is moved away
// and mapped privately under a running guest, without a word to KVM, the guest
// goes on with what was there, and the frozen file gets nothing more.
func TestKVMFollowsRemapping(t *testing.T) {
	for range times(8, 200) {
		m, out := newMachine(t, checkingGuest())
		if err := m.Start(); err != nil {
			t.Fatal(err)
		}
		out.waitFor(t, "!")
		progress := func() {
			t.Helper()
			n := word(t, m.ram, countedAt)
			eventually(t, "progress", func() bool { return word(t, m.ram, countedAt) != n })
		}
		progress()
		im := freezeRAM(t, m.ram)
		m.ram.later.Wait()
		if m.ram.sealErr != nil {
			t.Fatalf("the frozen memory can still be written to: %v", m.ram.sealErr)
		}
		twin := ramFrom(t, im)
		frozen := word(t, twin, countedAt)
		for range 5 {
			progress()
		}
		if got := word(t, twin, countedAt); got != frozen || frozen == 0 {
			t.Errorf("the frozen word went from %d to %d", frozen, got)
		}
		m.Stop()
		m.Wait()
		if out.String() != "!" {
			t.Fatalf("the guest does not read what it wrote: %q", out)
		}
	}
}

// TestKVMFollowsPausedMachine remaps a machine that stands still hundreds of
// times, each way there is, between bursts of running.
func TestKVMFollowsPausedMachine(t *testing.T) {
	m, out := newMachine(t, checkingGuest())
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "!")
	for i := range 200 {
		if err := m.Pause(); err != nil {
			t.Fatal(err)
		}
		before := word(t, m.ram, countedAt)
		im, err := m.ram.freeze()
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if err := m.ram.show(im); err != nil { // as a rewind to it does
				t.Fatal(err)
			}
		}
		if err := im.release(); err != nil {
			t.Fatal(err)
		}
		if after := word(t, m.ram, countedAt); after != before {
			t.Fatalf("the word went from %d to %d while the machine stood still", before, after)
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "progress", func() bool { return word(t, m.ram, countedAt) != before })
	}
	if out.String() != "!" {
		t.Errorf("the guest does not read what it wrote: %q", out)
	}
}

// TestImageModel compares memories and their images with plain byte slices
// while they are written, frozen, forked and rewound.
func TestImageModel(t *testing.T) {
	const pages = imageBlock/pageSize + 16
	rapid.Check(t, func(t *rapid.T) {
		type memory struct {
			r    *ram
			want []byte
		}
		type frozen struct {
			im   *image
			want []byte
		}
		r, err := newRAM(pages*pageSize, false)
		if err != nil {
			t.Fatal(err)
		}
		all := []memory{{r, make([]byte, pages*pageSize)}}
		var images []frozen
		defer func() {
			for _, m := range all {
				m.r.Close()
			}
			for _, f := range images {
				f.im.release()
			}
		}()
		one := func(t *rapid.T) *memory { return &all[rapid.IntRange(0, len(all)-1).Draw(t, "machine")] }
		image := func(t *rapid.T) frozen {
			if len(images) == 0 {
				t.Skip("nothing is frozen yet")
			}
			return images[rapid.IntRange(0, len(images)-1).Draw(t, "image")]
		}
		t.Repeat(map[string]func(*rapid.T){
			"write": func(t *rapid.T) {
				m := one(t)
				for range rapid.IntRange(1, 20).Draw(t, "count") {
					at := rapid.IntRange(0, pages-2).Draw(t, "page")*pageSize + rapid.IntRange(0, pageSize-1).Draw(t, "offset")
					p := bytes.Repeat([]byte{rapid.Byte().Draw(t, "byte")}, rapid.IntRange(1, pageSize).Draw(t, "length"))
					copy(m.want[at:], p)
					if err := m.r.mem.Write(uint64(at), p); err != nil {
						t.Fatal(err)
					}
				}
			},
			"freeze": func(t *rapid.T) {
				m := one(t)
				im, err := m.r.freeze()
				if err != nil {
					t.Fatal(err)
				}
				m.r.later.Wait()
				if m.r.sealErr != nil {
					t.Fatal(m.r.sealErr)
				}
				images = append(images, frozen{im, bytes.Clone(m.want)})
			},
			"fork": func(t *rapid.T) {
				f := image(t)
				if len(all) == 4 {
					t.Skip("enough machines")
				}
				r, err := reserveRAM(f.im.size)
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, memory{r, bytes.Clone(f.want)})
				if err := r.show(f.im); err != nil {
					t.Fatal(err)
				}
			},
			"rewind": func(t *rapid.T) {
				m, f := one(t), image(t)
				if m.r.fd >= 0 {
					t.Skip("it was never frozen")
				}
				if err := m.r.rewind(f.im); err != nil {
					t.Fatal(err)
				}
				m.want = bytes.Clone(f.want)
			},
			"": func(t *rapid.T) {
				if m := one(t); !bytes.Equal(m.r.low(), m.want) {
					t.Fatal("a machine differs from its model")
				}
			},
		})
		for i, m := range all {
			if !bytes.Equal(m.r.low(), m.want) {
				t.Fatalf("machine %d differs from its model", i)
			}
		}
	})
}

func TestImageFile(t *testing.T) {
	r := newTestRAM(t, 64<<20)
	for _, at := range []uint64{0, 5 << 20, 5<<20 + 8*pageSize, 63<<20 + 4000} {
		if err := r.mem.Write(at, []byte("written")); err != nil {
			t.Fatal(err)
		}
	}
	first := freezeRAM(t, r)
	if err := r.mem.Write(40<<20, []byte("later")); err != nil {
		t.Fatal(err)
	}
	im := freezeRAM(t, r)
	f, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := im.writeFile(f); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, r.low()) {
		t.Error("the file differs from the memory")
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Blocks*512 > 1<<20 {
		t.Errorf("%d bytes of the file exist (%v); it should be sparse", st.Blocks*512, err)
	}
	if !bytes.Equal(ramFrom(t, first).low()[40<<20:40<<20+5], make([]byte, 5)) {
		t.Error("the first image has what was written after it")
	}
}

// TestHolesStayHoles: reading and writing a fork's memory where its image has
// nothing adds no page to the image's file.
func TestHolesStayHoles(t *testing.T) {
	r := newTestRAM(t, 32<<20)
	r.low()[0] = 1
	blocks := func(im *image) (n int64) {
		for f := range im.files() {
			var st unix.Stat_t
			if err := unix.Fstat(f.fd, &st); err != nil {
				t.Fatal(err)
			}
			n += st.Blocks
		}
		return n
	}
	im := freezeRAM(t, r)
	before := blocks(im)
	twin := ramFrom(t, im)
	for at := imageBlock; at < len(twin.low()); at += pageSize {
		if at%(2*pageSize) == 0 {
			twin.low()[at]++
		} else if twin.low()[at] != 0 {
			t.Fatal("a hole does not read as zeros")
		}
	}
	if after := blocks(im); after != before {
		t.Errorf("the frozen file went from %d to %d blocks", before, after)
	}
}

// TestCoalesce bounds what a freeze costs in mappings, whatever was written.
func TestCoalesce(t *testing.T) {
	var runs []segment
	for i := range int64(10000) {
		runs = append(runs, segment{off: i * i * pageSize, length: pageSize})
	}
	got := coalesce(runs, 100)
	if len(got) > 100 {
		t.Errorf("%d runs", len(got))
	}
	covered := func(off int64) bool {
		for _, s := range got {
			if off >= s.off && off < s.end() {
				return true
			}
		}
		return false
	}
	for _, s := range runs {
		if !covered(s.off) {
			t.Fatalf("page %d is lost", s.off/pageSize)
		}
	}
}
