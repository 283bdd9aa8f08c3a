package vmm

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"

	"github.com/moovm/moovm/internal/kvm"
)

// vcpu is one virtual processor and the thread that runs it.
type vcpu struct {
	m     *Machine
	id    int
	v     *kvm.VCPU
	cpuid []kvm.CPUIDEntry // what it was told, and never changes
	tid   atomic.Int32     // of the running thread; 0 = none
	exits [numExitKinds]atomic.Uint64
	time  threadTime
}

// setCPUID says once what the processor is. KVM keeps the bits up to date that
// follow control registers.
func (c *vcpu) setCPUID(entries []kvm.CPUIDEntry) error {
	c.cpuid = entries
	return c.v.SetCPUID(entries)
}

// numExitKinds bounds the exits counted by kind.
const numExitKinds = 32

// kick makes the vCPU leave the guest, or not enter it, whatever it does. The
// flag is set first: a thread between its last look at the machine's state and
// KVM_RUN is caught by it, one in KVM_RUN by the signal.
func (c *vcpu) kick() {
	c.v.ImmediateExit(true)
	if tid := c.tid.Load(); tid != 0 {
		kickThread(int(tid))
	}
}

// run runs the processor until the machine stops.
func (c *vcpu) run() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c.tid.Store(int32(threadID()))
	defer c.tid.Store(0)
	c.time.begin()
	defer c.time.end()
	if !c.m.park(c) {
		return
	}
	for {
		exit, err := c.v.Run()
		c.exits[min(exit, numExitKinds-1)].Add(1)
		if err != nil {
			if errors.Is(err, kvm.ErrInterrupted) {
				// An access that was pending is complete now.
				if !c.m.park(c) {
					return
				}
				continue
			}
			c.m.finish(Failed, c.failure(exit, err.Error()))
			return
		}
		switch exit {
		case kvm.ExitIO:
			c.m.ports(c.v.IO())
		case kvm.ExitMMIO:
			a := c.v.MMIO()
			c.m.mmio(a.Addr, a.Data, a.Write)
		case kvm.ExitIntr, kvm.ExitIRQWindow, kvm.ExitIOAPICEOI:
		case kvm.ExitHLT:
			// Cannot happen with an in-kernel APIC, which waits itself.
		case kvm.ExitShutdown:
			c.m.finish(Reset, nil) // triple fault
		case kvm.ExitSystemEvent:
			if c.v.SystemEvent() == 1 {
				c.m.finish(PowerOff, nil)
			} else {
				c.m.finish(Reset, nil)
			}
		case kvm.ExitFailEntry:
			c.m.finish(Failed, c.failure(exit, fmt.Sprintf("the processor refuses to enter the guest (hardware reason %#x)", c.v.FailEntry())))
			return
		case kvm.ExitInternalError:
			e := c.v.InternalError()
			detail := fmt.Sprintf("KVM gave up (suberror %d)", e.Suberror)
			if e.Suberror == kvm.InternalEmulation {
				detail = "KVM cannot emulate an instruction; this KVM is not enough for a stock kernel"
			}
			f := c.failure(exit, detail)
			if len(e.Insn) > 0 {
				f.Code = e.Insn
			}
			c.m.finish(Failed, f)
			return
		default:
			c.m.finish(Failed, c.failure(exit, "no such exit is expected"))
			return
		}
	}
}

// VCPUError says that KVM could not run a virtual processor any further.
type VCPUError struct {
	CPU    int    // number of the vCPU
	Exit   string // kind of exit, as KVM names it
	Detail string // what that means
	// RIP and the other registers at that moment; all zero if KVM did not
	// tell.
	RIP, RSP, RFLAGS   uint64
	CR0, CR2, CR3, CR4 uint64
	EFER               uint64
	General            [16]uint64 // RAX RBX RCX RDX RSI RDI RSP RBP R8…R15
	CS                 uint16
	// Code is the guest code at RIP, Before the code in front of it (what was
	// executed last, if it did not jump here), as far as they are mapped.
	Code, Before []byte
}

func (e *VCPUError) Error() string {
	return fmt.Sprintf("vCPU %d: %s: %s; rip=%#x cs=%#x rflags=%#x cr0=%#x cr3=%#x cr4=%#x efer=%#x code=% x >% x",
		e.CPU, e.Exit, e.Detail, e.RIP, e.CS, e.RFLAGS, e.CR0, e.CR3, e.CR4, e.EFER, e.Before, e.Code)
}

// Registers is a table of the registers, several lines long.
func (e *VCPUError) Registers() string {
	var b strings.Builder
	names := [16]string{"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
		"r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"}
	for i, n := range names {
		sep := "  "
		if i%4 == 3 {
			sep = "\n"
		}
		fmt.Fprintf(&b, "%-3s %016x%s", n, e.General[i], sep)
	}
	fmt.Fprintf(&b, "rip %016x  flg %016x  cr0 %016x  cr2 %016x\ncr3 %016x  cr4 %016x  efr %016x\n",
		e.RIP, e.RFLAGS, e.CR0, e.CR2, e.CR3, e.CR4, e.EFER)
	return b.String()
}

// failure describes the vCPU's state. It is called on the vCPU's thread.
func (c *vcpu) failure(exit kvm.Exit, detail string) *VCPUError {
	e := &VCPUError{CPU: c.id, Exit: exit.String(), Detail: detail}
	if r, err := c.v.Regs(); err == nil {
		e.RIP, e.RSP, e.RFLAGS = r.RIP, r.RSP, r.RFLAGS
		e.General = [16]uint64{r.RAX, r.RBX, r.RCX, r.RDX, r.RSI, r.RDI, r.RSP, r.RBP,
			r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15}
	}
	if s, err := c.v.Sregs(); err == nil {
		e.CR0, e.CR2, e.CR3, e.CR4, e.EFER, e.CS = s.CR0, s.CR2, s.CR3, s.CR4, s.EFER, s.CS.Selector
		e.Code = c.code(s.CS.Base+e.RIP, 15)
		// Up to a page's beginning, which may be the mapping's.
		before := min(32, (s.CS.Base+e.RIP)%pageSize)
		e.Before = c.code(s.CS.Base+e.RIP-before, before)
	}
	return e
}

// code reads up to n bytes of guest code at a linear address, up to the page's
// end.
func (c *vcpu) code(linear, n uint64) []byte {
	at, ok := c.v.Translate(linear)
	if !ok || n == 0 {
		return nil
	}
	p := make([]byte, min(n, pageSize-at%pageSize))
	if c.m.ram.mem.Read(at, p) != nil {
		return nil
	}
	return p
}
