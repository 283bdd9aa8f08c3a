package guesttest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
)

// Defaults of a Config.
const (
	DefaultMemory      = 1 << 30 // bytes
	DefaultBootTimeout = time.Minute
)

// sandboxSlower is how much longer booting may take in the sandbox.
const sandboxSlower = 3

// Root file systems of a Config.
const (
	// RootHost is this machine's own root file system, read-only over 9P below
	// an overlay in the guest's memory; /tmp is empty. All programs and
	// libraries are there as they are. It is the default without a Base.
	RootHost = "host"
	// RootInitramfs is nothing but the test binary, its libraries and its
	// folder.
	RootInitramfs = "initramfs"
)

// Config describes the guests of a test. The zero Config is a guest with this
// machine's root file system and the kernel of $MOOVM_KERNEL or the cached
// one.
type Config struct {
	// Kernels are kernel files: vmlinuz or ELF vmlinux. With several, the tests
	// run in each in turn. Empty means those Kernels returns. Start uses the
	// first.
	Kernels []string
	// Modules is the kernel's modules folder; empty looks beside the kernel.
	Modules string
	// LoadModules are loaded before anything runs; others are loaded by the
	// guest's kernel as it needs them, if the root file system has modprobe.
	LoadModules []string
	// Setup are lines for the guest's /bin/sh, run as root before the test
	// binary, in its folder: mounts, settings. What they write goes to stderr.
	// One that fails ends the guest, with an error of its own; the BootTimeout
	// includes them. A Machine runs them at each boot.
	Setup []string
	// Append is added to the kernel command line.
	Append string
	// Base is a disk image (COW or raw; ,format=raw or ,format=cow behind the
	// name says which). The guest's root, /dev/vda, is an overlay of its own on
	// it.
	Base string
	// Root is the root file system without a Base: RootHost (if empty) or
	// RootInitramfs.
	Root string
	// Disks are further disks, empty if they have no Image. They follow the
	// base: /dev/vdb and on; without a Base, /dev/vda and on. ExtraDisks says.
	Disks []Disk
	// Shares are folders of this machine for the guest.
	Shares []Share
	// Env is added to this process's environment for what runs in the guest.
	Env []string

	Memory int64 // bytes; 0 means DefaultMemory
	// CPUs is the number of processors. 0 means the host's, at most
	// MaxDefaultCPUs; in the sandbox, one.
	CPUs int

	// Timeout ends a guest that has not finished so long after its command
	// started. 0 means the test binary's own -test.timeout and a little more.
	Timeout time.Duration
	// BootTimeout is how long the guest may take to its command; 0 means
	// DefaultBootTimeout, and three times that in the sandbox.
	BootTimeout time.Duration

	// Artifacts is a folder; each run keeps there, in a folder named after the
	// test binary, console.log, core files, and the overlay root.cow if the run
	// failed. Empty keeps nothing.
	Artifacts string
	// Keep keeps the overlay of a run that passed, too.
	Keep bool
	// IgnoreOops lets a run pass although the kernel had an oops or a lockup.
	IgnoreOops bool

	// Accel is where guests run: auto (if empty), kvm or sandbox.
	Accel string
	// NoConfine leaves the process that runs a test binary's guest unconfined.
	// Start's guests run in the process of the test, which never is confined.
	NoConfine bool
	// Quiet leaves out the note that the sandbox is used.
	Quiet bool
	// Networks makes the guest's network interfaces, anew for each boot, which
	// closes their links at its end; only with Start, and not for guests that are
	// forked. The kernel's modules must have virtio_net. See Machine.Dial.
	Networks func() ([]guest.Network, error) `json:"-"`
	// Console takes what the guest says on its console, as it comes; only with
	// Start.
	Console func(p []byte) `json:"-"`
}

// Share is a folder of this machine for the guest.
type Share struct {
	Dir string
	// Target is where the guest has it; empty means the same path.
	Target string
	// Writable lets the guest change the folder. Otherwise it can write there
	// too, but only into its own memory.
	Writable bool
}

func (c *Config) setDefaults() error {
	if c.Memory == 0 {
		c.Memory = DefaultMemory
	}
	if c.BootTimeout == 0 {
		c.BootTimeout = DefaultBootTimeout
		if host.InSandbox() {
			c.BootTimeout *= sandboxSlower
		}
	}
	if len(c.Kernels) == 0 {
		kernels, err := host.Kernels()
		if err != nil {
			return err
		}
		c.Kernels = kernels
	}
	return c.Check()
}

// Check finds what is wrong with the configuration alone.
func (c *Config) Check() error {
	if err := host.CheckAccel(c.Accel); err != nil {
		return err
	}
	switch c.Root {
	case "", RootHost, RootInitramfs:
	default:
		return fmt.Errorf("root %q: use %s or %s", c.Root, RootHost, RootInitramfs)
	}
	if c.Base != "" && c.Root != "" {
		return errors.New("a base image is the root file system; leave it or the root out")
	}
	if c.Keep && c.Artifacts == "" {
		return errors.New("to keep the overlay, name the artifacts folder to keep it in")
	}
	for _, d := range c.Disks {
		if err := d.check(); err != nil {
			return err
		}
	}
	return nil
}

// absPath makes path independent of the working folder. It is not cleaned:
// what lies above a folder is for the kernel to say.
func absPath(path string) (string, error) {
	if filepath.IsAbs(path) {
		return path, nil
	}
	wd, err := os.Getwd()
	return wd + "/" + path, err
}

// absImage is where the disk's image is, and what the user says it is.
func absImage(d Disk) (path string, f cowdisk.Format, err error) {
	if path, f, err = d.image(); err == nil {
		path, err = cowdisk.HostFS{}.Resolve(path)
	}
	return path, f, err
}

// absolute makes paths independent of the working folder.
func (c *Config) absolute() error {
	var err error
	abs := func(p *string) {
		if *p != "" && err == nil {
			*p, err = absPath(*p)
		}
	}
	kernels := append([]string{}, c.Kernels...)
	for i := range kernels {
		abs(&kernels[i])
	}
	disks := append([]Disk{}, c.Disks...)
	for i := range disks {
		if d := &disks[i]; d.Image != "" && err == nil {
			d.Image, d.Format, err = absImage(*d)
		}
	}
	shares := append([]Share{}, c.Shares...)
	for i := range shares {
		abs(&shares[i].Dir)
	}
	c.Kernels, c.Disks, c.Shares = kernels, disks, shares
	abs(&c.Modules)
	if c.Base != "" && err == nil {
		var f cowdisk.Format
		if c.Base, f, err = absImage(Disk{Image: c.Base}); f != cowdisk.FormatUnknown {
			c.Base += ",format=" + f.String()
		}
	}
	abs(&c.Artifacts)
	return err
}

// Kernels are the kernels to test with when none is named: the list in
// $MOOVM_KERNEL, separated by colons, or the kernel that `make setup` keeps in
// the cache.
func Kernels() ([]string, error) { return host.Kernels() }

// ErrNoKernel says that no kernel was named and none is in the cache.
var ErrNoKernel = host.ErrNoKernel

// open opens a kernel with its modules. Modules may be nil: a kernel may have
// all it needs built in.
func (c *Config) open(path string) (*kernel.Kernel, *kmod.Modules, error) {
	k, err := kernel.LoadKernel(path)
	if err != nil {
		return nil, nil, err
	}
	var m *kmod.Modules
	if c.Modules != "" {
		m, err = kmod.OpenModules(c.Modules, k.Release)
	} else if m, err = kmod.FindModules(k); errors.Is(err, kmod.ErrNoModules) {
		m, err = nil, nil
	}
	if err != nil {
		k.Close()
		return nil, nil, err
	}
	return k, m, nil
}
