package vmm

import (
	"errors"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
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

// median runs f b.N times and reports the median of what it says it took: a
// mean would be that of the host's other work.
func median(b *testing.B, f func() time.Duration) {
	var all []time.Duration
	for b.Loop() {
		all = append(all, f())
	}
	slices.Sort(all)
	b.ReportMetric(float64(all[len(all)/2].Microseconds()), "µs-median")
	b.ReportMetric(0, "ns/op") // which counts what was made ready, too
}

// BenchmarkFork is the time from a snapshot of 128 MiB to a machine that may
// start: from a shell that was made ahead, step by step, and without one.
func BenchmarkFork(b *testing.B) {
	m, out := newMachine(b, dirtyGuest(1000), func(c *Config) { c.Memory = 128 << 20 })
	if err := m.Start(); err != nil {
		b.Fatal(err)
	}
	out.waitFor(b, "!")
	s := takeSnapshot(b, m)
	steps := map[string]func(c *Machine) error{
		"shell":                 func(c *Machine) error { return s.enter(c, ForkConfig{}) },
		"shell/step=map memory": func(c *Machine) error { return c.ram.show(s.mem) },
		"shell/step=state":      func(c *Machine) error { return c.applyState(&s.state) },
	}
	for _, name := range slices.Sorted(maps.Keys(steps)) {
		b.Run(name, func(b *testing.B) {
			median(b, func() time.Duration {
				c, err := s.shell("")
				if err != nil {
					b.Fatal(err)
				}
				start := time.Now()
				err = steps[name](c)
				took := time.Since(start)
				if err := errors.Join(err, c.Close()); err != nil {
					b.Fatal(err)
				}
				return took
			})
		})
	}
	b.Run("whole", func(b *testing.B) {
		median(b, func() time.Duration {
			start := time.Now()
			c, err := s.Fork(ForkConfig{})
			took := time.Since(start)
			if err != nil {
				b.Fatal(err)
			}
			c.Close()
			return took
		})
	})
}

// BenchmarkSnapshot is how long a machine of 256 MiB, all of it resident,
// stands still when it is frozen for the first time.
func BenchmarkSnapshot(b *testing.B) {
	median(b, func() time.Duration {
		m, out := newMachine(b, dirtyGuest(1), func(c *Config) { c.Memory = 256 << 20 })
		defer m.Close()
		low := m.ram.low()
		for i := 0; i < len(low); i += pageSize {
			low[i] |= 0 // resident, and what it was
		}
		if err := m.Start(); err != nil {
			b.Fatal(err)
		}
		out.waitFor(b, "!")
		start := time.Now()
		s, err := m.Snapshot(b.Context(), SnapshotOptions{})
		took := time.Since(start)
		if err != nil {
			b.Fatal(err)
		}
		s.Close()
		return took
	})
}

// BenchmarkRewind is a rewind of a guest of 128 MiB that has written to 100
// pages.
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
	median(b, func() time.Duration {
		for i := range 100 {
			low[4<<20+i*pageSize] = 1
		}
		start := time.Now()
		if err := m.Rewind(b.Context(), s, SnapshotOptions{}); err != nil {
			b.Fatal(err)
		}
		return time.Since(start)
	})
}

// BenchmarkClone is the memory that a clone of 128 MiB takes which has run and
// written nothing: what the process grows by for each.
func BenchmarkClone(b *testing.B) {
	m, out := newMachine(b, dirtyGuest(1000), func(c *Config) { c.Memory = 128 << 20 })
	if err := m.Start(); err != nil {
		b.Fatal(err)
	}
	out.waitFor(b, "!")
	s := takeSnapshot(b, m)
	m.ram.later.Wait()
	const clones = 50
	var all []*Machine
	before := anonymousKiB(b)
	for range clones {
		c, err := s.Fork(ForkConfig{})
		if err != nil {
			b.Fatal(err)
		}
		if err := c.Start(); err != nil {
			b.Fatal(err)
		}
		all = append(all, c)
	}
	grown := anonymousKiB(b) - before
	for _, c := range all {
		c.Close()
	}
	for b.Loop() {
	}
	b.ReportMetric(float64(grown)/clones, "KiB/clone")
	b.ReportMetric(0, "ns/op")
}

// anonymousKiB is the process's own memory, without what it shares.
func anonymousKiB(b *testing.B) int {
	p, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Skip("needs /proc/self/status")
	}
	for line := range strings.Lines(string(p)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				b.Fatal(err)
			}
			return n
		}
	}
	b.Skip("needs a kernel that tells RssAnon")
	return 0
}
