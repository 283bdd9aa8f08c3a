package guesttest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/guest/imagefs"
	"github.com/moovm/moovm/guest/sharefs"
	"github.com/moovm/moovm/initramfs"
	"github.com/moovm/moovm/internal/closing"
	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/virtioblk"
)

// setup is a guest's configuration and what it holds open.
type setup struct {
	guest  guest.Config
	kernel *kernel.Kernel
	disks  []*bootDisk
	tmp    string // of overlays, to be removed; empty = somebody else's
	close  []closing.Item

	read, write []string // folders that are shared
}

// bootDisk is one disk of a guest.
type bootDisk struct {
	cow   *cowdisk.Disk
	path  string // of the overlay
	image string // below it; may be empty
	cache *volatileCache

	first    string // path of the first overlay
	overlays int    // that came after it
}

func (s *setup) Close() error { return s.closed(closing.Within(context.Background(), 0, s.close...)) }

// end is Close for a process that ends now: it does not wait for a disk that
// hangs, but says which it is.
func (s *setup) end() {
	var late *closing.LateError
	if err := s.closed(closing.AtEnd(s.close...)); errors.As(err, &late) {
		fmt.Fprintf(os.Stderr, "moovm: warning: %v\n", late)
	}
}

func (s *setup) closed(err error) error {
	if s.tmp != "" {
		err = errors.Join(err, os.RemoveAll(s.tmp))
	}
	return err
}

func (s *setup) hold(name string, c io.Closer) {
	s.close = append(s.close, closing.Item{Name: name, Closer: c})
}

// need says what of the host a guest must have.
type need struct {
	program string // a file that it runs; its folder is shared
	dir     string // a folder that it works in
	out     string // a folder it writes to; empty = none
	tmp     string // where overlays lie; empty = a folder of their own
	name    string // before the names of overlays there

	// What it boots, if that is open already; somebody else closes it.
	kernel  *kernel.Kernel
	modules *kmod.Modules
}

// newSetup opens all that a guest needs.
func newSetup(c *Config, n need) (_ *setup, err error) {
	s := &setup{}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	kernel, modules := n.kernel, n.modules
	if kernel == nil {
		if kernel, modules, err = c.open(c.Kernels[0]); err != nil {
			return nil, err
		}
		s.hold("the kernel", kernel)
	}
	s.kernel = kernel
	s.guest = guest.Config{
		Kernel: kernel, Modules: modules, LoadModules: c.LoadModules, Append: c.Append,
		Memory: c.Memory, CPUs: c.CPUs, BootTimeout: c.BootTimeout, NoTree: c.Base == "",
		Setup: c.Setup, Scratch: true,
	}
	tmp := n.tmp
	if tmp == "" {
		if s.tmp, err = os.MkdirTemp("", "moovm-disks-"); err != nil {
			return nil, err
		}
		tmp = s.tmp
	}
	if err := s.addDisks(c, tmp+"/"+n.name); err != nil {
		return nil, err
	}
	return s, s.addFolders(c, n, modules)
}

// addDisks makes the disks' overlays, whose paths begin with at.
func (s *setup) addDisks(c *Config, at string) error {
	disks := c.Disks
	if c.Base != "" {
		disks = append([]Disk{{Image: c.Base}}, disks...)
	}
	var extra []string
	for i, d := range disks {
		b := &bootDisk{path: at + imagefs.DiskName(i) + ".cow", image: d.Image}
		if i == 0 && c.Base != "" {
			b.path = at + "root.cow"
		} else {
			extra = append(extra, "/dev/"+imagefs.DiskName(i))
		}
		b.first = b.path
		var err error
		if b.cow, err = createDisk(b.path, d); err != nil {
			return err
		}
		s.hold("the overlay of "+cmp.Or(d.Image, "an empty disk"), b.cow)
		var backend virtioblk.Backend = b.cow
		if d.VolatileCache {
			b.cache = newVolatileCache(backend)
			backend = b.cache
		}
		s.disks = append(s.disks, b)
		s.guest.Disks = append(s.guest.Disks, guest.Disk{Backend: d.faulty(backend), COW: b.cow, ReadOnly: d.ReadOnly, Serial: d.Serial})
	}
	s.env(disksEnv + "=" + strings.Join(extra, " "))
	return nil
}

func (s *setup) env(e string) {
	if s.guest.Command == nil {
		s.guest.Command = &control.Command{}
	}
	s.guest.Command.Env = append(s.guest.Command.Env, e)
}

// hidden are folders of the host that the guest has of its own.
var hidden = []string{"/tmp", "/run", "/dev", "/proc", "/sys"}

// system are folders that the guest has of its own when its root is a disk.
var system = []string{"/", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/usr", "/usr/bin", "/usr/sbin", "/usr/lib", "/var", "/home", "/root", "/tmp"}

func below(dir, path string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// addFolders gives the guest its root, and the folders it needs under their
// own names.
func (s *setup) addFolders(c *Config, n need, modules *kmod.Modules) error {
	g := &s.guest
	host := c.Base == "" && c.Root != RootInitramfs
	visible := func(path string) bool {
		return host && !slices.ContainsFunc(hidden, func(h string) bool { return below(h, path) })
	}
	const cached = "cache=loose" // nothing but the guest itself changes what it sees
	var shared []string
	most := len(c.Shares) + 3 // the host, the kernel's modules, what comes back
	if !host {
		most += 2 // the module of the package, the program
	}
	share := func(dir, target string, o sharefs.Options, gs guest.Share) error {
		o.MaxFiles = sharefs.FilesEach(most)
		fs, err := sharefs.New(dir, o)
		if err != nil {
			return err
		}
		s.hold("share "+dir, fs)
		if o.Writable {
			s.write = append(s.write, dir)
		} else {
			s.read = append(s.read, dir)
		}
		gs.Attacher, gs.Target = fs, target
		if gs.Tag == "" {
			gs.Tag = fmt.Sprintf("dir%d", len(shared))
		}
		if target != "" {
			shared = append(shared, target)
		}
		g.Shares = append(g.Shares, gs)
		return nil
	}
	switch {
	case host:
		if err := share("/", "", sharefs.Options{}, guest.Share{Tag: "host"}); err != nil {
			return err
		}
		g.Root = &control.Root{Device: "host", Type: "9p", Options: "msize=500000," + cached, ReadOnly: true, Overlay: true}
		g.Mounts = append(g.Mounts, control.Mount{Source: "tmpfs", Target: "/tmp", Type: "tmpfs", Options: "mode=1777"})
	case c.Base == "":
		g.NoRoot = true
	}
	if modules != nil {
		s.read = append(s.read, modules.Dir())
	}
	// The module that the package belongs to, for ../testdata.
	dirs := []string{}
	if n.dir != "" {
		dirs = append(dirs, moduleRoot(n.dir))
	}
	if n.program != "" {
		dirs = append(dirs, filepath.Dir(n.program))
	}
	for _, d := range dirs {
		if visible(d) || slices.ContainsFunc(shared, func(have string) bool { return below(have, d) }) {
			continue
		}
		if !host && slices.Contains(system, d) {
			return fmt.Errorf("the folder %s would hide the guest's own; move the test binary and its package to a folder of their own", d)
		}
		if err := share(d, d, sharefs.Options{}, guest.Share{Overlay: true, Options: cached}); err != nil {
			return err
		}
	}
	for _, f := range c.Shares {
		target := f.Target
		if target == "" {
			target = f.Dir
		}
		gs := guest.Share{Overlay: !f.Writable}
		if !path.IsAbs(target) {
			return fmt.Errorf("share %s: %s is not an absolute path", f.Dir, target)
		}
		if err := share(f.Dir, target, sharefs.Options{Writable: f.Writable}, gs); err != nil {
			return err
		}
	}
	if n.out != "" {
		if err := share(n.out, n.out, sharefs.Options{Writable: true}, guest.Share{Tag: "out"}); err != nil {
			return err
		}
	}
	if !host && c.Base == "" && n.program != "" {
		// Nothing but what is brought along: its libraries too.
		libraries, err := initramfs.LibraryFiles(n.program)
		if err != nil {
			return err
		}
		g.Files = append(g.Files, libraries...)
	}
	return nil
}

// moduleRoot is the folder of the go.mod that dir belongs to, or dir.
func moduleRoot(dir string) string {
	for d := dir; d != "/"; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil && !slices.Contains(system, d) {
			return d
		}
	}
	return dir
}

// grace is what a run may take beyond the test binary's own timeout: it has to
// say which test hung, and with what stacks.
const grace = 20 * time.Second

// bootTries is how often a guest is started in the sandbox that ends without a
// word before its first program: QEMU's emulation of nested virtualisation now
// and then resets one.
const bootTries = 3

// silentReset says whether a guest ended, by itself, before it could do
// anything.
func silentReset(err error) bool {
	var b *guest.BootError
	return errors.As(err, &b) && errors.Is(err, guest.ErrNoStart) && !errors.Is(err, guest.ErrSlowStart) && len(b.Console) == 0
}

// runGuestOnce runs a job once. Unless it is the last try, a silent reset is
// not judged.
func runGuestOnce(j *job, signals <-chan os.Signal, last bool) (status int, err error) {
	c := &j.Config
	s, err := newSetup(c, need{program: j.Binary, dir: j.Dir, out: j.Out, tmp: j.Tmp})
	if err != nil {
		return guest.StatusCannotRun, err
	}
	defer s.end()
	g := &s.guest
	stdout := &tracker{out: os.Stdout}
	watch := &consoleWatch{test: stdout.current}
	if j.Keep != "" {
		f, err := os.Create(filepath.Join(j.Keep, consoleLog))
		if err != nil {
			return guest.StatusCannotRun, err
		}
		defer f.Close()
		watch.out = f
		cores := filepath.Join(j.Out, coresDir)
		if err := os.MkdirAll(cores, 0o777); err != nil {
			return guest.StatusCannotRun, err
		}
		g.CorePattern = filepath.Join(cores, "core.%e.%p")
	}
	g.Console.Out = watch
	if !c.NoConfine {
		g.BeforeStart = s.confine(j)
	}
	s.env(guestEnv + "=" + s.kernel.Release + "-") // never empty
	g.Command.Env = append(guestEnviron(j.Env, c), g.Command.Env...)
	g.Command.Env = append(g.Command.Env, c.Env...)
	g.Command.Args = append([]string{j.Binary}, j.Args...)
	g.Command.Dir, g.Command.Merge = j.Dir, j.Merge
	g.Stdin, g.Stdout, g.Stderr = os.Stdin, stdout, os.Stderr

	// The clock starts with the command: booting has its own.
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	limit := c.Timeout
	if limit == 0 {
		if limit = testTimeout(j.Args); limit > 0 {
			limit += grace
		}
	}
	g.OnStart = func(string) {
		if limit > 0 {
			time.AfterFunc(limit, func() { cancel(fmt.Errorf("the test did not end within %v: %w", limit, context.DeadlineExceeded)) })
		}
	}
	run, err := guest.Start(ctx, *g)
	if err != nil {
		return guest.StatusCannotRun, err
	}
	defer run.Close()
	done := make(chan struct{})
	defer close(done)
	go passSignals(run, signals, cancel, done)
	result, err := run.Wait()
	if !last && silentReset(err) {
		return guest.StatusCannotRun, err
	}
	status = guest.ExitStatus(result, err)
	if s := result.Control.Signal; err == nil && s != 0 {
		stdout.fail(fmt.Sprintf("the test binary was killed: %v (signal %d)", syscall.Signal(s), s))
	}
	var failure *control.GuestError
	if errors.As(err, &failure) && g.Modules == nil && failure.Kind != control.FailCommand && failure.Kind != control.FailSetup {
		err = fmt.Errorf("%w\nNo modules were found for kernel %s (%s), and it may need some, for virtio and 9P: put them into lib/modules/%[3]s beside its folder, or name theirs with --modules",
			err, c.Kernels[0], s.kernel.Release)
	}
	status, err = verdict(c, status, err, stdout, watch)
	if j.Keep != "" && len(s.disks) > 0 && c.Base != "" && (status != 0 || c.Keep) {
		run.Close()
		if err2 := s.keepRoot(j.Keep); err == nil && err2 != nil {
			return guest.StatusCannotRun, err2
		}
	}
	return status, err
}

// keepRoot closes the root's overlay and copies it.
func (s *setup) keepRoot(dir string) error {
	d := s.disks[0]
	ctx, cancel := context.WithTimeout(context.Background(), grace) // its base may hang
	defer cancel()
	if err := d.cow.CloseContext(ctx); err != nil {
		return err
	}
	in, err := os.Open(d.path)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(filepath.Join(dir, rootOverlay))
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err2 := out.Close(); err == nil {
		err = err2
	}
	return err
}

// passSignals gives signals to the command. Who sends two means it, and so
// does who waits long for the first to work.
func passSignals(run *guest.Guest, signals <-chan os.Signal, cancel context.CancelCauseFunc, done <-chan struct{}) {
	var late <-chan time.Time
	for n := 0; ; {
		select {
		case sig := <-signals:
			number, _ := sig.(syscall.Signal)
			n++
			if n > 1 || !run.Control().State().Started {
				cancel(fmt.Errorf("%v", sig))
				continue
			}
			_ = run.Control().Signal(int(number))
			late = time.After(sandboxPatience)
		case <-late:
			cancel(errors.New("interrupted"))
		case <-done:
			return
		}
	}
}

// verdict reports what the test binary could not, and adds up.
func verdict(c *Config, status int, err error, stdout *tracker, watch *consoleWatch) (int, error) {
	text, fatal := describe(watch.troubles())
	var panicked *guest.PanicError
	var boot *guest.BootError
	switch {
	case errors.As(err, &panicked):
		stdout.fail(err.Error() + "\n" + text)
		return status, nil
	case errors.Is(err, context.DeadlineExceeded):
		stdout.fail(err.Error() + "\n" + text)
		return status, nil
	case errors.As(err, &boot) && errors.Is(err, guest.ErrCutShort):
		stdout.fail(err.Error() + "\n" + text)
		return status, nil
	case errors.Is(err, guest.ErrNoStart):
		return status, fmt.Errorf("%w\n%s", err, bootCauses)
	case err != nil:
		return status, err
	case text == "":
		return status, nil
	case fatal && !c.IgnoreOops && status == 0:
		stdout.fail(text)
		return 1, nil
	}
	fmt.Fprintf(os.Stderr, "moovm: %s", text)
	return status, nil
}

// bootCauses are what it usually is.
const bootCauses = `Usual causes: a kernel for another machine or without PVH or the serial console; too little --memory;
modules that belong to another kernel; an --append that it does not like. --artifacts DIR keeps the whole console.`

// guestEnviron is the host's environment as far as it means something in the
// guest.
func guestEnviron(env []string, c *Config) []string {
	var out []string
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		switch {
		case name == host.SandboxEnv, strings.HasPrefix(name, "MOOVM_TEST_"):
			continue
		case name == "TMPDIR" && (c.Base != "" || c.Root == RootInitramfs || below("/tmp", value)):
			continue
		case name == "PATH" && c.Base != "":
			continue
		}
		out = append(out, e)
	}
	return out
}
