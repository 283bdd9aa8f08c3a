package vmm

import (
	"errors"
	"strings"
	"testing"
)

// TestPool forks from shells, more of them than there are, all at once.
func TestPool(t *testing.T) {
	m, out := newMachine(t, hashingGuest(8_000))
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "!")
	s := takeSnapshot(t, m)
	before := holdings(t)
	p := NewPool(s, 3, "")
	var kids []*Machine
	var outs []*syncBuffer
	for range 10 {
		out := new(syncBuffer)
		c, err := p.Fork(ForkConfig{Console: Serial{Out: out}})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		kids, outs = append(kids, c), append(outs, out)
	}
	if r, err := waitFor(t, m); r != PowerOff || err != nil {
		t.Fatal(r, err)
	}
	want := strings.TrimPrefix(out.String(), "!")
	for i, c := range kids {
		if r, err := waitFor(t, c); r != PowerOff || err != nil || outs[i].String() != want {
			t.Errorf("child %d: %v, %v, console %q, want %q", i, r, err, outs[i], want)
		}
		p.Discard(c)
	}
	if err := errors.Join(p.Close(), p.Close()); err != nil {
		t.Error(err)
	}
	if after := holdings(t); after.files > before.files || after.mappings > before.mappings {
		t.Errorf("before: %+v, after: %+v", before, after)
	}
	if _, err := NewPool(s, 1, "/nonexistent").Fork(ForkConfig{}); err == nil {
		t.Error("a pool without a KVM device forks")
	}
}

// dirtyGuest writes to so many pages from 2 MiB on, says so, and spins.
func dirtyGuest(pages uint32) asm {
	return asm{}.bytes(0xbb, 0, 0, 0x20, 0, 0xb9, byte(pages), byte(pages>>8), byte(pages>>16), byte(pages>>24), // mov ebx, 2 MiB; mov ecx, pages
		0x89, 0x0b, // page: mov [rbx], ecx
		0x81, 0xc3, 0, 0x10, 0, 0, // add ebx, 4096
		0xff, 0xc9, // dec ecx
		0x75, 0xf4, // jnz page
	).print("!").spin()
}

// BenchmarkFork is the time from a snapshot to a machine that may start, with a
// shell that was made ahead and without.
func BenchmarkFork(b *testing.B) {
	m, out := newMachine(b, dirtyGuest(1000), func(c *Config) { c.Memory = 128 << 20 })
	if err := m.Start(); err != nil {
		b.Fatal(err)
	}
	out.waitFor(b, "!")
	s := takeSnapshot(b, m)
	fork := func(b *testing.B, f func() (*Machine, error)) {
		for b.Loop() {
			c, err := f()
			b.StopTimer()
			if err != nil {
				b.Fatal(err)
			}
			if err := c.Close(); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	}
	b.Run("shell", func(b *testing.B) {
		fork(b, func() (*Machine, error) {
			b.StopTimer()
			c, err := s.shell("")
			if err != nil {
				return nil, err
			}
			b.StartTimer()
			return c, s.enter(c, ForkConfig{})
		})
	})
	b.Run("whole", func(b *testing.B) { fork(b, func() (*Machine, error) { return s.Fork(ForkConfig{}) }) })
}

// BenchmarkSnapshot is how long a machine of 256 MiB, all of it resident,
// stands still when it is frozen for the first time.
func BenchmarkSnapshot(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		m, out := newMachine(b, dirtyGuest(1), func(c *Config) { c.Memory = 256 << 20 })
		low := m.ram.low()
		for i := 0; i < len(low); i += pageSize {
			low[i] |= 0 // resident, and what it was
		}
		if err := m.Start(); err != nil {
			b.Fatal(err)
		}
		out.waitFor(b, "!")
		b.StartTimer()
		s, err := m.Snapshot(b.Context(), SnapshotOptions{})
		b.StopTimer()
		if err != nil {
			b.Fatal(err)
		}
		s.Close()
		m.Close()
		b.StartTimer()
	}
}

// BenchmarkRewind is a rewind of a guest that has written to 100 pages.
func BenchmarkRewind(b *testing.B) {
	m, out := newMachine(b, dirtyGuest(1000), func(c *Config) { c.Memory = 128 << 20 })
	if err := m.Start(); err != nil {
		b.Fatal(err)
	}
	out.waitFor(b, "!")
	if err := m.Pause(); err != nil {
		b.Fatal(err)
	}
	s := takeSnapshot(b, m)
	m.ram.later.Wait()
	low := m.ram.low()
	for b.Loop() {
		b.StopTimer()
		for i := range 100 {
			low[4<<20+i*pageSize] = 1
		}
		b.StartTimer()
		if err := m.Rewind(b.Context(), s, SnapshotOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}
