package guestinit

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/moovm/moovm/guest/control"
	"golang.org/x/sys/unix"
)

// Main is the init of a guest: it does what the InitConfig in the
// initramfs says, and never returns. Whatever goes wrong is reported on the
// control line and on the console before the machine is switched off; the
// kernel never panics because its init ended.
//
//	start ─▶ modules ─▶ root disk ─▶ mounts ─┬▶ exec the disk's init
//	                                         └▶ command ─▶ status ─▶ unmount ─▶ power off
func Main() {
	switch {
	case isAgent():
		agentMain()
	case isModprobe():
		modprobeMain(os.Args[3])
	}
	in := &initProcess{}
	defer func() {
		if r := recover(); r != nil {
			in.fail(control.FailInternal, fmt.Errorf("the init crashed: %v\n%s", r, debug.Stack()))
		}
	}()
	in.run()
}

// initProcess is PID 1.
type initProcess struct {
	cfg  control.InitConfig
	line *guestLine // nil: no control line

	kernelConfig []byte // taken from the initramfs, for the root file system
}

// stageError is a failure with its kind.
type stageError struct {
	kind   string
	status int
	err    error
}

func (e *stageError) Error() string { return e.err.Error() }
func (e *stageError) Unwrap() error { return e.err }

func stage(kind string, err error) error {
	if err == nil {
		return nil
	}
	return &stageError{kind: kind, err: err}
}

func (in *initProcess) run() {
	err := in.steps()
	var s *stageError
	if errors.As(err, &s) {
		in.failStatus(s.kind, s.status, err)
	}
	in.fail(control.FailInternal, err)
}

// steps returns only when something went wrong.
func (in *initProcess) steps() error {
	// Whoever sends ctrl-alt-del or the like means the guest, not this process.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)
	for _, m := range []control.Mount{
		{Source: "proc", Target: "/proc", Type: "proc", Options: "nosuid,nodev,noexec"},
		{Source: "sysfs", Target: "/sys", Type: "sysfs", Options: "nosuid,nodev,noexec"},
		{Source: "devtmpfs", Target: "/dev", Type: "devtmpfs", Options: "nosuid,mode=755"},
	} {
		if err := mountOne(m); err != nil && !errors.Is(err, unix.EBUSY) {
			return stage(control.FailMount, err)
		}
	}
	b, err := os.ReadFile(control.ConfigPath)
	if err != nil {
		return stage(control.FailConfig, err)
	}
	cfg, parseErr := control.ParseInitConfig(b)
	in.cfg = cfg
	in.openLine(0)
	if parseErr != nil {
		return stage(control.FailConfig, parseErr)
	}
	err = in.loadModules()
	in.openLine(5 * time.Second) // its driver may have been one of them
	if err != nil {
		return stage(control.FailModule, err)
	}
	in.fasterLine()
	if err := in.readKernelConfig(); err != nil {
		return stage(control.FailConfig, err)
	}
	if cfg.Root != nil {
		if err := in.enterRoot(*cfg.Root); err != nil {
			return stage(control.FailRoot, err)
		}
	}
	if err := in.mounts(); err != nil {
		return stage(control.FailMount, err)
	}
	in.modulesOnDemand()
	in.addKernelConfig()
	if cfg.Hostname != "" {
		_ = unix.Sethostname([]byte(cfg.Hostname))
	}
	in.networks()
	if cfg.Command == nil {
		return stage(control.FailInit, in.handOver())
	}
	return in.runCommand(*cfg.Command)
}

// openLine opens the control line unless it is open, waiting for its device.
func (in *initProcess) openLine(wait time.Duration) {
	if in.cfg.Control == "" || in.line != nil {
		return
	}
	for deadline := time.Now().Add(wait); ; time.Sleep(5 * time.Millisecond) {
		l, err := openGuestLine(in.cfg.Control)
		if err == nil {
			in.line = l
			in.line.hello()
			return
		}
		if errors.Is(err, fs.ErrNotExist) && time.Now().Before(deadline) {
			continue
		}
		if wait > 0 || !errors.Is(err, fs.ErrNotExist) {
			in.console("no control line: " + err.Error())
		}
		return
	}
}

// fasterLine changes to the share that is a control line, if there is one and
// the kernel can mount it. A serial port costs the machine an exit for every
// byte, a share one for every message.
func (in *initProcess) fasterLine() {
	if in.cfg.ControlShare == "" {
		return
	}
	l, err := openControlShare(in.cfg.ControlShare)
	if err != nil {
		return // no 9P in this kernel: the serial port does as well
	}
	in.line.drain()
	in.line = l
	l.hello()
}

// loadModules loads the modules of the initramfs in order.
func (in *initProcess) loadModules() error {
	line, _ := os.ReadFile("/proc/cmdline")
	for _, m := range in.cfg.Modules {
		err := loadKernelModule(m.Path, moduleParams(string(line), m.Name))
		if err == nil || m.Optional {
			continue
		}
		switch {
		case errors.Is(err, unix.ENOEXEC):
			err = fmt.Errorf("%w; is it for this kernel (%s)?", err, unameRelease())
		case errors.Is(err, unix.ENOSYS):
			err = fmt.Errorf("%w; this kernel takes no modules", err)
		}
		return fmt.Errorf("kernel module %s cannot be loaded: %w", m.Name, err)
	}
	return nil
}

// LoadKernelModule loads one unpacked module into the running kernel
// (finit_module(2)). That it is there already is no error.
func loadKernelModule(path, params string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), params, 0)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

func unameRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// sysroot is where the root disk is mounted before it becomes /.
const sysroot = "/sysroot"

// enterRoot waits for the root device, mounts it and makes it the root of this
// process. The initramfs is emptied, so that its memory is free again.
func (in *initProcess) enterRoot(root control.Root) error {
	target := sysroot
	if root.Overlay {
		target = "/lower"
	}
	for _, d := range []string{sysroot, target} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if root.Type == "9p" {
		if err := mountShare(root, target); err != nil {
			return err
		}
	} else {
		dev, err := waitForRoot(root)
		if err != nil {
			return err
		}
		if err := mountRoot(dev, root, target); err != nil {
			return err
		}
	}
	if root.Overlay {
		if err := mountOverlay(target); err != nil {
			return err
		}
	}
	keep := in.modprobeFile() // while /proc is still here
	for _, m := range []string{"/dev", "/proc", "/sys"} {
		to := sysroot + m
		_ = os.Mkdir(to, 0o755) // there, or the disk is read-only
		if err := unix.Mount(m, to, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("the root disk %s has no folder %s: %w", root.Device, m, err)
		}
	}
	emptyInitramfs(keep)
	if err := os.Chdir(sysroot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("the root disk cannot become /: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

// mountOverlay puts a file system in memory over lower, at sysroot.
func mountOverlay(lower string) error {
	const upper = "/upper"
	if err := os.Mkdir(upper, 0o755); err != nil {
		return err
	}
	if err := mountOne(control.Mount{Source: "tmpfs", Target: upper, Type: "tmpfs", Options: "mode=755,size=90%"}); err != nil {
		return err
	}
	for _, d := range []string{"/data", "/work"} {
		if err := os.Mkdir(upper+d, 0o755); err != nil {
			return err
		}
	}
	return mountOne(control.Mount{Source: "overlay", Target: sysroot, Type: "overlay",
		Options: "lowerdir=" + lower + ",upperdir=" + upper + "/data,workdir=" + upper + "/work"})
}

// mountShare mounts a 9P share as root file system. It waits, because the tag
// is there only when the driver has found the device.
func mountShare(root control.Root, target string) error {
	m := control.Mount{Source: root.Device, Target: target, Type: root.Type, Options: control.JoinOptions("trans=virtio,version=9p2000.L", root.Options)}
	if root.ReadOnly {
		m.Options = control.JoinOptions("ro", m.Options)
	}
	deadline := time.Now().Add(root.Wait())
	for {
		err := mountOne(m)
		if !errors.Is(err, unix.ENOENT) || time.Now().After(deadline) {
			if err != nil {
				return fmt.Errorf("the root share %s cannot be mounted: %w", root.Device, err)
			}
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// waitForRoot waits until the root device is there.
func waitForRoot(root control.Root) (blockDevice, error) {
	spec, err := parseRootSpec(root.Device)
	if err != nil {
		return blockDevice{}, err
	}
	open := func(name string) (readAtCloser, error) { return os.Open(filepath.Join("/dev", name)) }
	deadline := time.Now().Add(root.Wait())
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		devs := listBlockDevices("/sys/class/block", open)
		for _, d := range devs {
			if spec.matches(d) {
				return d, nil
			}
		}
		if time.Now().After(deadline) {
			return blockDevice{}, noRootError(root.Device, devs, int(root.Wait()/time.Second))
		}
		time.Sleep(pause)
	}
}

func mountRoot(dev blockDevice, root control.Root, target string) error {
	types := []string{root.Type}
	if root.Type == "" {
		types = []string{dev.FS.Type}
	}
	if types[0] == "" {
		if types = diskFilesystems(); len(types) == 0 {
			types = []string{"ext4"}
		}
	}
	if types[0] == "ext2" || types[0] == "ext3" {
		types = append([]string{"ext4"}, types...) // ext4 mounts both
	}
	var first error
	for _, t := range types {
		m := control.Mount{Source: "/dev/" + dev.Name, Target: target, Type: t, Options: root.Options}
		if root.ReadOnly || dev.ReadOnly {
			m.Options = control.JoinOptions("ro", m.Options)
		}
		err := mountOne(m)
		if !root.ReadOnly && !dev.ReadOnly && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EROFS)) {
			m.Options = control.JoinOptions("ro", m.Options) // it cannot be written after all
			err = mountOne(m)
		}
		if err == nil {
			return nil
		}
		if first == nil || !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENODEV) {
			first = err
		}
	}
	if errors.Is(first, unix.ENODEV) {
		return fmt.Errorf("the root device %s has file system %s, which this kernel does not know; is its module missing?", dev, types[0])
	}
	if dev.FS.Type == "" && root.Type == "" {
		return fmt.Errorf("the root device %s has no file system that is known here; if it has partitions, name one: %w", dev, first)
	}
	return fmt.Errorf("the root device %s cannot be mounted: %w", dev, first)
}

// diskFilesystems are the types the kernel knows for disks.
func diskFilesystems() []string {
	b, _ := os.ReadFile("/proc/filesystems")
	var out []string
	for line := range strings.Lines(string(b)) {
		if t := strings.TrimSpace(line); !strings.HasPrefix(line, "nodev") && t != "" {
			out = append(out, t)
		}
	}
	return out
}

// emptyInitramfs removes all files of the initramfs but the one to be kept, and
// not what is mounted over it. The running program stays in memory until it
// ends.
func emptyInitramfs(keep string) {
	var root unix.Stat_t
	if unix.Lstat("/", &root) != nil {
		return
	}
	_ = filepath.WalkDir("/", func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == "/" {
			return nil
		}
		var st unix.Stat_t
		if unix.Lstat(p, &st) != nil {
			return nil
		}
		if st.Dev != root.Dev {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if !d.IsDir() && p != keep {
			_ = unix.Unlink(p)
		}
		return nil
	})
}

// mounts mounts /run and what the configuration lists.
func (in *initProcess) mounts() error {
	run := control.Mount{Source: "tmpfs", Target: "/run", Type: "tmpfs", Options: "nosuid,nodev,mode=755", Optional: true}
	for _, m := range append([]control.Mount{run}, in.cfg.Mounts...) {
		err := mountAt(m)
		if err != nil {
			err = fmt.Errorf("%s is not mounted at %s: %w", m.Source, m.Target, err)
			if !m.Optional {
				return err
			}
			in.line.warn(err.Error())
		}
	}
	return nil
}

// overlays is where the parts of overlaid mounts are, on the tmpfs of /run.
const overlays = "/run/moovm-overlay"

// mountAt mounts m where it belongs, and makes the place first.
func mountAt(m control.Mount) error {
	if err := makeMountPoint(m); err != nil {
		return err
	}
	if !m.Overlay {
		return mountOne(m)
	}
	if err := os.MkdirAll(overlays, 0o700); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(overlays, "")
	if err != nil {
		return err
	}
	for _, d := range []string{"/lower", "/upper", "/work"} {
		if err := os.Mkdir(dir+d, 0o755); err != nil {
			return err
		}
	}
	lower := m
	lower.Target, lower.Overlay = dir+"/lower", false
	if err := mountOne(lower); err != nil {
		return err
	}
	return mountOne(control.Mount{Source: "overlay", Target: m.Target, Type: "overlay",
		Options: "lowerdir=" + dir + "/lower,upperdir=" + dir + "/upper,workdir=" + dir + "/work"})
}

// makeMountPoint makes the folder to mount on, or the file when a file is to
// be bound there.
func makeMountPoint(m control.Mount) error {
	if flags, _ := parseMountOptions(m.Options); flags&unix.MS_BIND != 0 {
		if st, err := os.Stat(m.Source); err == nil && !st.IsDir() {
			if err := os.MkdirAll(filepath.Dir(m.Target), 0o755); err != nil {
				return err
			}
			f, err := os.OpenFile(m.Target, os.O_CREATE|os.O_RDONLY, 0o755)
			if err != nil {
				return err
			}
			return f.Close()
		}
	}
	return os.MkdirAll(m.Target, 0o755)
}

// inits are the programs tried as the disk's init, the kernel's own list.
var inits = [...]string{"/sbin/init", "/etc/init", "/bin/init", "/bin/sh"}

// handOver replaces this process with the disk's init.
func (in *initProcess) handOver() error {
	candidates := inits[:]
	if in.cfg.Init != "" {
		candidates = []string{in.cfg.Init}
	}
	env := []string{"HOME=/", "TERM=linux", "PATH=" + defaultPath}
	var last error
	for _, p := range candidates {
		if err := unix.Access(p, unix.X_OK); err != nil {
			last = err
			continue
		}
		in.line.start(p)
		in.line.drain()
		last = syscall.Exec(p, append([]string{p}, os.Args[1:]...), env)
	}
	return fmt.Errorf("the root disk has no init that starts (tried %s): %w; name one with init= or give a command",
		strings.Join(candidates, ", "), last)
}

// fail reports the failure and switches the machine off.
func (in *initProcess) fail(kind string, err error) {
	in.failStatus(kind, 0, err)
}

func (in *initProcess) failStatus(kind string, status int, err error) {
	in.console(err.Error())
	in.line.fail(control.GuestError{Kind: kind, Message: err.Error(), Status: status})
	in.powerOff()
}

// console writes one line to the kernel's console.
func (in *initProcess) console(text string) {
	fmt.Fprintf(os.Stderr, "\nmoovm: %s\n", text)
}

// powerOff ends the machine. File systems are left clean.
func (in *initProcess) powerOff() {
	in.settle()
	in.line.bye()
	in.line.drain()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	// No ACPI, perhaps. A reset ends a machine too.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	for {
		time.Sleep(time.Hour)
	}
}

// settle writes everything to the disks and leaves nothing mounted writable.
func (in *initProcess) settle() {
	unix.Sync()
	b, _ := os.ReadFile("/proc/self/mounts")
	var targets []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 3 {
			targets = append(targets, unescapeMount(f[1]))
		}
	}
	for i := len(targets) - 1; i >= 0; i-- {
		switch t := targets[i]; t {
		case "/", "/proc", "/dev", "/sys":
		default:
			if err := unix.Unmount(t, 0); err != nil {
				// In use: at least nothing more is written.
				_ = unix.Mount("", t, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
			}
		}
	}
	if in.cfg.Root == nil {
		return
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		// What holds it open will not be written to: force it (sysrq u).
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("u"), 0)
	}
	unix.Sync()
}
