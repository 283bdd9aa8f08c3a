//go:build linux && amd64

// Command gokvm plugs moovm's virtio block and 9P devices into somebody else's
// machine: an unmodified github.com/bobuhiro11/gokvm boots a stock Linux kernel
// with its root on a copy-on-write image.
//
//	gokvm -kernel vmlinuz -modules lib/modules/VERSION root.cow COMMAND ARG...
//
// It needs a KVM that works (moovm sandbox provides one). What any machine has
// to give a device is in adapter.go: memory, notifications, interrupts.
package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/bobuhiro11/gokvm/machine"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/guest/guestinit"
	"github.com/moovm/moovm/guest/imagefs"
	"github.com/moovm/moovm/initramfs"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio9p"
	"github.com/moovm/moovm/virtioblk"
)

func main() {
	if guestinit.IsInit() {
		guestinit.Main() // this program is the guest's init as well
	}
	kernel := flag.String("kernel", "", "kernel image, bzImage or ELF")
	modules := flag.String("modules", "", "its modules folder (lib/modules/VERSION)")
	memory := flag.Int("memory", 512, "guest memory in MiB")
	flag.Parse()
	if *kernel == "" || *modules == "" || flag.NArg() < 2 {
		fmt.Fprintln(os.Stderr, "usage: gokvm -kernel FILE -modules FOLDER [-memory MiB] IMAGE COMMAND [ARG...]")
		os.Exit(2)
	}
	if err := run(*kernel, *modules, *memory<<20, flag.Arg(0), flag.Args()[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "gokvm:", err)
		os.Exit(1)
	}
}

func run(kernelPath, modulesDir string, memory int, image string, command []string) (err error) {
	disk, err := cowdisk.Open(image, cowdisk.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, disk.Flush(), disk.Close()) }()
	block, err := virtioblk.New(virtioblk.Config{Backend: disk, Serial: "moovm", Logger: slog.Default()})
	if err != nil {
		return err
	}
	files, err := imagefs.New("example", imagefs.Disk{Name: "vda", Serial: "moovm", Image: imagefs.COW(disk)})
	if err != nil {
		return err
	}
	tree, err := virtio9p.New(virtio9p.Config{Tag: guest.TreeTag, Attacher: files, Logger: slog.Default()})
	if err != nil {
		return err
	}

	m, err := machine.New("/dev/kvm", 1, memory)
	if err != nil {
		return err
	}
	a, err := newAdapter(m, []virtio.Device{block, tree})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.close()) }()

	kernel, err := kernel.LoadKernel(kernelPath)
	if err != nil {
		return err
	}
	defer kernel.Close()
	initrd, err := makeInitrd(kernel, modulesDir, command)
	if err != nil {
		return err
	}
	cmdline := "console=ttyS0 quiet printk.devkmsg=on panic=-1 reboot=k pci=off noapictimer tsc=reliable rdinit=/init"
	if err := m.LoadLinux(kernel, initrd, cmdline); err != nil {
		return err
	}
	runtime.LockOSThread()
	return a.run()
}

// makeInitrd makes an initramfs that holds this program as init, the modules it takes to reach the disk
// and the command to run there.
func makeInitrd(kernel *kernel.Kernel, modulesDir string, command []string) (*strings.Reader, error) {
	dir, release := filepath.Split(filepath.Clean(modulesDir))
	mods, err := kmod.OpenModules(filepath.Join(dir, release), kernel.Release)
	if err != nil {
		return nil, err
	}
	list, err := mods.Resolve("virtio_mmio", "virtio_blk", "ext4", "9pnet_virtio", "9p")
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	b, err := (&initramfs.Archive{Init: self, Modules: list, Config: &control.InitConfig{
		Version: control.ConfigVersion,
		Root:    &control.Root{Device: "/dev/vda"},
		Mounts: []control.Mount{{Source: guest.TreeTag, Target: guest.TreePath, Type: "9p",
			Options: "trans=virtio,version=9p2000.L,msize=512000,cache=none,access=any,noxattr,ro"}},
		// There is no control line on this machine, and gokvm's serial port loses
		// interrupts when user space writes to it: the kernel writes for us.
		Command: &control.Command{Args: append([]string{"/bin/sh", "-c",
			`"$@" 2>&1 | while IFS= read -r l; do echo "<2>$l" >/dev/kmsg; done`, "sh"}, command...)},
	}}).Bytes()
	return strings.NewReader(string(b)), err
}
