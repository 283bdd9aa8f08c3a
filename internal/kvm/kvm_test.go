//go:build linux && amd64

package kvm

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openSystem(t testing.TB) *System {
	t.Helper()
	s, err := Open("/dev/kvm")
	if err != nil {
		t.Skipf("needs a KVM device (load kvm-intel or kvm-amd, or join the kvm group): %v", err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func mapMemory(t testing.TB, n int) []byte {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	return mem
}

// realMode makes a machine with 64 KiB of memory and one vCPU that starts
// code in real mode at 0x1000.
func realMode(t testing.TB, irqchip bool, code ...byte) (*VM, *VCPU, []byte) {
	t.Helper()
	s := openSystem(t)
	mem := mapMemory(t, 64<<10)
	copy(mem[0x1000:], code)
	vm, err := s.CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { vm.Close() })
	if err := vm.SetTSSAddr(0xfeff_d000); err != nil {
		t.Fatal(err)
	}
	if err := vm.SetIdentityMapAddr(0xfeff_c000); err != nil {
		t.Fatal(err)
	}
	if irqchip {
		if err := vm.CreateIRQChip(); err != nil {
			t.Fatal(err)
		}
	}
	if err := vm.SetMemory(0, 0, mem); err != nil {
		t.Fatal(err)
	}
	v, err := vm.CreateVCPU(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	sregs, err := v.Sregs()
	if err != nil {
		t.Fatal(err)
	}
	sregs.CS.Base, sregs.CS.Selector = 0, 0
	if err := v.SetSregs(sregs); err != nil {
		t.Fatal(err)
	}
	if err := v.SetRegs(&Regs{RIP: 0x1000, RFLAGS: 2}); err != nil {
		t.Fatal(err)
	}
	return vm, v, mem
}

// runGuest runs until an exit that is not a stray signal.
func runGuest(t testing.TB, v *VCPU) Exit {
	t.Helper()
	for {
		e, err := v.Run()
		if errors.Is(err, ErrInterrupted) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
}

func TestOpenErrors(t *testing.T) {
	if _, err := Open(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing device: %v", err)
	}
	if _, err := Open(os.DevNull); !errors.Is(err, ErrNotKVM) {
		t.Errorf("/dev/null: %v", err)
	}
}

func TestExits(t *testing.T) {
	_, v, mem := realMode(t, false,
		0xb0, 0x42, // mov al, 0x42
		0xe6, 0x10, // out 0x10, al
		0xe5, 0x20, // in ax, 0x20
		0xa3, 0x00, 0x20, // mov [0x2000], ax
		0xbe, 0x00, 0x30, // mov si, 0x3000
		0xb9, 0x03, 0x00, // mov cx, 3
		0xba, 0x34, 0x12, // mov dx, 0x1234
		0xf3, 0x6e, // rep outsb
		0xb8, 0x00, 0xf0, // mov ax, 0xf000
		0x8e, 0xd8, // mov ds, ax
		0xa1, 0x10, 0x00, // mov ax, [0xf000:0x10] = 0xf0010
		0xa3, 0x12, 0x00, // mov [0xf000:0x12], ax
		0xf4) // hlt
	copy(mem[0x3000:], "abc")

	if e := runGuest(t, v); e != ExitIO {
		t.Fatal(e)
	}
	if io := v.IO(); !io.Out || io.Port != 0x10 || io.Size != 1 || io.Count != 1 || io.Data[0] != 0x42 {
		t.Errorf("out: %+v", io)
	}
	if e := runGuest(t, v); e != ExitIO {
		t.Fatal(e)
	}
	io := v.IO()
	if io.Out || io.Port != 0x20 || io.Size != 2 {
		t.Errorf("in: %+v", io)
	}
	copy(io.Data, []byte{0xcd, 0xab})

	var out []byte
	for len(out) < 3 {
		if e := runGuest(t, v); e != ExitIO {
			t.Fatal(e)
		}
		if io := v.IO(); io.Port != 0x1234 || io.Size != 1 {
			t.Fatalf("rep outsb: %+v", io)
		}
		out = append(out, v.IO().Data...)
	}
	if string(out) != "abc" {
		t.Errorf("rep outsb sent %q", out)
	}
	if !bytes.Equal(mem[0x2000:0x2002], []byte{0xcd, 0xab}) {
		t.Errorf("in ax read % x", mem[0x2000:0x2002])
	}

	if e := runGuest(t, v); e != ExitMMIO {
		t.Fatal(e)
	}
	m := v.MMIO()
	if m.Write || m.Addr != 0xf0010 || len(m.Data) != 2 {
		t.Errorf("mmio read: %+v", m)
	}
	copy(m.Data, "xy")
	if e := runGuest(t, v); e != ExitMMIO {
		t.Fatal(e)
	}
	if m := v.MMIO(); !m.Write || m.Addr != 0xf0012 || string(m.Data) != "xy" {
		t.Errorf("mmio write: %+v", m)
	}
	if e := runGuest(t, v); e != ExitHLT {
		t.Fatal(e)
	}
}

func TestMemorySlotRemoved(t *testing.T) {
	vm, v, _ := realMode(t, false, 0xa1, 0x00, 0x80, 0xf4) // mov ax, [0x8000]; hlt
	second := mapMemory(t, 4096)
	copy(second, "AB")
	if err := vm.SetMemory(1, 0x10_0000, second); err != nil {
		t.Fatal(err)
	}
	if err := vm.SetMemory(2, 0x10_0000, second); !errors.Is(err, unix.EEXIST) {
		t.Errorf("overlapping slot: %v, want EEXIST", err)
	}
	if err := vm.SetMemory(1, 0x10_0000, nil); err != nil {
		t.Errorf("removing a slot: %v", err)
	}
	if e := runGuest(t, v); e != ExitHLT {
		t.Fatal(e)
	}
}

func TestImmediateExit(t *testing.T) {
	_, v, _ := realMode(t, false, 0xeb, 0xfe) // jmp $
	v.ImmediateExit(true)
	if _, err := v.Run(); !errors.Is(err, ErrInterrupted) {
		t.Fatalf("Run with immediate exit: %v", err)
	}
	v.ImmediateExit(false)

	// A running guest is kicked out by flag and signal.
	tid := make(chan int)
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tid <- unix.Gettid()
		_, err := v.Run()
		for errors.Is(err, ErrInterrupted) && !exitRequested(v) {
			_, err = v.Run()
		}
		result <- err
	}()
	id := <-tid
	time.Sleep(10 * time.Millisecond) // usually inside KVM_RUN by now; right either way
	v.ImmediateExit(true)
	unix.Tgkill(os.Getpid(), id, unix.SIGURG)
	if err := <-result; !errors.Is(err, ErrInterrupted) {
		t.Errorf("kicked Run: %v", err)
	}
}

func exitRequested(v *VCPU) bool { return v.run[1] != 0 }

func TestIOEventFD(t *testing.T) {
	vm, v, _ := realMode(t, false,
		0xb8, 0x00, 0xf0, // mov ax, 0xf000
		0x8e, 0xd8, // mov ds, ax
		0xa2, 0x00, 0x00, // mov [0xf0000], al
		0xa3, 0x00, 0x00, // mov [0xf0000], ax
		0xf4)
	fd := eventfd(t)
	if err := vm.AssignIOEventFD(fd, 0xf0000); err != nil {
		t.Fatal(err)
	}
	if e := runGuest(t, v); e != ExitHLT {
		t.Fatalf("exit %v: the doorbell left the kernel", e)
	}
	if n := readEvent(t, fd); n != 2 {
		t.Errorf("doorbell rang %d times, want 2 (one byte, one word)", n)
	}
	if err := vm.DeassignIOEventFD(fd, 0xf0000); err != nil {
		t.Fatal(err)
	}
	if err := v.SetRegs(&Regs{RIP: 0x1000, RFLAGS: 2}); err != nil {
		t.Fatal(err)
	}
	if e := runGuest(t, v); e != ExitMMIO {
		t.Errorf("exit %v after the doorbell was taken away, want mmio", e)
	}
}

// One register, an eventfd for each value: what matches none leaves the kernel.
func TestIOEventFDMatch(t *testing.T) {
	vm, v, _ := realMode(t, false,
		0xb8, 0x00, 0xf0, // mov ax, 0xf000
		0x8e, 0xd8, // mov ds, ax
		0x66, 0xb8, 1, 0, 0, 0, 0x66, 0xa3, 0x00, 0x00, // mov eax, 1; mov [0xf0000], eax
		0x66, 0x31, 0xc0, 0x66, 0xa3, 0x00, 0x00, // xor eax, eax; mov [0xf0000], eax
		0xb0, 2, 0x66, 0xa3, 0x00, 0x00, // mov al, 2; mov [0xf0000], eax
		0xf4)
	fds := [2]int{eventfd(t), eventfd(t)}
	for i, fd := range fds {
		if err := vm.AssignIOEventFDMatch(fd, 0xf0000, uint32(i)); err != nil {
			t.Fatal(err)
		}
	}
	if e := runGuest(t, v); e != ExitMMIO {
		t.Fatalf("exit %v, want mmio for the value nobody waits for", e)
	}
	for i, fd := range fds {
		if n := readEvent(t, fd); n != 1 {
			t.Errorf("doorbell %d rang %d times, want 1", i, n)
		}
	}
	if e := runGuest(t, v); e != ExitHLT {
		t.Fatalf("exit %v, want hlt", e)
	}
	if err := vm.DeassignIOEventFDMatch(fds[1], 0xf0000, 1); err != nil {
		t.Fatal(err)
	}
	if err := v.SetRegs(&Regs{RIP: 0x1000, RFLAGS: 2}); err != nil {
		t.Fatal(err)
	}
	if e := runGuest(t, v); e != ExitMMIO {
		t.Errorf("exit %v after the doorbell was taken away, want mmio", e)
	}
}

func TestIRQFDAndRouting(t *testing.T) {
	vm, v, _ := realMode(t, true)
	const gsi, vector = 40, 0x55
	routes := []Route{
		{GSI: 5, Type: RouteChip, Chip: ChipPICMaster, Pin: 5},
		{GSI: gsi, Type: RouteMSI, Addr: 0xfee0_0000, Data: vector},
	}
	if err := vm.SetGSIRouting(routes); err != nil {
		t.Fatal(err)
	}
	l, err := v.LAPIC()
	if err != nil {
		t.Fatal(err)
	}
	l.Regs[0xf1] |= 1 // software enable
	if err := v.SetLAPIC(l); err != nil {
		t.Fatal(err)
	}
	fd := eventfd(t)
	if err := vm.AssignIRQFD(fd, gsi); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	if !requested(t, v, vector) {
		t.Error("the irqfd's message did not reach the local APIC")
	}
	if err := vm.DeassignIRQFD(fd, gsi); err != nil {
		t.Error(err)
	}
	if err := vm.SignalMSI(0xfee0_0000, vector+1); err != nil {
		t.Error(err)
	}
	if !requested(t, v, vector+1) {
		t.Error("KVM_SIGNAL_MSI's message did not reach the local APIC")
	}
	if err := vm.IRQLine(5, true); err != nil {
		t.Error(err)
	}
	chip := new(gokvm.IRQChip)
	if err := ioctlPtr(vm.fd, iowr[gokvm.IRQChip](0x62), chip); err != nil {
		t.Fatal(err)
	}
	if irr := chip.Chip[1]; irr&(1<<5) == 0 {
		t.Errorf("PIC requests %08b, want line 5", irr)
	}
	if err := vm.SetGSIRouting(make([]Route, MaxRoutes+1)); err == nil {
		t.Error("a table longer than the kernel's was accepted")
	}
}

// requested waits until the local APIC has the vector in its request register:
// an irqfd may deliver from a kernel worker.
func requested(t *testing.T, v *VCPU, vector int) bool {
	t.Helper()
	for range 1000 {
		l, err := v.LAPIC()
		if err != nil {
			t.Fatal(err)
		}
		if l.Regs[0x200+vector/32*16+vector%32/8]&(1<<(vector%8)) != 0 {
			return true
		}
		time.Sleep(time.Millisecond)
	}
	return false
}

func TestState(t *testing.T) {
	vm, v, _ := realMode(t, true)
	if err := v.SetRegs(&Regs{RAX: 1, R15: 2, RIP: 0x1000, RFLAGS: 2}); err != nil {
		t.Fatal(err)
	}
	if r, err := v.Regs(); err != nil || r.RAX != 1 || r.R15 != 2 {
		t.Errorf("registers: %+v, %v", r, err)
	}
	f, err := v.FPU()
	if err != nil {
		t.Fatal(err)
	}
	f.XMM[3][0] = 7
	if err := v.SetFPU(f); err != nil {
		t.Fatal(err)
	}
	if g, err := v.FPU(); err != nil || g.XMM[3][0] != 7 {
		t.Errorf("FPU: xmm3 = %v, %v", g.XMM[3], err)
	}
	cpuid, err := openSystem(t).SupportedCPUID()
	if err != nil || len(cpuid) == 0 {
		t.Fatalf("%d CPUID entries, %v", len(cpuid), err)
	}
	if err := v.SetCPUID(cpuid); err != nil {
		t.Fatal(err)
	}
	const sysenterCS = 0x174
	if err := v.SetMSRs([]MSREntry{{Index: sysenterCS, Data: 0x10}}); err != nil {
		t.Fatal(err)
	}
	get := []MSREntry{{Index: sysenterCS}}
	if err := v.MSRs(get); err != nil || get[0].Data != 0x10 {
		t.Errorf("MSR: %+v, %v", get, err)
	}
	if err := v.SetMSRs([]MSREntry{{Index: 0xdead_beef, Data: 1}}); err == nil {
		t.Error("a register that does not exist was written")
	}
	if s, err := v.MPState(); err != nil || s != MPRunnable {
		t.Errorf("state %d, %v", s, err)
	}
	e, err := v.Events()
	if err != nil {
		t.Fatal(err)
	}
	if err := v.SetEvents(e); err != nil {
		t.Error(err)
	}
	if err := vm.SetClock(1e9); err != nil {
		t.Fatal(err)
	}
	if ns, err := vm.Clock(); err != nil || ns < 1e9 {
		t.Errorf("clock %d, %v", ns, err)
	}
	if khz, err := v.TSCKHz(); err != nil || khz == 0 {
		t.Errorf("TSC %d kHz, %v", khz, err)
	}
}

func TestCloseReleases(t *testing.T) {
	s := openSystem(t)
	before := countFDs(t)
	for range 20 {
		vm, err := s.CreateVM()
		if err != nil {
			t.Fatal(err)
		}
		v, err := vm.CreateVCPU(0)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // idempotent
			if err := errors.Join(v.Close(), vm.Close()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func countFDs(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("needs /proc/self/fd")
	}
	return len(d)
}

func eventfd(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func readEvent(t *testing.T, fd int) uint64 {
	t.Helper()
	var b [8]byte
	if _, err := unix.Read(fd, b[:]); err != nil {
		t.Fatalf("eventfd: %v", err)
	}
	return uint64(b[0])
}
