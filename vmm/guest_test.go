package vmm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moovm/moovm/virtio"
)

// Bare-metal guests: a few bytes of 64-bit code in an ELF file, entered as a
// kernel is.

// asm is guest code under construction.
type asm []byte

func (a asm) bytes(b ...byte) asm { return append(a, b...) }

// out writes a byte to a port.
func (a asm) out(port uint16, v byte) asm {
	return append(a, 0x66, 0xba, byte(port), byte(port>>8), 0xb0, v, 0xee) // mov dx, port; mov al, v; out dx, al
}

// print sends s to the first serial port.
func (a asm) print(s string) asm {
	for i := range len(s) {
		a = a.out(portCOM1, s[i])
	}
	return a
}

func (a asm) hang() asm     { return append(a, 0xfa, 0xf4, 0xeb, 0xfd) } // cli; hlt; jmp to the hlt
func (a asm) spin() asm     { return append(a, 0xeb, 0xfe) }             // jmp $
func (a asm) powerOff() asm { return a.out(portSleep, sleepEnable|sleepTypeS5<<2).hang() }

const guestBase = addrHigh

// kernel makes an ELF file of the code, loaded and entered at guestBase.
func (a asm) kernel() Kernel {
	le := binary.LittleEndian
	b := make([]byte, 64+56, 64+56+len(a))
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2)    // ET_EXEC
	le.PutUint16(b[18:], 0x3e) // EM_X86_64
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[24:], guestBase) // entry
	le.PutUint64(b[32:], 64)        // program headers
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 1)
	p := b[64:]
	le.PutUint32(p, 1) // PT_LOAD
	le.PutUint32(p[4:], 7)
	le.PutUint64(p[8:], 64+56)
	le.PutUint64(p[16:], guestBase)
	le.PutUint64(p[24:], guestBase)
	le.PutUint64(p[32:], uint64(len(a)))
	le.PutUint64(p[40:], uint64(len(a)))
	b = append(b, a...)
	return Kernel{Name: "test guest", Image: bytes.NewReader(b), Size: int64(len(b))}
}

// syncBuffer is a console that tests may look at while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// waitFor waits until the output contains want.
func (s *syncBuffer) waitFor(t testing.TB, want string) {
	t.Helper()
	eventually(t, "output "+want, func() bool { return strings.Contains(s.String(), want) })
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 10000 {
		if ok() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("%s did not come", what)
}

// newMachine makes a machine for a bare-metal guest, or skips.
func newMachine(t testing.TB, code asm, change ...func(*Config)) (*Machine, *syncBuffer) {
	t.Helper()
	needKVM(t)
	out := new(syncBuffer)
	cfg := Config{Memory: 4 << 20, Kernel: code.kernel(), Console: Serial{Out: out}}
	for _, f := range change {
		f(&cfg)
	}
	return newClosed(t, cfg), out
}

// newClosed makes a machine that is closed when the test ends.
func newClosed(t testing.TB, cfg Config) *Machine {
	t.Helper()
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func needKVM(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile(DefaultKVM, os.O_RDWR, 0)
	if err != nil {
		t.Skipf("needs a KVM device (load kvm-intel or kvm-amd, or join the kvm group): %v", err)
	}
	f.Close()
}

func runToEnd(t *testing.T, m *Machine) (ExitReason, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r, err := m.Run(ctx)
	if ctx.Err() != nil {
		t.Fatalf("the guest did not stop by itself (%v, %v)", r, err)
	}
	return r, err
}

func TestGuestStops(t *testing.T) {
	for name, test := range map[string]struct {
		code asm
		want ExitReason
	}{
		"power-off":     {asm{}.print("bye").powerOff(), PowerOff},
		"keyboard":      {asm{}.print("bye").out(portKeyboardSt, 0xfe).hang(), Reset},
		"cf9":           {asm{}.print("bye").out(portReset, 2).out(portReset, 6).hang(), Reset},
		"pvpanic":       {asm{}.print("bye").out(portPanic, panicked).hang(), Panic},
		"reset vector":  {asm{}.print("bye").bytes(0xb8, 0xf0, 0xff, 0x0f, 0x00, 0xff, 0xe0).hang(), Reset}, // mov eax, 0xffff0; jmp rax
		"sleep type 1":  {asm{}.out(portSleep, sleepEnable|1<<2).print("bye").powerOff(), PowerOff},
		"no sleep bit":  {asm{}.out(portSleep, sleepTypeS5<<2).print("bye").powerOff(), PowerOff},
		"other command": {asm{}.out(portKeyboardSt, 0xd1).print("bye").powerOff(), PowerOff},
	} {
		t.Run(name, func(t *testing.T) {
			m, out := newMachine(t, test.code)
			if r, err := runToEnd(t, m); r != test.want || err != nil {
				t.Errorf("%v, %v; want %v", r, err, test.want)
			}
			if out.String() != "bye" {
				t.Errorf("console: %q", out)
			}
			if n := m.Exits()["io"]; n == 0 {
				t.Error("no exits were counted")
			}
		})
	}
}

func TestTripleFault(t *testing.T) {
	// An empty interrupt table and an undefined instruction.
	m, _ := newMachine(t, asm{}.print("x").bytes(
		0x6a, 0x00, 0x6a, 0x00, // push 0; push 0
		0x0f, 0x01, 0x1c, 0x24, // lidt [rsp]
		0x0f, 0x0b).hang(), // ud2
	)
	r, err := runToEnd(t, m)
	var v *VCPUError
	switch {
	case r == Reset && err == nil:
	case errors.As(err, &v) && v.Exit == "internal-error":
		// A KVM that only emulates instructions gives up here.
		if v.RIP == 0 || len(v.Code) == 0 || !strings.Contains(v.Registers(), "rip") {
			t.Errorf("the error lacks registers or code: %v", v)
		}
	default:
		t.Errorf("%v, %v; want %v", r, err, Reset)
	}
}

func TestStopWhateverTheGuestDoes(t *testing.T) {
	for name, code := range map[string]asm{
		"spinning":     asm{}.print("!").spin(),
		"halted":       asm{}.print("!").hang(),
		"port flood":   asm{}.print("!").bytes(0xe6, 0x80, 0xeb, 0xfc),                                                                    // out 0x80, al; jmp
		"memory flood": asm{}.print("!").bytes(0xbb, 0, 0, 0, 0xd0, 0x8b, 0x03, 0xeb, 0xfc),                                               // mov ebx, 0xd0000000; mov eax, [rbx]; jmp
		"string flood": asm{}.print("!").bytes(0xba, 0x80, 0, 0, 0, 0xb9, 0xff, 0xff, 0xff, 0x7f, 0xbf, 0, 0, 0x20, 0, 0xf3, 0x6c).hang(), // rep insb
	} {
		t.Run(name, func(t *testing.T) {
			m, out := newMachine(t, code)
			ctx, cancel := context.WithCancel(context.Background())
			go func() {
				for !strings.Contains(out.String(), "!") {
					time.Sleep(time.Millisecond)
				}
				cancel()
			}()
			if r, err := m.Run(ctx); r != Stopped || err != nil {
				t.Errorf("%v, %v; want %v", r, err, Stopped)
			}
		})
	}
}

func TestLifecycleErrors(t *testing.T) {
	m, out := newMachine(t, asm{}.print("!").spin())
	if m.Pause() == nil || m.Resume() == nil || m.PowerButton() == nil {
		t.Error("a machine that was not started can be paused, resumed or asked to power off")
	}
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	if m.Start() == nil {
		t.Error("a machine can be started twice")
	}
	out.waitFor(t, "!")
	if err := m.PowerButton(); err != nil {
		t.Errorf("power button: %v", err)
	}
	m.Reset()
	if r, err := m.Wait(); r != Reset || err != nil {
		t.Errorf("%v, %v; want %v", r, err, Reset)
	}
	for what, err := range map[string]error{"pause": m.Pause(), "resume": m.Resume(), "power button": m.PowerButton(), "start": m.Start()} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s after the end: %v", what, err)
		}
	}
	if err := errors.Join(m.Close(), m.Close()); err != nil {
		t.Error(err)
	}
}

func TestCloseWithoutStart(t *testing.T) {
	m, _ := newMachine(t, asm{}.spin())
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err := m.Run(context.Background()); r != Failed || !errors.Is(err, ErrClosed) {
		t.Errorf("Run after Close: %v, %v", r, err)
	}
}

func TestPauseResume(t *testing.T) {
	// inc qword [0x200000] forever.
	m, out := newMachine(t, asm{}.print("!").bytes(0xbb, 0, 0, 0x20, 0, 0x48, 0xff, 0x03, 0xeb, 0xfb))
	counter := func() uint64 {
		var b [8]byte
		if err := m.ram.mem.Read(0x20_0000, b[:]); err != nil {
			t.Fatal(err)
		}
		return binary.LittleEndian.Uint64(b[:])
	}
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "!")
	for range 20 {
		if err := errors.Join(m.Pause(), m.Pause()); err != nil {
			t.Fatal(err)
		}
		n := counter()
		time.Sleep(time.Millisecond)
		if counter() != n {
			t.Fatal("the guest runs while it is paused")
		}
		if err := errors.Join(m.Resume(), m.Resume()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "progress after Resume", func() bool { return counter() != n })
	}
	if err := m.Pause(); err != nil {
		t.Fatal(err)
	}
	m.Stop()
	if r, err := m.Wait(); r != Stopped || err != nil {
		t.Errorf("stopped while paused: %v, %v", r, err)
	}
}

func TestPauseRaces(t *testing.T) {
	m, out := newMachine(t, asm{}.print("!").spin(), func(c *Config) { c.CPUs = 2 })
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "!")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				// Somebody else's Resume may come first.
				if err := m.Pause(); err != nil && !errors.Is(err, ErrClosed) {
					t.Error(err)
				}
				if err := m.Resume(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	m.Stop()
	if r, _ := m.Wait(); r != Stopped {
		t.Error(r)
	}
}

func TestSerialEcho(t *testing.T) {
	in, feed := io.Pipe()
	defer feed.Close()
	// Assert RTS and copy what arrives until a 'q'.
	code := asm{}.out(portCOM1+uartIIR, fcrEnable).out(portCOM1+uartMCR, mcrRTS|mcrDTR).bytes(
		// again: mov dx, LSR; in al, dx; test al, 1; jz again
		0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7,
		// mov dx, RBR; in al, dx; out dx, al; cmp al, 'q'; jne again
		0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0x3c, 'q', 0x75, 0xed,
	).powerOff()
	m, out := newMachine(t, code, func(c *Config) { c.Console.In = in })
	text := strings.Repeat("paste ", 50) + "q"
	go func() {
		feed.Write([]byte(text))
		feed.Close()
	}()
	if r, err := runToEnd(t, m); r != PowerOff || err != nil {
		t.Fatal(r, err)
	}
	if out.String() != text {
		t.Errorf("%d bytes came back of %d: %.60q…", len(out.String()), len(text), out)
	}
}

func TestStringIO(t *testing.T) {
	text := "a string written by one instruction"
	code := asm{}.bytes(0xbe)
	code = binary.LittleEndian.AppendUint32(code, guestBase+0x100) // mov esi, text
	code = code.bytes(0xb9, byte(len(text)), 0, 0, 0,              // mov ecx, len
		0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e) // mov dx, 0x3f8; rep outsb
	code = code.powerOff()
	code = append(code, make([]byte, 0x100-len(code))...)
	code = append(code, text...)
	m, out := newMachine(t, code)
	if r, err := runToEnd(t, m); r != PowerOff || err != nil {
		t.Fatal(r, err)
	}
	if out.String() != text {
		t.Errorf("console: %q", out)
	}
}

func TestUnclaimedAddresses(t *testing.T) {
	// mov ebx, 0xd0000000; mov [rbx], ebx; mov rax, [rbx]; mov dx, 0x3f8; out dx, al;
	// mov dx, 0x1234; in eax, dx; mov dx, 0x3f8; out dx, al
	m, out := newMachine(t, asm{}.bytes(0xbb, 0, 0, 0, 0xd0, 0x89, 0x1b, 0x48, 0x8b, 0x03,
		0x66, 0xba, 0xf8, 0x03, 0xee,
		0x66, 0xba, 0x34, 0x12, 0xed, 0x66, 0xba, 0xf8, 0x03, 0xee).powerOff())
	if r, err := runToEnd(t, m); r != PowerOff || err != nil {
		t.Fatal(r, err)
	}
	if out.String() != "\xff\xff" {
		t.Errorf("reads gave %q, want all ones", out)
	}
}

// TestNothingLeaks starts and stops a hundred machines in one process.
func TestNothingLeaks(t *testing.T) {
	needKVM(t)
	one := func() {
		m, err := New(Config{Memory: 4 << 20, CPUs: 2, Kernel: asm{}.print("x").powerOff().kernel(),
			Devices: []virtio.Device{newDisk(t, zeroDisk(1<<20), 1), newShare(t)}})
		if err != nil {
			t.Fatal(err)
		}
		if r, err := m.Run(context.Background()); r != PowerOff || err != nil {
			t.Error(r, err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
	for range 5 { // the runtime's own descriptors and threads
		one()
	}
	before := holdings(t)
	for range 100 {
		one()
	}
	// Threads of the runtime come and go; a leak would be a hundred.
	after := holdings(t)
	if after.files > before.files || after.mappings > before.mappings || after.threads > before.threads+10 || after.goroutines > before.goroutines {
		t.Errorf("before a hundred machines: %+v, after: %+v", before, after)
	}
}

// held counts what a process holds.
type held struct{ files, mappings, threads, goroutines int }

func holdings(t *testing.T) (h held) {
	t.Helper()
	count := func(dir string) int {
		d, err := os.ReadDir(dir)
		if err != nil {
			t.Skip("needs /proc/self")
		}
		return len(d)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Skip("needs /proc/self/maps")
	}
	h.files, h.threads, h.goroutines = count("/proc/self/fd"), count("/proc/self/task"), runtime.NumGoroutine()
	for _, line := range strings.Split(string(maps), "\n") {
		if strings.Contains(line, "moovm-ram") || strings.Contains(line, "kvm") {
			h.mappings++
		}
	}
	return h
}

// zeroDisk is a disk of zeros.
type zeroDisk int64

func (d zeroDisk) ReadAt(p []byte, _ int64) (int, error)  { clear(p); return len(p), nil }
func (d zeroDisk) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (d zeroDisk) Flush() error                           { return nil }
func (d zeroDisk) Size() int64                            { return int64(d) }

func TestMostCPUs(t *testing.T) {
	m, out := newMachine(t, asm{}.print("bye").powerOff(), func(c *Config) { c.CPUs = MaxCPUs })
	if r, err := runToEnd(t, m); r != PowerOff || err != nil || out.String() != "bye" {
		t.Errorf("%v, %v, console %q", r, err, out)
	}
	if _, err := New(Config{CPUs: MaxCPUs + 1, Kernel: asm{}.kernel()}); err == nil {
		t.Error("a machine with more processors than there can be")
	}
}
