package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hugelgupf/p9/p9"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/guest/imagefs"
	"github.com/moovm/moovm/guest/sharefs"
	"github.com/moovm/moovm/initramfs"
	"github.com/moovm/moovm/internal/blkid"
	"github.com/moovm/moovm/internal/pipe"
	"github.com/moovm/moovm/internal/ratelog"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/virtiovsock"
	"github.com/moovm/moovm/vmm"
)

// TreeTag is the 9P tag of the metadata tree, TreePath where it is mounted.
const (
	TreeTag  = "moovm"
	TreePath = "/run/moovm"
)

// DefaultMemory is the RAM of a guest, in bytes, when Config.Memory is 0.
const DefaultMemory = 512 << 20

// Backend holds a disk's contents; it is virtioblk.Backend, whose optional
// interfaces are looked for as well.
type Backend interface {
	io.ReaderAt
	io.WriterAt
	Flush() error
	Size() int64
}

// Disk is one disk of a guest: the first is /dev/vda.
type Disk struct {
	// Backend holds its contents; nil means COW. It is not closed.
	Backend Backend
	// COW is the image to show in the metadata tree; nil leaves the disk out.
	COW *cowdisk.Disk
	// ReadOnly makes the guest see a read-only disk.
	ReadOnly bool
	// Serial is the identity the guest reads, at most 20 bytes.
	Serial string
	// Queues is the number of request queues; 0 means one for each processor.
	Queues int
}

// Share is a file tree that the guest can mount by its tag.
type Share struct {
	Tag      string
	Attacher p9.Attacher
	// Target is where the init mounts it; empty leaves that to the guest.
	Target string
	// ReadOnly mounts it read-only. That a guest does not write is up to the
	// Attacher.
	ReadOnly bool
	// Overlay lets the guest write, into its memory.
	Overlay bool
	// Options are added to the mount options, such as cache=loose.
	Options string
}

// Config describes a guest.
type Config struct {
	// Kernel is what boots. It is not closed.
	Kernel *kernel.Kernel
	// Modules are the kernel's; nil means that everything needed is built in.
	// The guest has them read-only at /lib/modules/RELEASE, unless its root file
	// system has them there, and its kernel loads from there what is wanted:
	// their folder is read as long as the guest runs.
	Modules *kmod.Modules
	// LoadModules are further modules to load, by name.
	LoadModules []string
	// Init is the program that is the guest's init: one that calls InitMain.
	// Empty means the running program. Libraries it needs go along; a static
	// program is better.
	Init string
	// Initrd is used instead of the initramfs that Boot builds, for kernels with
	// an initrd of their own. The guest is then none of this package's:
	// Command, LoadModules and mounts are not possible.
	Initrd []byte
	// Files are added to the initramfs.
	Files []initramfs.File
	// Append is added to the kernel command line. Its root=, rootfstype=,
	// rootflags=, ro, rw and init= say what is booted; the default is the first
	// disk, writable.
	Append string

	// Transport is how disks and shares are attached.
	Transport vmm.Transport

	Memory int64 // bytes; 0 means DefaultMemory
	CPUs   int   // 0 means 1
	Disks  []Disk
	Shares []Share
	// Networks are the guest's network interfaces: eth0 and on, unless its own
	// system names them otherwise. Their links are not closed.
	Networks []Network
	// Vsock is the guest's socket device. It is not closed.
	Vsock *virtiovsock.Device
	// Root is the root file system instead of the first disk: a share, say.
	Root *control.Root
	// NoRoot stays in the initramfs although there are disks.
	NoRoot bool
	// Mounts are made before those of the Shares.
	Mounts []control.Mount
	// CorePattern is InitConfig.CorePattern.
	CorePattern string
	// NoTree leaves the metadata tree out.
	NoTree bool
	// RevealPaths lets the guest see paths of the host in the metadata tree.
	RevealPaths bool
	// Version is what the tree's file of that name says.
	Version string

	// Command is run instead of the disk's init. Without disks it runs in the
	// initramfs.
	Command *control.Command
	// Setup are lines for the guest's /bin/sh that run before the command, as in
	// control.InitConfig. The BootTimeout includes them.
	Setup []string
	// Scratch says that the root file system is for this guest alone and gone
	// with it: what tests look for may be added, such as the kernel's
	// configuration, /boot/config-RELEASE, from beside the kernel.
	Scratch bool
	// Stdin, Stdout and Stderr are the command's, as in control.HostConfig.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Hostname is set in the guest if it is not empty.
	Hostname string

	// Console is the first serial port, where the kernel's messages and the
	// disk's login prompt are. Its last lines are kept for errors anyway.
	Console vmm.Serial
	// BootTimeout is how long the guest may take to its init, or to the end of
	// its Setup; 0 = no limit.
	BootTimeout time.Duration
	// BeforeStart is called when all that the machine needs is open and nothing
	// of the guest has run, to watch the machine or to confine this process. An
	// error ends the guest. May be nil.
	BeforeStart func(*vmm.Machine) error
	// OnStart is called when the command or the disk's init starts; may be nil.
	OnStart func(what string)

	KVM    string       // path of the KVM device; empty = /dev/kvm
	Logger *slog.Logger // nil = no messages
}

// Result is how a guest ended.
type Result struct {
	// Reason is how the machine stopped.
	Reason vmm.ExitReason
	// ExitStatus is the command's: 0 to 255, 128 + signal. Without a command
	// it is 0.
	ExitStatus int
	// Control is all that the init told.
	Control control.State
	// Console are the last lines of the console, oldest first.
	Console []string
	// Took is the time from start to end.
	Took time.Duration
}

// A Guest is a running guest. Its methods may be called from any goroutine.
type Guest struct {
	cfg     Config // without what only the start needs
	foreign bool   // the initrd is none of this package's
	log     *slog.Logger
	machine *vmm.Machine
	devices devices
	modules *sharefs.Share // nil: none are shared
	// modulesDir is their folder.
	modulesDir string
	control    *control.Host
	console    *consoleLog
	start      time.Time

	fromGuest, toGuest *pipe.Pipe    // the serial control line
	share              *controlShare // the faster one; nil without a command
	served             chan error    // the control line's end

	snapshots sync.Mutex // one at a time

	once   sync.Once
	result Result
	err    error
	done   chan struct{}
}

// Boot runs a guest to its end. A command that fails is no error: its status is
// in the Result. Errors are a *GuestError (the init could not do its work), a
// *PanicError, a *BootError, a *StoppedError when ctx ended, a *kernel.KernelError, or
// one of the machine. ExitStatus makes an exit status of them.
func Boot(ctx context.Context, cfg Config) (Result, error) {
	g, err := Start(ctx, cfg)
	if err != nil {
		return Result{}, err
	}
	defer g.Close()
	return g.Wait()
}

// Start starts a guest. It is stopped as if its power failed when ctx ends.
// The caller closes it.
func Start(ctx context.Context, cfg Config) (*Guest, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Memory == 0 {
		cfg.Memory = DefaultMemory
	}
	if err := cfg.fillDisks(); err != nil {
		return nil, err
	}
	plan, err := makePlan(&cfg)
	if err != nil {
		return nil, err
	}
	modules := ""
	if plan.init.ModulesShare != "" {
		modules = cfg.Modules.Dir()
	}
	kernel := vmm.Kernel{Name: cfg.Kernel.Path, Image: cfg.Kernel, Size: cfg.Kernel.Size()}
	foreign := cfg.Initrd != nil
	// Megabytes that only the start needs are not kept.
	cfg.Kernel, cfg.Modules, cfg.Initrd, cfg.Files = nil, nil, nil, nil
	g, err := newGuest(cfg, foreign, plan.init.ControlShare, modules)
	if err != nil {
		return nil, err
	}
	g.machine, err = vmm.New(vmm.Config{
		Memory:    cfg.Memory,
		CPUs:      cfg.CPUs,
		Kernel:    kernel,
		Initrd:    plan.initrd,
		Cmdline:   plan.cmdline,
		Transport: cfg.Transport,
		Console:   g.consolePort(),
		Control:   g.controlPort(),
		KVM:       cfg.KVM,
		Logger:    cfg.Logger,
		Devices:   g.devices.all,
	})
	if err == nil {
		err = g.begin(ctx)
	}
	if err != nil {
		g.closeModules()
		return nil, err
	}
	return g, nil
}

// fillDisks gives each disk its contents.
func (c *Config) fillDisks() error {
	c.Disks = slices.Clone(c.Disks)
	for i := range c.Disks {
		if d := &c.Disks[i]; d.Backend == nil {
			if d.COW == nil {
				return fmt.Errorf("disk %s has no contents", diskName(i))
			}
			d.Backend = d.COW
		}
	}
	return nil
}

// newGuest makes a guest without a machine yet, but with its devices and the
// host's end of its control line. modules is the folder of the kernel's, to be
// shared; empty means none.
func newGuest(cfg Config, foreign bool, controlTag, modules string) (*Guest, error) {
	g := &Guest{
		cfg: cfg, log: cfg.Logger, foreign: foreign,
		devices:   devices{log: cfg.Logger},
		console:   newConsoleLog(cfg.Console.Out),
		fromGuest: pipe.New(), toGuest: pipe.New(),
		served: make(chan error, 1),
		done:   make(chan struct{}),
		start:  time.Now(),
	}
	warnings := ratelog.New(g.log)
	g.control = control.NewHost(g.fromGuest, g.toGuest, control.HostConfig{
		Stdin: cfg.Stdin, Stdout: cfg.Stdout, Stderr: cfg.Stderr, OnStart: cfg.OnStart,
		OnWarning: func(text string) { warnings.Warn("guest: " + text) },
	})
	for _, d := range cfg.Disks {
		queues := d.Queues
		if queues == 0 {
			queues = max(cfg.CPUs, 1)
		}
		if err := g.devices.addDisk(d, queues); err != nil {
			return nil, err
		}
	}
	if !cfg.NoTree {
		tree, err := imagefs.New(cfg.Version, g.treeDisks()...)
		if err != nil {
			return nil, err
		}
		if err := g.devices.addShare(TreeTag, tree); err != nil {
			return nil, err
		}
	}
	for _, s := range cfg.Shares {
		if err := g.devices.addShare(s.Tag, s.Attacher); err != nil {
			return nil, err
		}
	}
	for i, n := range cfg.Networks {
		if err := g.devices.addNetwork(i, n, max(cfg.CPUs, 1)); err != nil {
			return nil, err
		}
	}
	if cfg.Vsock != nil {
		g.devices.all = append(g.devices.all, cfg.Vsock)
	}
	if controlTag != "" {
		g.share = newControlShare()
		g.control.AddLine(g.share.toHost, g.share.fromHost)
		if err := g.devices.addShare(controlTag, g.share); err != nil {
			return nil, err
		}
	}
	if modules == "" {
		return g, nil
	}
	var err error
	if g.modules, err = sharefs.New(modules, sharefs.Options{MaxFiles: sharefs.FilesEach(len(cfg.Shares) + 1)}); err != nil {
		return nil, err
	}
	g.modulesDir = modules
	if err := g.devices.addShare(control.ModulesTag, g.modules); err != nil {
		g.closeModules()
		return nil, err
	}
	return g, nil
}

// closeModules ends the sharing of the kernel's modules, when the machine is
// closed or could not be made.
func (g *Guest) closeModules() {
	if g.modules != nil {
		g.modules.Close()
	}
}

func (g *Guest) consolePort() vmm.Serial { return vmm.Serial{In: g.cfg.Console.In, Out: g.console} }
func (g *Guest) controlPort() vmm.Serial { return vmm.Serial{In: g.toGuest, Out: g.fromGuest} }

// begin lets the machine run. After an error there is none any more.
func (g *Guest) begin(ctx context.Context) (err error) {
	go func() { g.served <- g.control.Run() }()
	if g.cfg.BeforeStart != nil {
		err = g.cfg.BeforeStart(g.machine)
	}
	if err == nil {
		err = g.machine.Start()
	}
	if err != nil {
		g.machine.Close()
		g.endControl(ctx)
		return err
	}
	go g.supervise(ctx)
	return nil
}

// DiskResized tells the guest that disk i's backend has another size now.
func (g *Guest) DiskResized(i int) error { return g.devices.disks[i].Resized() }

// treeDisks describes the disks for the metadata tree.
func (g *Guest) treeDisks() []imagefs.Disk {
	var out []imagefs.Disk
	for i, d := range g.cfg.Disks {
		if d.COW == nil {
			continue
		}
		out = append(out, imagefs.Disk{
			Name: diskName(i), Serial: d.Serial, ReadOnly: d.ReadOnly, Image: imagefs.COW(d.COW),
			RevealPaths: g.cfg.RevealPaths,
			Stats:       func() []imagefs.Counter { return g.devices.counters(i) },
		})
	}
	return out
}

// panicSilence is how long a console must be silent after a panic's last line
// before the guest is taken for hung in it.
const panicSilence = 2 * time.Second

// supervise waits for the end, and brings it about when it must.
func (g *Guest) supervise(ctx context.Context) {
	defer close(g.done)
	type ending struct {
		reason vmm.ExitReason
		err    error
	}
	ended := make(chan ending, 1)
	go func() {
		r, err := g.machine.Wait()
		ended <- ending{r, err}
	}()
	var boot <-chan time.Time
	if g.cfg.BootTimeout > 0 && !g.foreign {
		t := time.NewTimer(g.cfg.BootTimeout)
		defer t.Stop()
		boot = t.C
	}
	silence := time.NewTimer(0) // runs after a panic's last line; the first time does no harm
	defer silence.Stop()
	stopped, slow := ctx.Done(), false
	for {
		select {
		case <-stopped:
			stopped = nil
			g.stop()
		case <-boot:
			if !g.up() {
				slow = true
				g.stop()
			}
		case <-g.console.panics:
			silence.Reset(panicSilence)
		case <-silence.C:
			if g.console.hangsInPanic(panicSilence) {
				g.stop()
			}
		case e := <-ended:
			g.endControl(ctx)
			g.finish(ctx, e.reason, e.err, slow)
			return
		}
	}
}

// up says whether the guest has come as far as the BootTimeout is for.
func (g *Guest) up() bool {
	s := g.control.State()
	return s.Hello && (len(g.cfg.Setup) == 0 || s.Started || s.Exited || s.Failure != nil)
}

// hangUp ends what goes to the guest: nobody waits for it any more.
func (g *Guest) hangUp() {
	g.toGuest.Close()
	if g.share != nil {
		g.share.fromHost.Close()
	}
}

// stop ends the machine as if its power failed. The guest may be in the middle
// of a message to the host; it is not held up by whoever takes its output.
func (g *Guest) stop() {
	g.hangUp()
	if g.share != nil {
		g.share.toHost.NoWait()
	}
	g.machine.Stop()
}

// deliverLimit is how long a guest that was stopped waits for its output to be
// taken.
const deliverLimit = 2 * time.Second

// endControl ends the control line and waits until all of the command's output
// is delivered. When the caller wants an end (ctx), it does not wait for ever.
func (g *Guest) endControl(ctx context.Context) {
	g.hangUp()
	g.fromGuest.Close()
	if g.share != nil {
		g.share.toHost.Close()
	}
	var limit <-chan time.Time
	stopped := ctx.Done()
	for {
		select {
		case err := <-g.served:
			if err != nil {
				g.log.Warn("control line", "error", err)
			}
			return
		case <-stopped:
			stopped, limit = nil, time.After(deliverLimit)
		case <-limit:
			g.log.Warn("the guest's output was not taken; some of it is lost")
			return
		}
	}
}

// finish works out what the end means.
func (g *Guest) finish(ctx context.Context, reason vmm.ExitReason, err error, slow bool) {
	s := g.control.State()
	r := Result{Reason: reason, Control: s, Console: g.console.tail(), Took: time.Since(g.start)}
	if s.Exited {
		r.ExitStatus = s.Status
	}
	g.result, g.err = r, g.verdict(ctx, r, err, slow)
}

func (g *Guest) verdict(ctx context.Context, r Result, err error, slow bool) error {
	s := r.Control
	cause, panicked := g.console.panicked()
	bootError := func(kind error, problem string) error {
		return &BootError{Problem: problem, Console: r.Console, Err: kind}
	}
	switch {
	case s.Exited && (s.Bye || r.Reason == vmm.PowerOff):
		return nil // whatever happened on the way down: the command has its status
	case s.Failure != nil:
		return s.Failure
	case panicked && r.Reason != vmm.PowerOff && !(r.Reason == vmm.Stopped && ctx.Err() != nil && !g.console.hangsInPanic(0)):
		return &PanicError{Cause: cause, Console: r.Console}
	case s.Exited:
		return nil
	case r.Reason == vmm.Failed || err != nil:
		if err == nil {
			err = errors.New("for an unknown reason")
		}
		return fmt.Errorf("the machine failed: %w", err)
	case slow && s.Hello:
		return bootError(ErrSlowSetup, fmt.Sprintf("not within %v", g.cfg.BootTimeout))
	case slow:
		return bootError(ErrSlowStart, fmt.Sprintf("not within %v", g.cfg.BootTimeout))
	case r.Reason == vmm.Stopped && ctx.Err() != nil:
		return &StoppedError{After: r.Took, Err: context.Cause(ctx)}
	case g.foreign:
		return nil // not ours: how it ended is all there is
	case !s.Hello:
		return bootError(ErrNoStart, "the machine ended ("+r.Reason.String()+")")
	case g.cfg.Command != nil:
		return bootError(ErrCutShort, "the machine ended ("+r.Reason.String()+")")
	case r.Reason == vmm.Stopped:
		return &StoppedError{After: r.Took, Err: context.Canceled} // Close
	}
	return nil
}

// Wait waits until the guest has ended, and returns what Boot does.
func (g *Guest) Wait() (Result, error) {
	<-g.done
	return g.result, g.err
}

// Control is the line to the guest's init.
func (g *Guest) Control() *control.Host { return g.control }

// Machine is the machine the guest runs in.
func (g *Guest) Machine() *vmm.Machine { return g.machine }

// Kill ends the guest as if its power failed.
func (g *Guest) Kill() { g.stop() }

// Close ends the guest if it runs and releases what it holds. It is
// idempotent.
func (g *Guest) Close() error {
	var err error
	g.once.Do(func() {
		g.stop()
		<-g.done
		err = g.machine.Close()
		g.closeModules()
	})
	return err
}

// plan is what a Config comes to.
type plan struct {
	cmdline string
	initrd  []byte
	init    control.InitConfig
}

// makePlan decides on the kernel command line and builds the initramfs.
func makePlan(cfg *Config) (plan, error) {
	if cfg.Kernel == nil {
		return plan{}, fmt.Errorf("no kernel was given: %w", kernel.ErrNotKernel)
	}
	params := parseBootParams(cfg.Append)
	p := plan{cmdline: kernelCmdline(cfg, params)}
	if cfg.Initrd != nil {
		if cfg.Command != nil {
			return plan{}, errors.New("a command cannot be run in a guest with an initrd of its own; leave one of them out")
		}
		p.initrd = cfg.Initrd
		return p, nil
	}
	p.init = initConfigFor(cfg, params)
	if p.init.Root == nil && p.init.Command == nil {
		return plan{}, errors.New("there is nothing to run: give a disk, or a command, or both")
	}
	modules, err := modulesFor(cfg, p.init)
	if err != nil {
		return plan{}, err
	}
	init := cfg.Init
	if init == "" {
		if init, err = os.Executable(); err != nil {
			return plan{}, fmt.Errorf("init: %w", err)
		}
	}
	files := slices.Clone(cfg.Files)
	if cfg.Scratch {
		config, err := kernelConfig(cfg)
		if err != nil {
			return plan{}, err
		}
		if config != nil {
			p.init.KernelConfig = "/boot/config-" + cfg.Kernel.Release
			files = append(files, initramfs.File{Name: control.KernelConfigPath, Data: config})
		}
	}
	archive := initramfs.Archive{Init: init, Libraries: true, Config: &p.init, Modules: modules, Files: files}
	p.initrd, err = archive.Bytes()
	return p, err
}

// kernelCmdline is the kernel command line. Of a parameter that is given
// twice, the kernel takes the last, so what the user appends wins.
func kernelCmdline(cfg *Config, params bootParams) string {
	// pci=noearly: on some AMD processors the kernel looks for an AGP bridge on
	// 256 buses, twice; that is 33 000 port exits for hardware we do not have.
	words := []string{"console=ttyS0", "panic=-1", "pci=noearly", "quiet"}
	if len(cfg.Disks) > 0 && params.root.Device == "" {
		words = append(words, "root=/dev/vda")
	}
	if params.readOnly == nil && len(cfg.Disks) > 0 {
		if cfg.Disks[0].ReadOnly {
			words = append(words, "ro")
		} else {
			words = append(words, "rw")
		}
	}
	if cfg.Append != "" {
		words = append(words, cfg.Append)
	}
	return strings.Join(words, " ")
}

// initConfigFor tells the init what the configuration wants.
func initConfigFor(cfg *Config, params bootParams) control.InitConfig {
	c := control.InitConfig{
		Version:  control.ConfigVersion,
		Control:  "/dev/ttyS1",
		Command:  cfg.Command,
		Hostname: cfg.Hostname,
		Init:     params.init,

		CorePattern: cfg.CorePattern,
		Setup:       cfg.Setup,
		Scratch:     cfg.Scratch,
	}
	if cfg.Modules != nil && cfg.Modules.Has("9p") && cfg.Modules.Has("9pnet_virtio") {
		c.ModulesShare = control.ModulesTag
	}
	if cfg.Command != nil {
		c.ControlShare = control.ShareTag
		for _, n := range cfg.Networks { // the disk's init has a network service of its own
			c.Networks = append(c.Networks, control.Network{MAC: n.MAC.String(), Address: n.Address, Gateway: n.Gateway, DNS: n.DNS})
		}
	}
	switch {
	case cfg.NoRoot:
	case cfg.Root != nil:
		root := *cfg.Root
		c.Root = &root
	case len(cfg.Disks) > 0 || params.root.Device != "":
		root := params.root
		if root.Device == "" {
			root.Device = "/dev/vda"
		}
		if params.readOnly != nil {
			root.ReadOnly = *params.readOnly
		}
		c.Root = &root
	}
	if !cfg.NoTree {
		c.Mounts = append(c.Mounts, control.Mount{Source: TreeTag, Target: TreePath, Type: "9p",
			Options: shareOptions + ",ro,nosuid,nodev,noexec,cache=none", Optional: true})
	}
	c.Mounts = append(c.Mounts, cfg.Mounts...)
	for _, s := range cfg.Shares {
		if s.Target == "" {
			continue
		}
		options := control.JoinOptions(shareOptions, s.Options)
		switch {
		case s.ReadOnly || s.Overlay:
			options += ",ro"
		case !strings.Contains(s.Options, "cache="):
			options += ",cache=mmap" // without it nothing can be written through a mapping: linkers do that
		}
		c.Mounts = append(c.Mounts, control.Mount{Source: s.Tag, Target: s.Target, Type: "9p", Options: options, Overlay: s.Overlay})
	}
	return c
}

// shareOptions are the mount options of 9P shares.
const shareOptions = "trans=virtio,version=9p2000.L,msize=262144"

// modulesFor picks the modules that the guest needs.
func modulesFor(cfg *Config, init control.InitConfig) ([]kmod.ModuleFile, error) {
	m := cfg.Modules
	if m == nil {
		if len(cfg.LoadModules) > 0 {
			return nil, fmt.Errorf("module %s cannot be loaded: there is no modules folder for the kernel: %w", cfg.LoadModules[0], kmod.ErrNoModules)
		}
		return nil, nil
	}
	var need, like []string
	transport := "virtio_pci"
	if cfg.Transport == vmm.TransportMMIO {
		transport = "virtio_mmio"
	}
	if len(cfg.Disks) > 0 || len(cfg.Shares) > 0 || len(cfg.Networks) > 0 || cfg.Vsock != nil {
		need = append(need, transport)
	}
	if len(cfg.Networks) > 0 {
		need = append(need, "virtio_net")
	}
	if cfg.Vsock != nil {
		need = append(need, "vmw_vsock_virtio_transport")
	}
	if len(cfg.Disks) > 0 {
		need = append(need, "virtio_blk")
		types, known := diskTypes(cfg.Disks)
		need = append(need, known...)
		like = append(like, types...)
	}
	if init.Root != nil && init.Root.Type != "" {
		like = append(like, init.Root.Type, "fs-"+init.Root.Type)
	}
	overlaid := func(s Share) bool { return s.Overlay }
	if init.Root != nil && init.Root.Overlay || slices.ContainsFunc(cfg.Shares, overlaid) {
		need = append(need, "overlay")
	}
	share := []string{"9pnet_virtio", "9p"}
	if len(cfg.Shares) > 0 {
		need = append(need, share...)
	} else if !cfg.NoTree || init.ControlShare != "" || init.ModulesShare != "" {
		like = append(like, append([]string{transport}, share...)...)
	}
	if init.Command != nil && init.Scratch {
		like = append(like, "configfs") // a file system that is there before anybody mounts it
	}
	if init.Command == nil {
		like = append(like, "autofs4")         // systemd's automount units
		like = append(like, "button", "evdev") // the power button, and what tells logind of it
	}
	needed, err := m.Resolve(append(need, cfg.LoadModules...)...)
	if err != nil {
		return nil, err
	}
	liked, err := m.ResolveOptional(like...)
	if err != nil {
		return nil, err
	}
	for i := range liked {
		liked[i].Optional = true
	}
	return kmod.MergeModules(needed, liked), nil
}

// diskTypes looks for file systems on the disks. Those that were found must be
// mountable; a disk with partitions may have anything, most likely ext4.
func diskTypes(disks []Disk) (like, need []string) {
	for _, d := range disks {
		switch t := blkid.Probe(d.Backend).Type; t {
		case "":
			like = append(like, "ext4")
		case "ext2", "ext3":
			need = append(need, "ext4")
		default:
			need = append(need, t)
		}
	}
	slices.Sort(like)
	slices.Sort(need)
	return slices.Compact(like), slices.Compact(need)
}

// diskName is the guest's name of disk i.
func diskName(i int) string { return imagefs.DiskName(i) }
