package vmm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/moovm/moovm/internal/kvm"
	"golang.org/x/sys/unix"
)

// ProbeResult says whether a KVM device can really run a kernel.
type ProbeResult struct {
	// Path is the device that was probed.
	Path string
	// Usable is true if every instruction of the probe ran.
	Usable bool
	// Status is the kind of result.
	Status ProbeStatus
	// Instruction is the one that did not run, with ProbeEmulation and
	// ProbeTimeout.
	Instruction string
	// Reason is a sentence for people: why the device is not enough, or that
	// it is.
	Reason string
}

// ProbeStatus is the kind of a ProbeResult.
type ProbeStatus string

const (
	ProbeUsable     ProbeStatus = "usable"     // real hardware virtualisation
	ProbeSystem     ProbeStatus = "system"     // not built for Linux on x86-64
	ProbeMissing    ProbeStatus = "missing"    // there is no such device
	ProbePermission ProbeStatus = "permission" // the device may not be opened
	ProbeNotKVM     ProbeStatus = "not-kvm"    // the file is not a KVM device
	ProbeEmulation  ProbeStatus = "emulation"  // an ordinary instruction does not run
	ProbeTimeout    ProbeStatus = "timeout"    // the guest did not finish in time
	ProbeFailed     ProbeStatus = "failed"     // KVM refused something else
)

// probeLimit is how long the probe's guest may take; it needs microseconds on
// hardware and a few milliseconds in an emulator.
const probeLimit = 5 * time.Second

// probeStep is one instruction of the probe.
type probeStep struct {
	name string
	code []byte
	// The CPUID feature it needs, if any: leaf, register (0 EAX … 3 EDX), bit.
	leaf uint32
	reg  int
	bit  int
}

// probeSteps are instructions that every distribution kernel or C library
// uses, and that KVMs without hardware behind them lack.
var probeSteps = []probeStep{
	{name: "cmpxchg16b", code: []byte{0xf0, 0x48, 0x0f, 0xc7, 0x0f}, leaf: 1, reg: 2, bit: 13}, // lock cmpxchg16b [rdi]
	{name: "pxor", code: []byte{0x66, 0x0f, 0xef, 0xc0}},                                       // pxor xmm0, xmm0
	{name: "addps", code: []byte{0x0f, 0x58, 0xc8}},                                            // addps xmm1, xmm0
	{name: "fld1", code: []byte{0xdb, 0xe3, 0xd9, 0xe8}},                                       // fninit; fld1
	{name: "fxrstor", code: []byte{0x0f, 0xae, 0x07, 0x0f, 0xae, 0x0f}},                        // fxsave [rdi]; fxrstor [rdi]
	{name: "rdtscp", code: []byte{0x0f, 0x01, 0xf9}, leaf: 0x8000_0001, reg: 3, bit: 27},
	{name: "int3", code: []byte{0xcc}},
	// mov eax, 1; xor edx, edx; xsave [rdi]; xrstor [rdi]
	{name: "xrstor", code: []byte{0xb8, 1, 0, 0, 0, 0x31, 0xd2, 0x0f, 0xae, 0x27, 0x0f, 0xae, 0x2f}, leaf: 1, reg: 2, bit: 26},
}

// Memory of the probe's guest.
const (
	probeMemory = 64 << 10
	probeGDT    = 0x500
	probeTables = 0x1000 // three pages
	probeIDT    = 0x4000
	probeCode   = 0x8000
	probeInt3   = 0x9000
	probeData   = 0xa000
	probeStack  = 0xf000

	probePortStep = 0x10 // OUT: number of the step that comes now
	probePortDone = 0x11 // OUT: number of breakpoints taken
)

// Probe runs a few bytes of long-mode guest code on the KVM device at path
// ("" means DefaultKVM), among them the instructions that instruction-emulating
// KVMs lack, and says whether that worked. It takes milliseconds and never
// longer than ctx or a few seconds. The error is that of a ctx that ended; a
// KVM that does not work is a result, not an error.
func Probe(ctx context.Context, path string) (ProbeResult, error) {
	if path == "" {
		path = DefaultKVM
	}
	if err := ctx.Err(); err != nil {
		return ProbeResult{}, err
	}
	limited, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	r := probe(limited, path)
	r.Path = path
	r.Usable = r.Status == ProbeUsable
	return r, ctx.Err()
}

func probe(ctx context.Context, path string) ProbeResult {
	sys, err := kvm.Open(path)
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		return ProbeResult{Status: ProbeSystem, Reason: err.Error()}
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return ProbeResult{Status: ProbeMissing, Reason: fmt.Sprintf(
			"there is no %s: this machine has no KVM, or its kernel module (kvm-intel or kvm-amd) is not loaded", path)}
	case errors.Is(err, fs.ErrPermission):
		return ProbeResult{Status: ProbePermission, Reason: fmt.Sprintf(
			"%s may not be opened: join the group that owns it (usually kvm) or run as root", path)}
	case err != nil:
		return ProbeResult{Status: ProbeNotKVM, Reason: fmt.Sprintf("%s cannot be used: %v", path, err)}
	}
	defer sys.Close()
	failed := func(err error) ProbeResult {
		return ProbeResult{Status: ProbeFailed, Reason: fmt.Sprintf("%s does not make a virtual machine: %v", path, err)}
	}
	supported, err := sys.SupportedCPUID()
	if err != nil {
		return failed(err)
	}
	mem, err := unix.Mmap(-1, 0, probeMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return failed(err)
	}
	defer unix.Munmap(mem)
	vm, err := sys.CreateVM()
	if err != nil {
		return failed(err)
	}
	defer vm.Close()
	steps, xsave := probeProgram(mem, supported)
	v, err := probeVCPU(vm, mem, supported, xsave)
	if err != nil {
		return failed(err)
	}
	defer v.Close()

	last := make(chan probeEnd, 1)
	var tid atomic.Int32
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tid.Store(int32(threadID()))
		last <- probeRun(ctx, v)
	}()
	var end probeEnd
	select {
	case end = <-last:
	case <-ctx.Done():
		v.ImmediateExit(true)
		kickThread(int(tid.Load()))
		end = <-last
	}
	name := "the first instruction"
	if end.step >= 0 && end.step < len(steps) {
		name = steps[end.step]
	}
	switch {
	case end.done && end.breakpoints == 1:
		return ProbeResult{Status: ProbeUsable, Reason: path + " works: real hardware virtualisation"}
	case end.done:
		return ProbeResult{Status: ProbeEmulation, Instruction: "int3", Reason: fmt.Sprintf(
			"%s cannot run a stock kernel: a breakpoint (int3) did not reach its handler", path)}
	case end.interrupted:
		return ProbeResult{Status: ProbeTimeout, Instruction: name, Reason: fmt.Sprintf(
			"%s cannot run a stock kernel: a guest of a few instructions did not finish in time (stuck at %s)", path, name)}
	case end.err != nil:
		return failed(end.err)
	default:
		how := "KVM reports " + end.exit.String()
		if end.exit == kvm.ExitInternalError {
			how = "KVM tries to emulate it and fails"
		} else if end.exit == kvm.ExitShutdown {
			how = "it raises an exception"
		}
		return ProbeResult{Status: ProbeEmulation, Instruction: name, Reason: fmt.Sprintf(
			"%s cannot run a stock kernel: the instruction %s does not run (%s), so there is no real hardware virtualisation behind it", path, name, how)}
	}
}

// probeEnd is how far the probe's guest came.
type probeEnd struct {
	step        int // index of the last step begun, -1 = none
	done        bool
	breakpoints byte
	interrupted bool
	exit        kvm.Exit
	err         error
}

func probeRun(ctx context.Context, v *kvm.VCPU) probeEnd {
	end := probeEnd{step: -1}
	for {
		exit, err := v.Run()
		switch {
		case errors.Is(err, kvm.ErrInterrupted):
			if ctx.Err() != nil {
				end.interrupted = true
				return end
			}
			continue
		case err != nil:
			end.err = err
			return end
		case exit != kvm.ExitIO:
			end.exit = exit
			return end
		}
		io := v.IO()
		if !io.Out || len(io.Data) != 1 {
			end.exit = exit
			return end
		}
		switch io.Port {
		case probePortStep:
			end.step = int(io.Data[0])
		case probePortDone:
			end.done, end.breakpoints = true, io.Data[0]
			return end
		}
	}
}

// probeProgram writes the guest's code and tables into mem. It returns the
// names of the steps in it, and whether XSAVE is among them.
func probeProgram(mem []byte, supported []kvm.CPUIDEntry) (steps []string, xsave bool) {
	le := binary.LittleEndian
	const presentWrite, large = 3, 0x80
	le.PutUint64(mem[probeTables:], probeTables+pageSize|presentWrite)
	le.PutUint64(mem[probeTables+pageSize:], probeTables+2*pageSize|presentWrite)
	le.PutUint64(mem[probeTables+2*pageSize:], presentWrite|large)
	putGDT(mem[probeGDT:])
	gate := mem[probeIDT+16*3:]
	le.PutUint16(gate, probeInt3)
	le.PutUint16(gate[2:], selBootCS)
	gate[5] = 0x8e                                              // present interrupt gate
	copy(mem[probeInt3:], []byte{0x80, 0xc3, 0x01, 0x48, 0xcf}) // add bl, 1; iretq

	var code []byte
	for _, s := range probeSteps {
		if s.leaf != 0 && !cpuidBit(supported, s.leaf, s.reg, s.bit) {
			continue
		}
		xsave = xsave || s.name == "xrstor"
		code = append(code, 0xb0, byte(len(steps)), 0xe6, probePortStep) // mov al, n; out port, al
		code = append(code, s.code...)
		steps = append(steps, s.name)
	}
	code = append(code, 0x88, 0xd8, 0xe6, probePortDone, 0xf4) // mov al, bl; out port, al; hlt
	copy(mem[probeCode:], code)
	return steps, xsave
}

func cpuidBit(entries []kvm.CPUIDEntry, leaf uint32, reg, bit int) bool {
	for _, e := range entries {
		if e.Function == leaf {
			return [4]uint32{e.Eax, e.Ebx, e.Ecx, e.Edx}[reg]>>bit&1 != 0
		}
	}
	return false
}

func probeVCPU(vm *kvm.VM, mem []byte, supported []kvm.CPUIDEntry, xsave bool) (_ *kvm.VCPU, err error) {
	if err = vm.SetTSSAddr(addrTSS); err != nil {
		return nil, err
	}
	if err = vm.SetIdentityMapAddr(addrIdentity); err != nil {
		return nil, err
	}
	if err = vm.SetMemory(0, 0, mem); err != nil {
		return nil, err
	}
	v, err := vm.CreateVCPU(0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			v.Close()
		}
	}()
	if err = v.SetCPUID(supported); err != nil {
		return nil, err
	}
	s, err := v.Sregs()
	if err != nil {
		return nil, err
	}
	enterLongMode(s)
	s.GDT.Base = probeGDT
	s.IDT = kvm.Descriptor{Base: probeIDT, Limit: 16*32 - 1}
	s.CR3 = probeTables
	s.CR0 |= 1<<1 | 1<<5  // MP, NE
	s.CR4 |= 1<<9 | 1<<10 // OSFXSR, OSXMMEXCPT
	if xsave {
		s.CR4 |= 1 << 18 // OSXSAVE
	}
	if err = v.SetSregs(s); err != nil {
		return nil, err
	}
	return v, v.SetRegs(&kvm.Regs{RIP: probeCode, RSP: probeStack, RDI: probeData, RFLAGS: 2})
}
