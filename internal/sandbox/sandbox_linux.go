package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/initramfs"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
)

// modules of the emulated host: KVM, and the roads to this machine. Those in
// optionalModules are loaded where the kernel has them.
var (
	requiredModules = []string{"kvm_amd", "virtio_pci", "virtio_console", "9p", "9pnet_virtio", "overlay"}
	optionalModules = []string{"loop", "ext4", "fuse", "nbd", "tun"}
)

// mountOptions of 9P shares. cache=loose is right for the root, which the
// overlay shields from changes, and for writable folders, whose files only the
// sandbox should touch while it lives.
const mountOptions = "trans=virtio,version=9p2000.L,msize=512000,cache=loose"

// Run boots an emulated host, runs the command there and returns its exit
// status (128 + signal number if a signal ended it). The error is about the
// sandbox itself: no QEMU, a kernel that does not boot, a ctx that ended.
func Run(ctx context.Context, c Config) (status int, err error) {
	c.setDefaults()
	if err := c.validate(); err != nil {
		return 0, err
	}
	qemu, err := exec.LookPath(c.QEMU)
	if err != nil {
		return 0, fmt.Errorf("%w (%v)", ErrNoQEMU, err)
	}
	kernel, err := kernel.LoadKernel(c.Kernel)
	if err != nil {
		return 0, err
	}
	defer kernel.Close()
	files, err := serveFiles(&c)
	if err != nil {
		return 0, err
	}
	defer files.Close()
	archive, err := makeArchive(&c, kernel)
	if err != nil {
		return 0, err
	}

	// Kernel and initramfs go to QEMU in memory files, so that nothing is left
	// behind however this process ends.
	kernelFile, err := memfile("kernel", kernel)
	if err != nil {
		return 0, err
	}
	defer kernelFile.Close()
	initrdFile, err := memfile("initrd", archive)
	if err != nil {
		return 0, err
	}
	defer initrdFile.Close()
	ours, theirs, err := socketPair()
	if err != nil {
		return 0, err
	}
	defer ours.Close()
	defer theirs.Close()

	// QEMU has a context of its own: when the caller's ends, the command is
	// asked first.
	life, kill := context.WithCancelCause(context.Background())
	defer kill(nil)
	console := &tail{out: c.Console}
	var complaints bytes.Buffer
	cmd := exec.CommandContext(life, qemu, qemuArgs(&c)...)
	cmd.ExtraFiles = []*os.File{kernelFile, initrdFile, theirs} // 3, 4, 5
	if files != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, files.theirs) // filesFD
	}
	cmd.Stdout = console
	cmd.Stderr = &complaints
	// A killed moovm takes its emulator along. The signal follows the thread
	// that started the child, so that thread must stay. In a process group of
	// its own QEMU does not see the terminal's Ctrl-C.
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("sandbox: start %s: %w", qemu, err)
	}
	theirs.Close()
	started := time.Now()

	state, ctlErr := relay(ctx, &c, ours, kill)
	waitErr := cmd.Wait()
	c.Logger.Info("sandbox ended", "status", state.Status, "took", time.Since(started).Round(time.Millisecond))
	var interrupted *InterruptedError
	switch {
	case state.Exited:
		return state.Status, nil
	case errors.As(context.Cause(life), &interrupted):
		return 0, interrupted
	case state.Failure != nil:
		return 0, fmt.Errorf("the sandbox could not start the command: %w", state.Failure)
	case ctx.Err() != nil:
		return 0, context.Cause(ctx)
	}
	return 0, bootError(errors.Join(context.Cause(life), ctlErr), waitErr, complaints.String(), console.String())
}

// bootError makes one sentence, with the end of what was said, out of a
// sandbox that ended without a report.
func bootError(cause, waitErr error, complaints, console string) error {
	var b strings.Builder
	b.WriteString("the sandbox ended before its command did")
	if cause != nil {
		fmt.Fprintf(&b, ": %v", cause)
	}
	if waitErr != nil {
		fmt.Fprintf(&b, " (QEMU: %v)", waitErr)
	}
	for _, s := range []string{complaints, console} {
		if s = strings.TrimSpace(s); s != "" {
			b.WriteString("\n" + s)
		}
	}
	return errors.New(b.String())
}

// makeArchive makes the archive of the emulated host.
func makeArchive(c *Config, kernel *kernel.Kernel) (*initramfs.Archive, error) {
	mods, err := openModules(c, kernel)
	if err != nil {
		return nil, err
	}
	required := requiredModules
	if _, files := c.writable(); len(files) > 0 {
		required = append(slices.Clone(required), "virtiofs")
	}
	files, err := mods.Resolve(required...)
	if err != nil {
		return nil, fmt.Errorf("the sandbox's kernel %s: %w", kernel.Release, err)
	}
	optional, err := mods.ResolveOptional(optionalModules...)
	if err != nil {
		return nil, err
	}
	for _, f := range optional {
		if !slices.Contains(files, f) {
			files = append(files, f)
		}
	}
	return &initramfs.Archive{Init: c.Init, Libraries: true, Modules: files, Config: initConfig(c)}, nil
}

func openModules(c *Config, kernel *kernel.Kernel) (*kmod.Modules, error) {
	if c.Modules == "" {
		return kmod.FindModules(kernel)
	}
	return kmod.OpenModules(c.Modules, kernel.Release)
}

// initConfig tells the emulated host's init what to do.
func initConfig(c *Config) *control.InitConfig {
	conf := &control.InitConfig{
		Root:     &control.Root{Device: "host", Type: "9p", Options: mountOptions, ReadOnly: true, Overlay: true},
		Command:  &c.Command,
		Control:  "/dev/vport0p1",
		Hostname: "sandbox",
		// Guests' memory in pages of 2 MiB: a fault costs two emulations here.
		Settings: map[string]string{"/sys/kernel/mm/transparent_hugepage/shmem_enabled": "advise"},
	}
	folders, files := c.writable()
	for i, dir := range folders {
		conf.Mounts = append(conf.Mounts, control.Mount{Source: shareTag(i), Target: dir, Type: "9p", Options: mountOptions})
	}
	conf.Mounts = append(conf.Mounts, fileMounts(files)...)
	return conf
}

func shareTag(i int) string { return "rw" + strconv.Itoa(i) }

// processor is the emulated host's. It has SVM, for kvm-amd, and no XSAVE:
// nested guests stumble over what QEMU 7.2 emulates of it. What needs XSAVE goes
// along, because QEMU shows it all the same. It has no CX16 either: QEMU's
// cmpxchg16b without LOCK, which the kernel's allocator uses for every object,
// leaves rubbish in the flags, and an interrupt before the next comparison takes
// the kernel down with a double fault.
const processor = "max,+svm,-xsave,-avx,-avx2,-fma,-f16c,-vaes,-vpclmulqdq,-pku,-cx16"

// qemuArgs is the emulator's command line. The kernel does not test its timer:
// on a busy machine the interrupts that it counts come too late, and it panics.
func qemuArgs(c *Config) []string {
	args := []string{
		"-accel", "tcg,thread=multi", "-cpu", processor,
		"-smp", strconv.Itoa(c.CPUs), "-m", strconv.FormatInt(c.Memory>>20, 10),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-serial", "stdio",
		"-kernel", "/proc/self/fd/3", "-initrd", "/proc/self/fd/4",
		"-append", "console=ttyS0 panic=-1 mitigations=off idle=poll no_timer_check quiet rdinit=/init",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=control,fd=5",
		"-device", "virtserialport,chardev=control,name=moovm.control",
	}
	share := func(tag, dir, more string) {
		args = append(args,
			"-fsdev", "local,id="+tag+",path="+escape(dir)+",security_model=none,multidevs=remap"+more,
			"-device", "virtio-9p-pci,fsdev="+tag+",mount_tag="+tag)
	}
	share("host", "/", ",readonly=on")
	folders, files := c.writable()
	for i, dir := range folders {
		share(shareTag(i), filepath.Clean(dir), "")
	}
	if len(files) > 0 {
		args = append(args, filesArgs(c)...)
	}
	return args
}

// escape doubles commas, which separate QEMU's suboptions.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// memfile is a file in memory with what content writes.
func memfile(name string, content io.WriterTo) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("sandbox: memory file for the %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := content.WriteTo(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("sandbox: the %s: %w", name, err)
	}
	return f, nil
}

func socketPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("sandbox: %w", err)
	}
	// Non-blocking, so that closing our end wakes a reader.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control"), nil
}

// tail passes what is written on and keeps its end for an error message.
type tail struct {
	out io.Writer
	mu  sync.Mutex
	buf []byte
}

const tailSize = 2048

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	t.buf = append(t.buf, p...)
	if len(t.buf) > 2*tailSize {
		t.buf = append(t.buf[:0], t.buf[len(t.buf)-tailSize:]...)
	}
	t.mu.Unlock()
	return t.out.Write(p)
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf[max(0, len(t.buf)-tailSize):])
}
