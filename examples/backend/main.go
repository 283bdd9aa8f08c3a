// Command backend boots a guest with a data disk of one's own making: a
// Backend that has no storage at all, where every sector says its own number
// (numbers.go). The guest reads one and prints it.
//
//	backend -kernel vmlinuz -modules lib/modules/VERSION root.cow
//
// It needs a KVM that works (moovm sandbox provides one).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/guest/guestinit"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
)

func main() {
	if guestinit.IsInit() {
		guestinit.Main() // this program is the guest's init as well
	}
	kernel := flag.String("kernel", "", "kernel image, bzImage or ELF")
	modules := flag.String("modules", "", "its modules folder (lib/modules/VERSION)")
	sector := flag.Int64("sector", 12345, "the sector the guest reads")
	flag.Parse()
	if *kernel == "" || *modules == "" || flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: backend -kernel FILE -modules FOLDER [-sector N] ROOT.cow")
		os.Exit(2)
	}
	if err := run(*kernel, *modules, flag.Arg(0), *sector); err != nil {
		fmt.Fprintln(os.Stderr, "backend:", err)
		os.Exit(1)
	}
}

func run(kernelPath, modulesDir, image string, sector int64) (err error) {
	root, err := cowdisk.Open(image, cowdisk.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	kernel, err := kernel.LoadKernel(kernelPath)
	if err != nil {
		return err
	}
	defer kernel.Close()
	mods, err := kmod.OpenModules(modulesDir, kernel.Release)
	if err != nil {
		return err
	}
	r, err := guest.Boot(context.Background(), guest.Config{
		Kernel: kernel, Modules: mods,
		Disks: []guest.Disk{
			{COW: root},
			{Backend: &numbers{sectors: 1 << 31}, Serial: "numbers"}, // /dev/vdb
		},
		Command: &control.Command{Args: []string{"/bin/dd", "if=/dev/vdb", "bs=512", "count=1", "status=none", fmt.Sprint("skip=", sector)}},
		Stdout:  os.Stdout, Stderr: os.Stderr,
	})
	if err == nil && r.ExitStatus != 0 {
		err = fmt.Errorf("the command in the guest ended with %d", r.ExitStatus)
	}
	return err
}
