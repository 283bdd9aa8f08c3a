package kvm_test

import (
	"fmt"

	"github.com/moovm/moovm/internal/kvm"
)

// A machine is made from the device outwards: system, virtual machine, vCPU.
func Example() {
	sys, err := kvm.Open("/dev/null") // "/dev/kvm" on a machine that has one
	if err != nil {
		fmt.Println(err)
		return
	}
	defer sys.Close()
	vm, err := sys.CreateVM()
	if err != nil {
		fmt.Println(err)
		return
	}
	defer vm.Close()
	// Output: /dev/null: not a KVM device (inappropriate ioctl for device)
}
