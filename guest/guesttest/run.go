package guesttest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/guest/guestinit"
	"github.com/moovm/moovm/internal/agent"
	"github.com/moovm/moovm/internal/bytejson"
	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/internal/printable"
	"github.com/moovm/moovm/internal/reexec"
	"github.com/moovm/moovm/internal/sandbox"
)

// Environment of what this package starts.
const (
	guestEnv = "MOOVM_GUEST"      // set in the guest: its kernel's release, or 1
	disksEnv = "MOOVM_TEST_DISKS" // in the guest: ExtraDisks
)

// InGuest says whether this process runs in a guest of this package.
func InGuest() bool { return os.Getenv(guestEnv) != "" }

// ExtraDisks are the device files of Config.Disks, in the guest.
func ExtraDisks() []string { return strings.Fields(os.Getenv(disksEnv)) }

// Hook is for programs that run test binaries with Run. It must be the first
// thing in main: the program is also the init of the guests, and does the work
// in the sandbox. Main and HostMain call it; a TestMain that does anything
// before them calls it itself. A program that starts itself for other purposes
// gives the roles for that.
func Hook(roles ...reexec.Role) {
	if guestinit.IsInit() {
		guestinit.Main()
	}
	reexec.Do(append(roles, sandbox.Server(), jobRole(), guestRole())...)
}

// jobRole runs the job in the file that it is told, on the emulated host.
func jobRole() reexec.Role { return reexec.Role{Name: "test-job", Main: runJobFile} }

// job is one test binary in one guest. It travels to the sandbox as JSON.
type job struct {
	Config Config   // with one kernel, absolute paths and defaults
	Binary string   // absolute
	Args   []string // those that write files write into Out
	Env    []string
	Dir    string // working folder
	Out    string // what the guest may write to
	Keep   string // where artifacts go; empty = nowhere
	Merge  bool   // stdout and stderr are the same file
	Tmp    string // of the process that runs the guest; overlays lie there
	Last   bool   // a reset while it boots is the end
}

// save writes the job into a file, for loadJob in another process.
func (j *job) save(path string) error {
	b, err := bytejson.Marshal(j)
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}

func loadJob(path string) (j job, err error) {
	b, err := os.ReadFile(path)
	if err == nil {
		err = bytejson.Unmarshal(b, &j)
	}
	return j, err
}

// Run runs a Go test binary with its arguments in a guest for each of cfg's
// kernels, relays its standard streams and signals, brings back the files that
// it was told to write, and returns the exit status: the test binary's, or one
// of those of package guest (timeout, panic, cannot run). An error has not
// been reported to anybody yet.
//
// The program that calls Run must call Hook first thing in main.
func Run(ctx context.Context, cfg Config, binary string, args []string) (int, error) {
	r, err := newRunner(cfg, binary, args)
	if err != nil {
		return guest.StatusCannotRun, err
	}
	status := 0
	kernels := r.job.Config.Kernels
	for i, kernel := range kernels {
		if len(kernels) > 1 && !cfg.Quiet {
			fmt.Fprintf(os.Stderr, "moovm: kernel %s\n", printable.Text(kernel))
		}
		s, err := r.run(ctx, kernel, i == 0, r.guestJob)
		if err != nil {
			return guest.StatusCannotRun, err
		}
		r.sayCPUs(s)
		if status == 0 {
			status = s
		}
		if s >= guest.StatusTimeout { // interrupted, perhaps
			if ctx.Err() != nil {
				break
			}
		}
	}
	return status, nil
}

// runner is what the runs of one call have in common.
type runner struct {
	job   job // Args and Env as they were given
	place host.Place
	back  *collector

	defaultCPUs bool // nobody said how many processors
}

func newRunner(cfg Config, binary string, args []string) (*runner, error) {
	ownBootTimeout, noCPUs := cfg.BootTimeout != 0, cfg.CPUs == 0
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	if err := cfg.absolute(); err != nil {
		return nil, err
	}
	r := &runner{job: job{Config: cfg, Args: args, Env: os.Environ(), Merge: sameFile(os.Stdout, os.Stderr)}, back: newCollector(), defaultCPUs: noCPUs}
	var err error
	if r.job.Binary, err = absPath(binary); err != nil {
		return nil, err
	}
	if st, err := os.Stat(r.job.Binary); err != nil {
		return nil, fmt.Errorf("test binary: %w", err)
	} else if st.IsDir() {
		return nil, fmt.Errorf("%s is a folder; give a test binary, such as `go test -c` makes", binary)
	}
	if r.job.Dir, err = os.Getwd(); err != nil {
		return nil, err
	}
	// What is wrong with the files is found on this side of the sandbox.
	for _, k := range cfg.Kernels {
		kernel, _, err := cfg.open(k)
		if err != nil {
			return nil, err
		}
		kernel.Close()
	}
	for _, s := range cfg.Shares {
		if st, err := os.Stat(s.Dir); err != nil {
			return nil, fmt.Errorf("share: %w", err)
		} else if !st.IsDir() {
			return nil, fmt.Errorf("share: %s is no folder", s.Dir)
		}
	}
	for _, d := range append([]Disk{{Image: cfg.Base}}, cfg.Disks...) {
		image, _, err := d.image()
		if err == nil && image != "" {
			_, err = os.Stat(image)
		}
		if err != nil {
			return nil, fmt.Errorf("disk image: %w", err)
		}
	}
	if r.place, err = host.Choose(context.Background(), cfg.Accel, guest.ProbeKVM); r.place.Sandbox && !ownBootTimeout {
		r.job.Config.BootTimeout *= sandboxSlower
	}
	r.job.Config.setCPUs(r.place.Sandbox || host.InSandbox())
	return r, err
}

// reason is why the sandbox is used.
func (r *runner) reason() string {
	if r.place.Reason == "" {
		return "as --accel says"
	}
	return r.place.Reason
}

// run does one kernel's run, with what start makes of the job.
func (r *runner) run(ctx context.Context, kernel string, first bool, start func(j *job, box sandboxed) (int, error)) (int, error) {
	j := r.job
	j.Config.Kernels = []string{kernel}
	var box sandboxed
	scratch := ""
	if r.place.Sandbox {
		begin := func() {
			if !j.Config.Quiet && first {
				fmt.Fprintf(os.Stderr, "moovm: running in the sandbox, which is slower: %s\n", printable.Text(r.reason()))
			}
		}
		var err error
		if box, err = openSandbox(ctx, &j.Config, begin); err != nil {
			return guest.StatusCannotRun, err
		}
		defer box.Close()
		scratch = box.Scratch()
	} else {
		dir, err := os.MkdirTemp("", "moovm-test-")
		if err != nil {
			return guest.StatusCannotRun, err
		}
		defer os.RemoveAll(dir)
		scratch = dir
	}
	j.Out = filepath.Join(scratch, "out")
	artifacts := ""
	if j.Config.Artifacts != "" {
		j.Keep = filepath.Join(scratch, "artifacts")
		var err error
		if artifacts, err = newArtifacts(j.Config.Artifacts, j.Binary); err != nil {
			return guest.StatusCannotRun, err
		}
	}
	for _, d := range []string{j.Out, j.Keep} {
		if d != "" {
			if err := os.Mkdir(d, 0o777); err != nil {
				return guest.StatusCannotRun, err
			}
		}
	}
	var out *outputs
	j.Args, j.Env, out = redirect(r.job.Args, r.job.Env, r.job.Dir, j.Out)
	if err := out.prepare(); err != nil {
		return guest.StatusCannotRun, err
	}
	status, err := start(&j, box)
	if err2 := out.collect(r.back); err == nil && err2 != nil {
		status, err = guest.StatusCannotRun, err2
	}
	if artifacts != "" {
		if err2 := r.saveArtifacts(scratch, j.Keep, j.Out, artifacts); err == nil && err2 != nil {
			status, err = guest.StatusCannotRun, err2
		}
	}
	return status, err
}

// guestJob boots the guest here, or has it booted in the sandbox.
func (r *runner) guestJob(j *job, box sandboxed) (int, error) {
	signals, stop := signalsTo()
	defer stop()
	if box == nil {
		return runGuest(*j, signals)
	}
	path := filepath.Join(box.Scratch(), "job.json")
	if err := j.save(path); err != nil {
		return guest.StatusCannotRun, err
	}
	self, err := reexec.Path()
	if err != nil {
		return guest.StatusCannotRun, err
	}
	// The environment is in the job; the program needs little of it.
	env := []string{jobRole().Env(path), host.SandboxEnv + "=1"}
	for _, name := range []string{"PATH", "HOME", "TMPDIR", "MOOVM_CACHE", "XDG_CACHE_HOME"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return box.Run(agent.Command{Args: []string{self}, Env: env, Dir: "/", Merge: j.Merge}, signals)
}

// runJobFile is the other end of guestJob, in the sandbox.
func runJobFile(path string) int {
	j, err := loadJob(path)
	if err != nil {
		fmt.Fprintln(os.Stderr, "moovm:", printable.Lines(err.Error()))
		return guest.StatusCannotRun
	}
	signals, stop := signalsTo()
	defer stop()
	status, err := runGuest(j, signals)
	if err != nil {
		fmt.Fprintln(os.Stderr, "moovm:", printable.Lines(err.Error()))
	}
	return status
}

// signalsTo are the signals that belong to the test binary.
func signalsTo() (<-chan os.Signal, func()) {
	c := make(chan os.Signal, 4)
	signal.Notify(c, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	return c, func() { signal.Stop(c) }
}

func sameFile(a, b *os.File) bool {
	sa, err1 := a.Stat()
	sb, err2 := b.Stat()
	return err1 == nil && err2 == nil && os.SameFile(sa, sb)
}

// sandboxed is a sandbox that a job runs in.
type sandboxed interface {
	// Scratch is a folder that both sides can write to, under the same path.
	Scratch() string
	// Run runs a command there with this process's standard streams.
	Run(cmd agent.Command, signals <-chan os.Signal) (int, error)
	Close() error
}

// sandboxMemory is the memory of the shared emulated host; guests that need
// much get one of their own.
const (
	sandboxMemory   = 6 << 30
	sandboxLargest  = 2 << 30
	sandboxPatience = 10 * time.Second // for a command that was told to end
)

// openSandbox joins the shared sandbox, or opens one of its own for a guest
// that the shared one does not suit: it cannot change folders of this machine.
// begin is called unless there is one already: of the packages of a
// `go test ./...`, which share one, by the first.
func openSandbox(ctx context.Context, c *Config, begin func()) (sandboxed, error) {
	kernel, err := host.SandboxKernel(c.Kernels[0])
	if err != nil {
		return nil, err
	}
	self, err := reexec.Path()
	if err != nil {
		return nil, err
	}
	conf := sandbox.Config{Kernel: kernel, Init: self, Memory: max(sandboxMemory, 2*c.Memory+2<<30)}
	for _, s := range c.Shares {
		if s.Writable {
			conf.Writable = append(conf.Writable, s.Dir)
		}
	}
	if len(conf.Writable) == 0 && c.Memory <= sandboxLargest {
		conf.Memory = sandboxMemory
		s, err := sandbox.Join(ctx, conf, begin)
		if err != nil {
			return nil, err
		}
		return sharedSandbox{s}, nil
	}
	begin()
	dir, err := os.MkdirTemp("", "moovm-test-")
	if err != nil {
		return nil, err
	}
	conf.Writable = append(conf.Writable, dir)
	return &ownSandbox{conf, dir}, nil
}

// sharedSandbox is a place in the sandbox that all runs share.
type sharedSandbox struct{ *sandbox.Session }

func (s sharedSandbox) Run(cmd agent.Command, signals <-chan os.Signal) (int, error) {
	return s.Session.Run(cmd, os.Stdin, os.Stdout, os.Stderr, signals)
}

// ownSandbox is a sandbox for one run.
type ownSandbox struct {
	conf sandbox.Config
	dir  string
}

func (o *ownSandbox) Scratch() string { return o.dir }
func (o *ownSandbox) Close() error    { return os.RemoveAll(o.dir) }

func (o *ownSandbox) Run(cmd agent.Command, signals <-chan os.Signal) (int, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-signals:
			cancel()
		case <-done:
		}
	}()
	o.conf.Command = control.Command{Args: cmd.Args, Env: cmd.Env, Dir: cmd.Dir, Merge: cmd.Merge}
	o.conf.Stdin, o.conf.Stdout, o.conf.Stderr = os.Stdin, os.Stdout, os.Stderr
	return sandbox.Run(ctx, o.conf)
}

// newArtifacts makes a folder for one run below dir: named after the test
// binary, with a number if there is one already.
func newArtifacts(dir, binary string) (string, error) {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return "", err
	}
	name := filepath.Join(dir, filepath.Base(binary))
	for i := 2; ; i++ {
		err := os.Mkdir(name, 0o777)
		if err == nil || !errors.Is(err, os.ErrExist) {
			return name, err
		}
		name = filepath.Join(dir, fmt.Sprintf("%s.%d", filepath.Base(binary), i))
	}
}

// saveArtifacts copies what a run kept. Core files lie where the guest could
// write.
func (r *runner) saveArtifacts(scratch, kept, out, target string) error {
	root, err := os.OpenRoot(scratch)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, name := range []string{consoleLog, rootOverlay} {
		if err := r.back.named(root, filepath.Join(filepath.Base(kept), name), filepath.Join(target, name), false); err != nil {
			return fmt.Errorf("artifacts: %w", err)
		}
	}
	if err := r.back.folder(root, filepath.Join(filepath.Base(out), coresDir), target, coreNames); err != nil {
		return fmt.Errorf("artifacts: %w", err)
	}
	return nil
}

// Names among artifacts.
const (
	consoleLog  = "console.log"
	rootOverlay = "root.cow"
)

const coresDir = "cores"
