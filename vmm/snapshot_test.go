package vmm

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtioblk"
)

func takeSnapshot(t testing.TB, m *Machine) *Snapshot {
	t.Helper()
	s, err := m.Snapshot(context.Background(), SnapshotOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func forkOf(t testing.TB, s *Snapshot, devices ...virtio.Device) (*Machine, *syncBuffer) {
	t.Helper()
	out := new(syncBuffer)
	m, err := s.Fork(ForkConfig{Console: Serial{Out: out}, Devices: devices})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m, out
}

// times is how often a test does something: more often in the long tests.
func times(usually, long int) int {
	if os.Getenv("MOOVM_TEST_LONG") != "" {
		return long
	}
	return usually
}

// hashingGuest runs a generator over 64 KiB of memory for a while, then prints
// a hash of it all in sixteen letters and powers off: a run that was forked or
// rewound anywhere ends with the same letters as one that was not.
func hashingGuest(rounds uint32) asm {
	a := asm{}.print("!")
	// mov ebx, 0x200000; mov rax, 88172645463325252; mov ebp, rounds
	a = a.bytes(0xbb, 0, 0, 0x20, 0, 0x48, 0xb8, 0x84, 0x95, 0x0c, 0xe9, 0x8b, 0x41, 0x39, 0x01, 0xbd, byte(rounds), byte(rounds>>8), byte(rounds>>16), byte(rounds>>24))
	top := len(a)
	a = a.bytes(
		0x48, 0x89, 0xc2, // mov rdx, rax
		0x48, 0xc1, 0xe2, 0x0d, // shl rdx, 13
		0x48, 0x31, 0xd0, // xor rax, rdx
		0x48, 0x89, 0xc2, // mov rdx, rax
		0x48, 0xc1, 0xea, 0x07, // shr rdx, 7
		0x48, 0x31, 0xd0, // xor rax, rdx
		0x48, 0x89, 0xc2, // mov rdx, rax
		0x48, 0xc1, 0xe2, 0x11, // shl rdx, 17
		0x48, 0x31, 0xd0, // xor rax, rdx
		0x89, 0xc1, // mov ecx, eax
		0x81, 0xe1, 0xf8, 0xff, 0, 0, // and ecx, 0xfff8
		0x48, 0x31, 0x04, 0x0b, // xor [rbx+rcx], rax
		0x48, 0x03, 0x04, 0x0b, // add rax, [rbx+rcx]
		0xff, 0xcd, // dec ebp
	)
	a = a.bytes(0x0f, 0x85) // jnz top
	rel := int32(top - (len(a) + 4))
	a = a.bytes(byte(rel), byte(rel>>8), byte(rel>>16), byte(rel>>24))
	// Sixteen letters of rax.
	a = a.bytes(
		0xb9, 16, 0, 0, 0, // mov ecx, 16
		0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0x48, 0x89, 0xc6, // mov rsi, rax
		0x89, 0xf0, // letter: mov eax, esi
		0x24, 0x0f, // and al, 15
		0x04, 'a', // add al, 'a'
		0xee,                   // out dx, al
		0x48, 0xc1, 0xee, 0x04, // shr rsi, 4
		0xff, 0xc9, // dec ecx
		0x75, 0xf1, // jnz letter
	)
	return a.powerOff()
}

func TestForkEndsAsItsParent(t *testing.T) {
	m, out := newMachine(t, hashingGuest(8_000))
	if r, err := runToEnd(t, m); r != PowerOff || err != nil {
		t.Fatal(r, err)
	}
	want := out.String()
	if len(want) != 17 {
		t.Fatalf("the guest printed %q", want)
	}
	for range times(8, 1000) {
		m, out := newMachine(t, hashingGuest(8_000))
		if err := m.Start(); err != nil {
			t.Fatal(err)
		}
		out.waitFor(t, "!")
		s := takeSnapshot(t, m)
		child, childOut := forkOf(t, s)
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		for _, x := range []*Machine{m, child} {
			if r, err := x.Wait(); r != PowerOff || err != nil {
				t.Fatal(r, err)
			}
		}
		if out.String() != want || "!"+childOut.String() != want {
			t.Fatalf("parent %q, child %q, want %q", out, childOut, want)
		}
	}
}

// slowDisk takes a while for every read.
type slowDisk struct{ virtioblk.Backend }

func (d slowDisk) ReadAt(p []byte, off int64) (int, error) {
	time.Sleep(time.Millisecond)
	return d.Backend.ReadAt(p, off)
}

func (j *ringsJob) device(t *testing.T) virtio.Device {
	t.Helper()
	dev, err := virtioblk.New(virtioblk.Config{Backend: slowDisk{j.disk(t)}, Queues: 2})
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

// TestForkInDiskTraffic forks a guest at random instants while its disk works
// on a request or an interrupt is on its way. The parent, its children and a
// child's child end with every request answered; so does one that is rewound
// when it was done.
func TestForkInDiskTraffic(t *testing.T) {
	for transport := range ringsTransports {
		t.Run(transport, func(t *testing.T) {
			for seed := range uint64(times(6, 500)) {
				rng := rand.New(rand.NewPCG(seed, 7))
				j := newRingsJob(t, transport, func(b virtioblk.Backend) virtioblk.Backend { return slowDisk{b} })
				if err := j.m.Start(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Duration(rng.IntN(40)) * time.Millisecond)
				s, err := j.m.Snapshot(t.Context(), SnapshotOptions{})
				if errors.Is(err, ErrClosed) {
					continue // it was done already
				}
				if err != nil {
					t.Fatal(err)
				}
				defer s.Close()
				end := func(who string, m *Machine, out *syncBuffer) {
					t.Helper()
					if r, err := waitFor(t, m); r != PowerOff || err != nil || out.String() != "k" {
						t.Fatalf("seed %d, %s: %v, %v, console %q", seed, who, r, err, out)
					}
					j.check(t, m)
				}
				child, out := forkOf(t, s, j.device(t))
				if err := child.Start(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
				second, err := child.Snapshot(t.Context(), SnapshotOptions{})
				if err == nil {
					defer second.Close()
					grandchild, out := forkOf(t, second, j.device(t))
					if rng.IntN(2) == 0 {
						if err := grandchild.Rewind(t.Context(), s, SnapshotOptions{}); err != nil {
							t.Fatal(err)
						}
					}
					if err := grandchild.Start(); err != nil {
						t.Fatal(err)
					}
					if rng.IntN(2) == 0 {
						time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
						if err := grandchild.Rewind(t.Context(), s, SnapshotOptions{}); err != nil && !errors.Is(err, ErrClosed) {
							t.Fatal(err)
						}
					}
					r, err := waitFor(t, grandchild)
					// One that was rewound may have said its letter twice.
					if r != PowerOff || err != nil || !strings.HasSuffix(out.String(), "k") {
						t.Fatalf("seed %d, grandchild: %v, %v, console %q", seed, r, err, out)
					}
					j.check(t, grandchild)
				} else if !errors.Is(err, ErrClosed) {
					t.Fatal(err)
				}
				end("child", child, out)
				end("parent", j.m, j.out)
			}
		})
	}
}

// TestForkRefuses names what does not fit.
func TestForkRefuses(t *testing.T) {
	m, out := newMachine(t, asm{}.print("!").spin(), func(c *Config) { c.Devices = []virtio.Device{newDisk(t, zeroDisk(1<<20), 1)} })
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "!")
	s := takeSnapshot(t, m)
	if _, err := s.Fork(ForkConfig{}); !errors.Is(err, ErrSnapshotDevices) {
		t.Errorf("without its disk: %v", err)
	}
	dev, err := virtioblk.New(virtioblk.Config{Backend: zeroDisk(1 << 20), Queues: 2})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Fork(ForkConfig{Devices: []virtio.Device{dev}}); !errors.Is(err, virtio.ErrState) {
		t.Errorf("with a disk of two queues: %v", err)
	}
	other, _ := newMachine(t, asm{}.spin(), func(c *Config) { c.CPUs = 2 })
	if err := other.Rewind(t.Context(), s, SnapshotOptions{}); !errors.Is(err, ErrSnapshotDevices) {
		t.Errorf("rewind of another machine: %v", err)
	}
	frozen := errors.New("the disk is full")
	if _, err := m.Snapshot(t.Context(), SnapshotOptions{Frozen: func() error { return frozen }}); !errors.Is(err, frozen) {
		t.Errorf("a disk that cannot be frozen: %v", err)
	}
	if st := m.Stats().State; st != "running" {
		t.Errorf("after that the machine is %s", st)
	}
}

// TestSnapshotWaits: a request that does not end fails the snapshot within its
// time, and the machine goes on, as does the disk.
func TestSnapshotWaits(t *testing.T) {
	for transport := range ringsTransports {
		gate := make(chan struct{})
		j := newRingsJob(t, transport, func(b virtioblk.Backend) virtioblk.Backend { return gatedDisk{b, gate} })
		if err := j.m.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a request", func() bool { return diskStats(j.m).InFlight > 0 })
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		_, err := j.m.Snapshot(ctx, SnapshotOptions{})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "device 0") {
			t.Fatalf("snapshot with a disk that hangs: %v", err)
		}
		close(gate)
		if r, err := waitFor(t, j.m); r != PowerOff || err != nil {
			t.Fatal(r, err)
		}
		j.check(t, j.m)
	}
}

// TestCloseHangs: Close gives up on a disk that hangs, once, and leaves it the
// memory that it may still write to.
func TestCloseHangs(t *testing.T) {
	gate := make(chan struct{})
	j := newRingsJob(t, "pci", func(b virtioblk.Backend) virtioblk.Backend { return gatedDisk{b, gate} })
	if err := j.m.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a request", func() bool { return diskStats(j.m).InFlight > 0 })
	if err := j.m.Close(); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("close with a disk that hangs: %v", err)
	}
	j.m.closeErr = nil // newMachine looks at it
	if _, err := j.m.ram.mem.Slice(j.places[0], 512); err != nil || len(j.m.ram.regions) == 0 {
		t.Errorf("the memory is gone (%v) while a worker is to write to it", err)
	}
	close(gate)
	eventually(t, "the end of the memory", func() bool {
		j.m.ram.mu.Lock()
		defer j.m.ram.mu.Unlock()
		return j.m.ram.regions == nil
	})
}

// gatedDisk reads nothing before its gate opens.
type gatedDisk struct {
	virtioblk.Backend
	gate chan struct{}
}

func (d gatedDisk) ReadAt(p []byte, off int64) (int, error) {
	<-d.gate
	return d.Backend.ReadAt(p, off)
}

func waitFor(t *testing.T, m *Machine) (ExitReason, error) {
	t.Helper()
	stop := time.AfterFunc(time.Minute, m.Stop)
	defer stop.Stop()
	return m.Wait()
}

// TestGenerations: every life has its own, which its guest can read.
func TestGenerations(t *testing.T) {
	m, out := newMachine(t, asm{}.print("!").spin())
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "!")
	seen := map[Generation]bool{}
	look := func(m *Machine, lives int) {
		t.Helper()
		g, n := m.Generation()
		var inGuest Generation
		if err := m.ram.mem.Read(addrGeneration, inGuest[:]); err != nil || inGuest != g {
			t.Errorf("the guest reads % x (%v), the machine says % x", inGuest, err, g)
		}
		if seen[g] || g == (Generation{}) || n != lives {
			t.Errorf("generation % x of life %d, want life %d and one that was not seen", g, n, lives)
		}
		seen[g] = true
	}
	look(m, 1)
	s := takeSnapshot(t, m)
	for range 3 {
		c, _ := forkOf(t, s)
		look(c, 1)
	}
	for i := range 3 {
		if err := m.Rewind(t.Context(), s, SnapshotOptions{}); err != nil {
			t.Fatal(err)
		}
		look(m, 2+i)
	}
}

// TestHundredChildren: a hundred machines from one snapshot at once, each of
// which writes who it is over the same pages. None sees another's, and what was
// frozen stays.
func TestHundredChildren(t *testing.T) {
	// mov ebx, generation; mov r8, [rbx]; print; wait: mov rax, [rbx]; cmp rax, r8; je wait
	code := asm{}.bytes(0xbb, 0x00, 0xf0, 0x0f, 0x00, 0x4c, 0x8b, 0x03).print("!").bytes(
		0x48, 0x8b, 0x03, 0x4c, 0x39, 0xc0, 0x74, 0xf8,
		0xbb, 0, 0, 0x20, 0, 0xb9, 64, 0, 0, 0, // mov ebx, 2 MiB; mov ecx, 64
		0x48, 0x89, 0x03, 0x81, 0xc3, 0, 0x10, 0, 0, 0xff, 0xc9, 0x75, 0xf3, // page: mov [rbx], rax; add ebx, 4096; dec ecx; jnz page
	).powerOff()
	m, out := newMachine(t, code)
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "!")
	s := takeSnapshot(t, m)
	before := sha256.Sum256(ramFrom(t, s.mem).low())
	var kids []*Machine
	for range 100 {
		c, _ := forkOf(t, s)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		kids = append(kids, c)
	}
	for i, c := range kids {
		if r, err := waitFor(t, c); r != PowerOff || err != nil {
			t.Fatal(r, err)
		}
		g, _ := c.Generation()
		want := binary.LittleEndian.Uint64(g[:])
		for page := range uint64(64) {
			if got := word(t, c.ram, 0x20_0000+page*pageSize); got != want {
				t.Fatalf("child %d: page %d has %#x, want its own generation %#x", i, page, got, want)
			}
		}
	}
	if sha256.Sum256(ramFrom(t, s.mem).low()) != before {
		t.Error("what was frozen has changed")
	}
	if word(t, m.ram, 0x20_0000) != 0 || m.Stats().State != "running" {
		t.Error("the parent has what its children wrote, or does not go on")
	}
}

// TestRewindThousands rewinds one machine again and again; it always goes on
// from the same word, and nothing grows.
func TestRewindThousands(t *testing.T) {
	m, out := newMachine(t, checkingGuest())
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "!")
	s := takeSnapshot(t, m)
	frozen := word(t, ramFrom(t, s.mem), countedAt)
	m.ram.later.Wait()
	before := holdings(t)
	for range 2000 {
		if err := m.Pause(); err != nil {
			t.Fatal(err)
		}
		if err := m.Rewind(t.Context(), s, SnapshotOptions{}); err != nil {
			t.Fatal(err)
		}
		if got := word(t, m.ram, countedAt); got != frozen {
			t.Fatalf("rewound to %d, want %d", got, frozen)
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	if after := holdings(t); after.files > before.files || after.mappings > before.mappings+2 || after.goroutines > before.goroutines {
		t.Errorf("before: %+v, after: %+v", before, after)
	}
	if out.String() != "!" {
		t.Errorf("the guest does not read what it wrote: %q", out)
	}
}

// TestForksLeakNothing makes, runs and ends many children of one parent.
func TestForksLeakNothing(t *testing.T) {
	m, out := newMachine(t, checkingGuest())
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "!")
	s := takeSnapshot(t, m)
	m.ram.later.Wait()
	one := func() {
		c, err := s.Fork(ForkConfig{})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 {
		one()
	}
	before := holdings(t)
	for range times(60, 1000) {
		one()
	}
	after := holdings(t)
	if after.files > before.files || after.mappings > before.mappings || after.threads > before.threads+10 || after.goroutines > before.goroutines {
		t.Errorf("before all those forks: %+v, after: %+v", before, after)
	}
}
