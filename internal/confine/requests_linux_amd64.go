package confine

import (
	"fmt"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/internal/kvm"
)

// requests are the ioctls that are allowed: those of KVM's that this module
// makes, and those that a terminal needs.
func requests() []uint32 {
	return append(kvm.Requests(), unix.TCGETS, unix.TCSETS, unix.TCSETSW, unix.TCSETSF, unix.TIOCGWINSZ)
}

// requestFilter refuses every ioctl but those requests, by their whole value.
// The library's policies cannot hold so many arguments.
func requestFilter(requests []uint32) ([]bpf.RawInstruction, error) {
	// struct seccomp_data: nr, arch, instruction pointer, six arguments. The
	// architecture was looked at by the list of calls, which refuses others.
	const number, lower, upper = 0, 24, 28 // the request is the second argument
	const deny = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	if len(requests) > 250 {
		return nil, fmt.Errorf("%d requests are too many for the jumps of a filter", len(requests))
	}
	program := []bpf.Instruction{
		bpf.LoadAbsolute{Off: number, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_IOCTL, SkipTrue: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
		// The kernel does not look at the upper half; nobody here sets it.
		bpf.LoadAbsolute{Off: upper, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1},
		bpf.RetConstant{Val: deny},
		bpf.LoadAbsolute{Off: lower, Size: 4},
	}
	for i, r := range requests {
		program = append(program, bpf.JumpIf{Cond: bpf.JumpEqual, Val: r, SkipTrue: uint8(len(requests) - i)})
	}
	program = append(program, bpf.RetConstant{Val: deny}, bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW})
	return bpf.Assemble(program)
}
