package guest_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/guest/guestinit"
	"github.com/moovm/moovm/initramfs"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
)

// A program that boots guests is their init, too.
func Example() {
	if guestinit.IsInit() {
		guestinit.Main() // never returns
	}
	if err := run("/boot/vmlinuz-none"); errors.Is(err, kernel.ErrNotKernel) {
		fmt.Println("there is no kernel to boot")
	}
	// Output: there is no kernel to boot
}

// run boots a kernel, without any disk, and runs a command in its initramfs.
func run(path string) error {
	kernel, err := kernel.LoadKernel(path)
	if err != nil {
		return err
	}
	defer kernel.Close()
	modules, err := kmod.FindModules(kernel)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	result, err := guest.Boot(ctx, guest.Config{
		Kernel:  kernel,
		Modules: modules,
		Files:   []initramfs.File{{Name: "/bin/busybox", Mode: 0o755, HostPath: "/bin/busybox"}},
		Command: &control.Command{Args: []string{"/bin/busybox", "uname", "-r"}},
		Stdout:  os.Stdout,
		Stderr:  os.Stderr,
	})
	os.Exit(guest.ExitStatus(result, err))
	return nil
}
