package vmm

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/virtio"
)

// A failure that KVM reports comes with the registers and the code around the
// instruction. No KVM executes this one: x87 loads from where a device could
// be are in nobody's instruction emulator.
func TestKVMGivesUp(t *testing.T) {
	m, out := newMachine(t, asm{}.print("!").bytes(
		0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // mov rax, 0x1122334455667788
		0xbb, 0, 0, 0, 0xd0, // mov ebx, 0xd0000000
		0xdd, 0x03, // fld qword [rbx]
	).powerOff())
	r, err := runToEnd(t, m)
	var v *VCPUError
	if r != Failed || !errors.As(err, &v) {
		t.Fatalf("%v, %v; console %q", r, err, out)
	}
	if v.CPU != 0 || v.Exit != "internal-error" || v.General[0] != 0x1122334455667788 || v.General[1] != 0xd000_0000 {
		t.Errorf("%+v", v)
	}
	if len(v.Code) < 2 || v.Code[0] != 0xdd || v.Code[1] != 3 || len(v.Before) < 15 || v.Before[len(v.Before)-1] != 0xd0 {
		t.Errorf("code % x, before it % x", v.Code, v.Before)
	}
	if s := err.Error(); !strings.Contains(s, "bb 00 00 00 d0 >dd 03") || !strings.Contains(s, "rip=0x1000") {
		t.Error(s)
	}
	if s := v.Registers(); !strings.Contains(s, "rax 1122334455667788") {
		t.Error(s)
	}
	if w, err := m.Wait(); w != Failed || err == nil {
		t.Errorf("Wait says %v, %v", w, err)
	}
}

// Whatever a guest executes, its machine stops when it is told to, with a
// reason; other machines do not notice.
func TestRandomGuests(t *testing.T) {
	needKVM(t)
	other, out := newMachine(t, asm{}.print("!").spin())
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "!")
	ends := map[ExitReason]int{}
	for seed := range uint64(40) {
		rng := rand.New(rand.NewPCG(seed, 1))
		code := asm{}
		for len(code) < 200 {
			// Numbers of ports and addresses of devices make it interesting.
			switch rng.IntN(4) {
			case 0:
				ports := [...]uint16{portCOM1, portCOM2, portCMOS, portPCIAddr, portPCIData, portPanic, portKeyboard, 0x80}
				p := ports[rng.IntN(len(ports))] + uint16(rng.IntN(8))
				code = code.bytes(0x66, 0xba, byte(p), byte(p>>8), 0xed) // mov dx, port; in eax, dx
				if p != portPanic {
					code = code.bytes(0xb8, byte(rng.Uint32()), byte(rng.Uint32()), 0, 0x80, 0xef) // mov eax, …; out dx, eax
				}
			case 1:
				areas := [...]uint32{addrECAM, addrPCIWindow, addrLAPIC, addrIOAPIC}
				a := areas[rng.IntN(len(areas))] + uint32(rng.IntN(0x4000))
				code = code.bytes(0xbb, byte(a), byte(a>>8), byte(a>>16), byte(a>>24), // mov ebx, addr
					0x8b, 0x03, 0x89, 0x03, 0x48, 0x8b, 0x03, 0x66, 0x89, 0x43, 0x01) // 4, 8 and unaligned 2 bytes
			case 2:
				code = code.bytes(0xba, byte(rng.Uint32()), 3, 0, 0, 0xb9, byte(rng.Uint32()), 1, 0, 0,
					0xbe, 0, 0, 0x20, 0, 0xbf, 0, 0, 0x30, 0, 0xf3, 0x6c+byte(rng.IntN(4))) // rep ins/outs b, d at port 0x3xx
			default:
				code = code.bytes(byte(rng.Uint32()), byte(rng.Uint32()))
			}
		}
		m, _ := newMachine(t, code.spin(), func(c *Config) { c.CPUs, c.Devices = 2, []virtio.Device{newDisk(t, zeroDisk(1<<20), 1)} })
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		r, err := m.Run(ctx)
		cancel()
		ends[r]++
		var v *VCPUError
		if (r == Failed) != errors.As(err, &v) {
			t.Errorf("seed %d: %v, %v", seed, r, err)
		}
		if err := m.Close(); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
	t.Logf("ends: %v", ends)
	if other.Stats().State != "running" {
		t.Error("another machine stopped")
	}
}

// BenchmarkKick is how long a spinning guest takes to stand still, and to go on.
func BenchmarkKick(b *testing.B) {
	m, out := newMachine(b, asm{}.print("!").spin())
	if err := m.Start(); err != nil {
		b.Fatal(err)
	}
	for !strings.Contains(out.String(), "!") {
		time.Sleep(time.Millisecond)
	}
	for b.Loop() {
		if err := errors.Join(m.Pause(), m.Resume()); err != nil {
			b.Fatal(err)
		}
	}
}
