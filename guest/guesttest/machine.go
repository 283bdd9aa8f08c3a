package guesttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/guestinit"
	"github.com/moovm/moovm/internal/agent"
	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/internal/printable"
	"github.com/moovm/moovm/internal/reexec"
	"github.com/moovm/moovm/vmm"
)

// Machine is a running guest of a host test. Its methods may be called from
// any goroutine, but for Reset.
type Machine struct {
	t    TB
	c    Config
	s    *setup
	need need
	*family
	guest *running
	disks []*MachineDisk

	power sync.Mutex // held while the guest is ended

	mu    sync.Mutex
	watch *consoleWatch
}

// family is what a machine and all of its forks have in common: a folder, for
// an image may stand on others in its own folder only, and names in it.
type family struct {
	tmp   string
	forks atomic.Int64
}

// running is one boot of a Machine.
type running struct {
	g       *guest.Guest
	ctx     context.Context
	console *Console
	port    vmm.Serial // the console's

	toGuest, stdout  *io.PipeReader // the agent's stdin, what it says
	stdin, fromGuest *io.PipeWriter // and where they come from

	client *agent.Client
	dialer dialer // nil = none
	ends   []io.Closer
	cancel context.CancelFunc
	ended  chan struct{} // what Wait returned is in result and err
	result guest.Result
	err    error
}

// Start boots a guest and waits until it takes commands; t.Cleanup ends it.
// What keeps it from starting fails the test. The first of c.Kernels is used.
// The test binary and its package's folder are in the guest under their own
// names, so it can run functions of this same package.
//
// It needs a KVM that works in this process: packages that use it call
// HostMain in TestMain, which brings one.
func Start(t TB, c Config) *Machine {
	t.Helper()
	if InGuest() {
		t.Fatal("guesttest.Start is for host tests, and this one runs in a guest; use guesttest.HostMain in TestMain instead of Main")
	}
	if err := c.setDefaults(); err != nil {
		t.Fatal(err)
	}
	c.setCPUs(host.InSandbox())
	if err := c.absolute(); err != nil {
		t.Fatal(err)
	}
	if place, err := host.Choose(context.Background(), host.AccelAuto, guest.ProbeKVM); err != nil {
		t.Fatal(err)
	} else if place.Sandbox {
		t.Fatalf("guesttest.Start: %s; call guesttest.HostMain in TestMain, which runs the test where KVM works", place.Reason)
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	self, err := reexec.Path()
	if err != nil {
		t.Fatal(err)
	}
	n := need{program: self, dir: dir}
	s, err := newSetup(&c, n)
	if err != nil {
		t.Fatal(err)
	}
	s.env(guestEnv + "=" + s.kernel.Release + "-")
	m := newMachine(t, c, s, n)
	m.family = &family{tmp: s.tmp}
	m.boot()
	return m
}

// newMachine is a Machine whose guest does not run yet. It ends with the test.
func newMachine(t TB, c Config, s *setup, n need) *Machine {
	m := &Machine{t: t, c: c, s: s, need: n}
	for _, d := range s.disks {
		m.disks = append(m.disks, &MachineDisk{m: m, d: d})
	}
	t.Cleanup(func() {
		m.end()
		if t.Failed() && m.guest != nil {
			t.Logf("the guest's console:\n%s", m.guest.console.Text())
		}
		if c.Artifacts != "" {
			m.keep()
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// boot starts the guest and waits for its agent.
func (m *Machine) boot() {
	m.t.Helper()
	for try := 1; ; try++ {
		err := m.bootOnce()
		if err == nil {
			return
		}
		m.end()
		if !host.InSandbox() || try == bootTries || !silentReset(err) {
			if errors.Is(err, guest.ErrNoStart) {
				err = fmt.Errorf("%w\n%s", err, bootCauses)
			}
			m.t.Fatal(err)
		}
		m.t.Log("the emulated processor reset the guest while it booted; once more")
	}
}

func (m *Machine) bootOnce() error {
	r := m.newRunning()
	g := m.s.guest
	env := g.Command.Env
	g.Command = guestinit.AgentCommand(false)
	g.Command.Env = append(append(g.Command.Env, env...), m.c.Env...)
	g.Command.Dir = "/"
	g.Stdin, g.Stdout, g.Stderr, g.Console = r.toGuest, r.fromGuest, r.console, r.port
	var err error
	if g.Networks, err = m.openNetworks(r); err != nil {
		close(r.ended)
		return err
	}
	started := make(chan struct{})
	var once sync.Once
	g.OnStart = func(string) { once.Do(func() { close(started) }) }
	run, err := guest.Start(r.ctx, g)
	if err != nil {
		close(r.ended)
		return err
	}
	r.run(run)
	r.client = agent.NewClient(r.stdout, r.stdin)
	select {
	case <-started:
		return nil
	case <-r.ended:
		if r.err == nil {
			return errors.New("the guest ended before it took commands")
		}
		return r.err
	}
}

// newRunning makes what is around a guest, and makes it the machine's.
func (m *Machine) newRunning() *running {
	r := &running{console: newConsole(m.c.Console), ended: make(chan struct{})}
	r.toGuest, r.stdin = io.Pipe() // the guest's stdin is read from the first
	r.stdout, r.fromGuest = io.Pipe()
	r.ctx, r.cancel = context.WithCancel(context.Background())
	watch := &consoleWatch{test: func() string { return "" }, out: r.console}
	input := newInput()
	r.console.in = input
	r.port = vmm.Serial{In: input, Out: watch}
	r.ends = []io.Closer{r.stdin, r.fromGuest, r.toGuest, r.stdout, input}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.watch, m.guest = watch, r
	return r
}

// run watches the guest until it has ended.
func (r *running) run(g *guest.Guest) {
	r.g = g
	go func() {
		r.result, r.err = g.Wait()
		r.console.end()
		r.fromGuest.Close()
		close(r.ended)
	}()
}

// end stops the guest and releases what one boot held.
func (m *Machine) end() {
	m.power.Lock()
	defer m.power.Unlock()
	r := m.guest
	if r == nil || r.g == nil {
		return
	}
	r.cancel()
	r.g.Close()
	for _, c := range r.ends {
		c.Close()
	}
	<-r.ended
	<-r.client.Done()
	for _, d := range m.s.disks {
		if d.cache == nil {
			continue
		}
		if err := d.cache.powerCut(); err != nil {
			m.t.Error(err)
		}
	}
	r.g = nil
}

// Result is how a command ended.
type Result struct {
	Stdout, Stderr string
	// Status is the exit status; 128 + the signal's number after a signal.
	Status int
}

// Run runs a command in the guest, as root in the folder /, and returns how it
// ended: a status that is not 0 is no error. Any number may run at a time.
// When ctx ends, the command is killed. The error is about the guest: it has
// ended, or its kernel panicked.
func (m *Machine) Run(ctx context.Context, name string, args ...string) (Result, error) {
	return m.RunWith(ctx, Streams{}, name, args...)
}

// Streams are the standard streams of a command. What Stdout and Stderr take,
// as it comes, is not in the Result.
type Streams struct {
	Stdin          io.Reader // nil = empty
	Stdout, Stderr io.Writer // nil = into the Result
}

// RunWith is Run with streams of one's own.
func (m *Machine) RunWith(ctx context.Context, streams Streams, name string, args ...string) (Result, error) {
	r := m.guest
	if r.client == nil {
		return Result{}, errors.New("the guest does not run")
	}
	env := guestinit.CommandEnv(slices.Concat(m.s.guest.Command.Env, m.c.Env))
	var stdout, stderr bytes.Buffer
	if streams.Stdout == nil {
		streams.Stdout = &stdout
	}
	if streams.Stderr == nil {
		streams.Stderr = &stderr
	}
	s, err := r.client.Start(agent.Command{Args: append([]string{name}, args...), Env: env, Dir: "/"}, streams.Stdin, streams.Stdout, streams.Stderr)
	if err != nil {
		return Result{}, m.gone(err)
	}
	select {
	case <-s.Done():
	case <-ctx.Done():
		s.Kill()
		select {
		case <-s.Done():
		case <-r.ended:
		}
		return Result{}, fmt.Errorf("%s in the guest: %w", name, context.Cause(ctx))
	case <-r.ended:
		<-s.Done() // its stream has ended too
	}
	exit, err := s.Wait()
	if err != nil {
		return Result{}, m.gone(err)
	}
	if exit.Error != "" {
		fmt.Fprintln(streams.Stderr, printable.Lines(exit.Error))
	}
	return Result{stdout.String(), stderr.String(), exit.Status}, nil
}

// gone explains why the guest is.
func (m *Machine) gone(err error) error {
	<-m.guest.ended
	if m.guest.err != nil {
		return m.guest.err
	}
	return fmt.Errorf("the guest ended (%v): %w", m.guest.result.Reason, err)
}

// Console is the guest's serial console.
func (m *Machine) Console() *Console { return m.guest.console }

// Troubles are the oopses, lockups and OOM kills of this boot, as a text of
// some lines each; empty if there were none.
func (m *Machine) Troubles() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	text, _ := describe(m.watch.troubles())
	return text
}

// Kill cuts the guest's power. Its disks stay as they are: Reset boots on
// them again.
func (m *Machine) Kill() { m.end() }

// Reset cuts the guest's power, if it runs, and boots it again on the same
// disks.
func (m *Machine) Reset() {
	m.t.Helper()
	m.end()
	m.boot()
}

// Wait waits until the guest has ended by itself.
func (m *Machine) Wait(ctx context.Context) error {
	select {
	case <-m.guest.ended:
		return m.guest.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Disk is the guest's disk i: 0 is /dev/vda.
func (m *Machine) Disk(i int) *MachineDisk {
	m.t.Helper()
	if i < 0 || i >= len(m.disks) {
		m.t.Fatalf("the guest has %d disks, not a disk %d", len(m.disks), i)
	}
	return m.disks[i]
}

// keep copies what Config.Artifacts asks for.
func (m *Machine) keep() {
	dir, err := newArtifacts(m.c.Artifacts, m.t.Name())
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "console.log"), []byte(m.guest.console.Text()), 0o666)
	}
	if err == nil && m.c.Base != "" && (m.t.Failed() || m.c.Keep) {
		err = m.s.keepRoot(dir)
	}
	if err != nil {
		m.t.Errorf("artifacts: %v", err)
	}
}
