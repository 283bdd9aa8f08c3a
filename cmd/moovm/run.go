package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/sharefs"
	"github.com/moovm/moovm/internal/confine"
	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/internal/reexec"
	"github.com/moovm/moovm/internal/sandbox"
	"github.com/moovm/moovm/vmm"
)

// machineFlags describe the guest on the command line.
type machineFlags struct {
	kernel, modules, initrd, append string
	disks                           []string
	base                            string
	shares                          []string
	memory                          sizeFlag
	cpus                            int
	noTree                          bool
	timeout                         time.Duration
	console                         string
	accel                           string
	virtio                          string
	metrics                         string
	noConfine                       bool
	images                          imageFlags

	// What check made of disks, shares and metrics.
	diskFlags     []diskFlag
	shareFlags    []shareFlag
	metricsSocket string
}

func (m *machineFlags) register(f *pflag.FlagSet) {
	m.memory = guest.DefaultMemory
	f.StringVar(&m.kernel, "kernel", "", "kernel `FILE`: vmlinuz (bzImage) or ELF vmlinux (default: $MOOVM_KERNEL, or the cached one)")
	f.StringVar(&m.modules, "modules", "", "the kernel's modules `DIR` (default: beside the kernel, or /lib/modules)")
	f.StringVar(&m.initrd, "initrd", "", "initrd `FILE` instead of moovm's own init")
	f.StringVar(&m.append, "append", "", "added to the kernel's command line: `\"ARG…\"`")
	f.StringArrayVar(&m.disks, "disk", nil, "`FILE[,ro][,serial=NAME][,format=raw|cow]` (repeatable); the first is /dev/vda")
	f.StringVar(&m.base, "base", "", "an ephemeral overlay on `FILE` as /dev/vda, gone when the machine stops")
	f.StringArrayVar(&m.shares, "share", nil, "`TAG=DIR[,rw]`: a folder of this machine, at /mnt/TAG in the guest (repeatable); read-only unless rw")
	f.Var(&m.memory, "memory", "the guest's memory")
	f.IntVar(&m.cpus, "cpus", 1, "the guest's processors")
	f.BoolVar(&m.noTree, "no-9p", false, "leave the metadata tree out")
	f.DurationVar(&m.timeout, "timeout", 0, "stop the machine after `TIME`, such as 60s (exit status 124)")
	f.StringVar(&m.console, "console", "", "write the serial console to `FILE` (- for standard output)")
	f.StringVar(&m.accel, "accel", "auto", "auto, kvm or sandbox: where the machine runs")
	f.StringVar(&m.virtio, "virtio", "pci", "pci or mmio: how disks and shares are attached to the machine")
	f.StringVar(&m.metrics, "metrics", "", "`unix:PATH` of a socket to make, where Prometheus can read the machine's counters by HTTP")
	f.BoolVar(&m.noConfine, "no-confine", false, noConfineHelp)
	m.images.register(f)
}

// check finds what is wrong with the flags alone, and takes them apart.
func (m *machineFlags) check() error {
	switch m.accel {
	case "auto", "kvm", "sandbox":
	default:
		return fmt.Errorf("--accel %s: use auto, kvm or sandbox", m.accel)
	}
	switch m.virtio {
	case "pci", "mmio":
	default:
		return fmt.Errorf("--virtio %s: use pci or mmio", m.virtio)
	}
	if m.base != "" && len(m.disks) > 0 {
		// Both would want to be /dev/vda.
		return errors.New("--base is the root disk by itself; leave --base or --disk out")
	}
	if m.timeout < 0 {
		return fmt.Errorf("--timeout %v: a time cannot be negative", m.timeout)
	}
	if m.metrics != "" {
		var ok bool
		if m.metricsSocket, ok = strings.CutPrefix(m.metrics, "unix:"); !ok || m.metricsSocket == "" {
			return fmt.Errorf("--metrics %s: write unix:PATH", m.metrics)
		}
	}
	for _, d := range m.disks {
		f, err := parseDisk(d)
		if err != nil {
			return err
		}
		m.diskFlags = append(m.diskFlags, f)
	}
	tags := make(map[string]bool)
	for _, s := range m.shares {
		f, err := parseShare(s)
		if err != nil {
			return err
		}
		if tags[f.tag] {
			return fmt.Errorf("--share: the tag %s is used twice", f.tag)
		}
		tags[f.tag] = true
		m.shareFlags = append(m.shareFlags, f)
	}
	return nil
}

func newRunCommand(g *globals) *cobra.Command {
	m := &machineFlags{}
	cmd := &cobra.Command{
		Use:   "run [flags] [-- COMMAND [ARG…]]",
		Short: "Boot a guest on a disk, or run one command in it",
		Long: `Boots a Linux kernel in moovm's own KVM machine. Without COMMAND the disk's init
(systemd) takes over and this terminal is the guest's serial console; Ctrl-A x
stops the machine, Ctrl-A h shows help. With COMMAND, that runs on the root
disk, and its standard streams and exit status are this program's.

The first interrupt (SIGINT, SIGTERM) of a machine without COMMAND presses its
power button, the second stops it at once; with COMMAND the first one stops it.

Once everything is open, this process confines itself, where the kernel can
(Landlock, a seccomp filter, no new privileges): a guest that breaks out of its
machine can open no file, but those of its shares, start no program and make no
connection. --no-confine leaves that out. In the sandbox the same happens to
the process that runs the machine; QEMU around it is not confined.

The disk's metadata is in the guest at /run/moovm. Where this machine's KVM is
missing or cannot run a kernel, the same happens in the sandbox (moovm help
sandbox), which is slower; --accel chooses.

Exit status: COMMAND's; 124 timeout, 125 the machine could not run or ended too
early, 126 kernel panic, 130 interrupted; 0 after a power-off.`,
		Example: `  moovm run --kernel vmlinuz --disk root.cow
  moovm run --kernel vmlinuz --base base.img -- sh -c 'uname -a; exit 7'
  moovm run --kernel vmlinuz --disk root.cow --metrics unix:root.metrics
  moovm run --kernel vmlinuz --disk root.cow --disk data.img,format=raw,ro --memory 2G --timeout 5m -- make check`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if dash := cmd.ArgsLenAtDash(); len(args) > 0 && dash != 0 {
				return usageError(fmt.Errorf("moovm run: %q is not a flag; write -- before the guest's command", args[0]))
			}
			if len(args) > 0 && m.initrd != "" {
				return usageError(errors.New("moovm run: an initrd of your own cannot run a COMMAND; leave --initrd or COMMAND out"))
			}
			if err := m.check(); err != nil {
				return usageError(fmt.Errorf("moovm run: %w", err))
			}
			status, err := m.run(cmd.Context(), g, args)
			if err != nil || status != 0 {
				return &statusError{status, err}
			}
			return nil
		},
	}
	m.register(cmd.Flags())
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// run boots the guest here or in the sandbox and returns the exit status.
func (m *machineFlags) run(ctx context.Context, g *globals, args []string) (int, error) {
	c := guest.Config{
		Memory: int64(m.memory), CPUs: m.cpus, Append: m.append, NoTree: m.noTree,
		Version: version, Logger: g.logger(),
	}
	if m.virtio == "mmio" {
		c.Transport = vmm.TransportMMIO
	}
	// Everything that can be wrong is looked at first, on this side of the
	// sandbox. The disks stay locked while the sandbox works on them.
	closeAll, err := m.open(&c)
	defer closeAll()
	if err != nil {
		return guest.StatusCannotRun, err
	}
	sandboxed, err := m.chooseSandbox(ctx, g)
	if err != nil {
		return guest.StatusCannotRun, err
	}
	if sandboxed {
		if m.metrics != "" {
			return guest.StatusCannotRun, errors.New("--metrics: the socket would be in the sandbox, where nobody can reach it; leave it out, or use --accel kvm")
		}
		status, err := m.runSandboxed(ctx, g, len(args) > 0)
		if err != nil {
			return guest.StatusCannotRun, err
		}
		return status, nil
	}
	return m.boot(ctx, g, c, args)
}

// open opens the kernel, the modules, the initrd and the disks.
func (m *machineFlags) open(c *guest.Config) (closeAll func(), err error) {
	var closers []io.Closer
	closeAll = func() {
		for _, cl := range closers {
			cl.Close()
		}
	}
	if m.kernel == "" {
		if m.kernel, err = host.Kernel(); err != nil {
			return closeAll, err
		}
	}
	if c.Kernel, err = guest.LoadKernel(m.kernel); err != nil {
		return closeAll, err
	}
	closers = append(closers, c.Kernel)
	switch {
	case m.initrd != "":
		if c.Initrd, err = m.readInitrd(); err != nil {
			return closeAll, err
		}
	case m.modules != "":
		if c.Modules, err = guest.OpenModules(m.modules, c.Kernel.Release); err != nil {
			return closeAll, err
		}
	default:
		// A kernel may have all it needs built in.
		if c.Modules, err = guest.FindModules(c.Kernel); err != nil && !errors.Is(err, guest.ErrNoModules) {
			return closeAll, err
		}
	}
	if m.base != "" {
		d, err := openEphemeral(m.base, m.images.options())
		if err != nil {
			return closeAll, err
		}
		closers = append(closers, d)
		c.Disks = append(c.Disks, guest.Disk{COW: d})
	}
	for _, f := range m.diskFlags {
		d, err := f.open(m.images.options())
		if err != nil {
			return closeAll, err
		}
		closers = append(closers, d)
		c.Disks = append(c.Disks, guest.Disk{COW: d, ReadOnly: f.readOnly, Serial: f.serial})
	}
	for i, f := range m.shareFlags {
		s, err := sharefs.New(f.dir, sharefs.Options{Writable: f.writable})
		if err != nil {
			return closeAll, fmt.Errorf("--share %s: %w", m.shares[i], err)
		}
		closers = append(closers, s)
		c.Shares = append(c.Shares, guest.Share{Tag: f.tag, Attacher: s, Target: f.target(), ReadOnly: !f.writable})
	}
	return closeAll, nil
}

// readInitrd reads the initrd if the guest's memory can hold it.
func (m *machineFlags) readInitrd() ([]byte, error) {
	st, err := os.Stat(m.initrd)
	if err != nil {
		return nil, fmt.Errorf("initrd: %w", err)
	}
	if st.Size() > int64(m.memory) {
		return nil, fmt.Errorf("initrd %s: its %s do not fit into the guest's memory of %s; raise --memory", m.initrd,
			humanize.IBytes(uint64(st.Size())), humanize.IBytes(uint64(m.memory)))
	}
	b, err := os.ReadFile(m.initrd)
	if err != nil {
		return nil, fmt.Errorf("initrd: %w", err)
	}
	return b, nil
}

// chooseSandbox decides where the machine runs, and says so if it is not where
// one would think.
func (m *machineFlags) chooseSandbox(ctx context.Context, g *globals) (bool, error) {
	place, err := host.Choose(ctx, m.accel, guest.ProbeKVM)
	var none *host.NoKVMError
	if errors.As(err, &none) {
		return false, fmt.Errorf("%s; use --accel sandbox, or see moovm doctor", none.Reason)
	}
	if err == nil && place.Reason != "" && !g.quiet {
		fmt.Fprintf(os.Stderr, "moovm: running in the sandbox, which is slower: %s\n", place.Reason)
	}
	return place.Sandbox, err
}

// runSandboxed runs this same command line on an emulated host.
func (m *machineFlags) runSandboxed(ctx context.Context, g *globals, command bool) (int, error) {
	program, err := reexec.Path()
	if err != nil {
		return 0, err
	}
	// Memory for the guest, for what it writes to an ephemeral overlay, and
	// for the emulated host itself.
	c := sandbox.Config{
		Memory: max(sandbox.DefaultMemory, 2*int64(m.memory)+2<<30),
		Logger: g.logger(),
	}
	if c.Kernel, err = host.SandboxKernel(m.kernel); err != nil {
		return 0, err
	}
	for _, f := range m.diskFlags {
		if !f.readOnly {
			if err := addFolder(&c.Writable, f.path); err != nil {
				return 0, err
			}
		}
	}
	for _, f := range m.shareFlags {
		if f.writable {
			dir, err := absPath(f.dir)
			if err != nil {
				return 0, err
			}
			c.Writable = append(c.Writable, dir)
		}
	}
	if m.console != "" && m.console != "-" {
		if err := addFolder(&c.Writable, m.console); err != nil {
			return 0, err
		}
	}
	if !command {
		var done func()
		ctx, c.Signals, done = passSignals(ctx)
		defer done()
	}
	return runInSandbox(ctx, c, append([]string{program}, os.Args[1:]...))
}

// addFolder adds the folder that file is in.
func addFolder(folders *[]string, file string) error {
	path, err := absPath(file)
	if err != nil {
		return err
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	dir := filepath.Dir(path)
	for _, have := range *folders {
		if have == dir {
			return nil
		}
	}
	*folders = append(*folders, dir)
	return nil
}

func absPath(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return abs, nil
}

// boot runs the guest in this process.
func (m *machineFlags) boot(ctx context.Context, g *globals, c guest.Config, args []string) (int, error) {
	if len(args) == 0 {
		if ctx.Err() != nil {
			return exitInterrupted, errInterrupted
		}
		ctx = context.WithoutCancel(ctx) // by signals: the guest is asked first
	}
	if m.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, m.timeout, fmt.Errorf("--timeout %v: %w", m.timeout, context.DeadlineExceeded))
		defer cancel()
	}
	ctx, quit := context.WithCancelCause(ctx)
	defer quit(nil)

	if m.console != "" && m.console != "-" {
		f, err := os.Create(m.console)
		if err != nil {
			return guest.StatusCannotRun, fmt.Errorf("--console: %w", err)
		}
		defer f.Close()
		c.Console.Out = f
	}
	needs, err := m.needs()
	if err != nil {
		return guest.StatusCannotRun, err
	}
	var counters *metricsServer
	if m.metrics != "" {
		if counters, err = listenMetrics(m.metricsSocket); err != nil {
			return guest.StatusCannotRun, fmt.Errorf("--metrics: %w", err)
		}
		defer counters.Close()
	}
	log := c.Logger
	c.BeforeStart = func(machine *vmm.Machine) error { // does not mention c, which would keep all that is in it
		giveMemoryBack()
		spareProcessor()
		if counters != nil {
			counters.Serve(machine.Stats)
		}
		if m.noConfine || !g.mayConfine {
			return nil
		}
		return confineSelf(log, needs)
	}
	restore := func() {}
	if len(args) > 0 {
		dir := "/"
		c.Command = &guest.Command{Args: args, Dir: dir}
		c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
		if m.console == "-" {
			c.Console.Out = os.Stdout
		}
	} else {
		raw, r, err := rawTerminal()
		if err != nil {
			return guest.StatusCannotRun, err
		}
		restore = r
		defer restore()
		if c.Console.Out == nil {
			c.Console.Out = os.Stdout
		}
		c.Console.In = os.Stdin
		if raw {
			c.Console.In = &escapeReader{in: os.Stdin, help: os.Stdout, quit: func() { quit(errQuit) }}
		}
	}
	result, err := m.bootAndWait(ctx, c, func() { quit(errInterrupted) })
	restore()
	if errors.Is(err, errQuit) {
		fmt.Fprintln(os.Stderr, "moovm: stopped")
		return 0, nil
	}
	log.Log(ctx, slog.LevelInfo, "guest ended", "reason", result.Reason.String(), "took", result.Took)
	var failed *vmm.VCPUError
	if errors.As(err, &failed) {
		fmt.Fprint(os.Stderr, failed.Registers())
	}
	var stopped *guest.StoppedError
	if errors.As(err, &stopped) && !errors.Is(err, context.DeadlineExceeded) {
		return exitInterrupted, err
	}
	return guest.ExitStatus(result, err), err
}

// bootAndWait is guest.Boot with the power button at the first interrupt of a
// guest that runs no command.
func (m *machineFlags) bootAndWait(ctx context.Context, c guest.Config, stop func()) (guest.Result, error) {
	alone := c.Command == nil // c is not used after Start, so what is in it can go
	g, err := guest.Start(ctx, c)
	if err != nil {
		return guest.Result{}, err
	}
	defer g.Close()
	if alone {
		defer askFirst(os.Stderr, g.Machine().PowerButton, stop)()
	}
	return g.Wait()
}

// needs is what this process still has to open while the guest runs.
func (m *machineFlags) needs() (confine.Needs, error) {
	var n confine.Needs
	for _, s := range m.shareFlags {
		dir, err := absPath(s.dir)
		if err != nil {
			return n, err
		}
		if s.writable {
			n.Write = append(n.Write, dir)
		} else {
			n.Read = append(n.Read, dir)
		}
	}
	if m.metrics != "" {
		dir, err := absPath(filepath.Dir(m.metricsSocket))
		if err != nil {
			return n, err
		}
		n.Remove, n.Sockets = []string{dir}, true
	}
	return n, nil
}

// errQuit is the cause of a stop by Ctrl-A x.
var errQuit = errors.New("stopped from the keyboard")
