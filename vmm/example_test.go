package vmm_test

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/moovm/moovm/vmm"
)

// A machine is built, runs, and is closed. Here the kernel is no kernel, which
// New says in one sentence.
func Example() {
	image := strings.NewReader("#!/bin/sh\necho not a kernel\n")
	m, err := vmm.New(vmm.Config{
		Memory:  512 << 20,
		CPUs:    2,
		Kernel:  vmm.Kernel{Name: "vmlinux", Image: image, Size: image.Size()},
		Cmdline: "console=ttyS0 panic=-1",
		Console: vmm.Serial{In: os.Stdin, Out: os.Stdout},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer m.Close()
	reason, err := m.Run(context.Background())
	fmt.Println(reason, err)
	// Output: vmlinux: not a bootable kernel: not an ELF file (bad magic number '[35 33 47 98]' in record at byte 0x0)
}

func ExampleProbe() {
	r, err := vmm.Probe(context.Background(), "/nonexistent/kvm")
	fmt.Println(r.Usable, r.Status, err)
	// Output: false missing <nil>
}
