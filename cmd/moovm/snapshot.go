package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/guestinit"
	"github.com/moovm/moovm/internal/agent"
	"github.com/moovm/moovm/internal/printable"
	"github.com/moovm/moovm/vmm"
)

// snapshotRequest is what is asked of `moovm snapshot`.
type snapshotRequest struct {
	*machineRequest
	dir   string
	await *regexp.Regexp // of the console; nil: commands are run
}

func newSnapshotCommand(g *globals) *cobra.Command {
	m := &machineFlags{}
	var dir, await string
	cmd := &cobra.Command{
		Use:   "snapshot -o DIR [flags] [-- SETUP [ARG…]]",
		Short: "Boot a guest, set it up, and keep it as it is then",
		Long: `Boots a guest as moovm run does, runs SETUP in it, and freezes its memory,
processors, devices and disks into the folder DIR; then the guest ends. From DIR
any number of guests are made in a fraction of a boot: moovm run --restore DIR.

With --await there is no SETUP: the disk's own init takes over, and the guest is
frozen when its console has said what is asked for, a login prompt, say.

Nothing is written to the disks: DIR has an overlay on each, and they must stay
as they are. DIR appears when it is whole, and nothing in it ever changes. It
holds the guest's whole memory, with every key in it: its files are its owner's.

Exit status: SETUP's if that is not 0; else as of moovm run.`,
		Example: `  moovm snapshot -o ready --base base.img -- sh -c 'apt-get update'
  moovm run --restore ready -- uname -a
  moovm snapshot -o login --base base.img --await 'login: '`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if dash := cmd.ArgsLenAtDash(); len(args) > 0 && dash != 0 {
				return usageError(fmt.Errorf("moovm snapshot: %q is not a flag; write -- before the guest's command", args[0]))
			}
			r, err := newSnapshotRequest(cmd.Flags(), m, dir, await, args)
			if err != nil {
				return usageError(fmt.Errorf("moovm snapshot: %w", err))
			}
			return r.run(cmd.Context(), g)
		},
	}
	m.register(cmd.Flags())
	for _, name := range notForSnapshots {
		cmd.Flags().Lookup(name).Hidden = true
	}
	cmd.Flags().StringVarP(&dir, "output", "o", "", "the folder `DIR` to make")
	cmd.Flags().StringVar(&await, "await", "", "freeze when the console has said something that matches `REGEXP`")
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// notForSnapshots are the flags of moovm run that mean nothing for a snapshot, or
// whose devices cannot be frozen yet.
var notForSnapshots = []string{"metrics", "control", "tty", "initrd", "net", "vsock", "image", "size", "platform", "mirror"}

func newSnapshotRequest(flags *pflag.FlagSet, m *machineFlags, dir, await string, args []string) (*snapshotRequest, error) {
	for _, name := range notForSnapshots {
		if f := flags.Lookup(name); f.Changed {
			return nil, fmt.Errorf("--%s is not for a snapshot; leave it out", name)
		}
	}
	if dir == "" {
		return nil, errors.New("-o DIR is missing: the folder to make")
	}
	s := &snapshotRequest{dir: dir}
	if await != "" {
		var err error
		if s.await, err = regexp.Compile(await); err != nil {
			return nil, fmt.Errorf("--await: %w", err)
		}
		if len(args) > 0 {
			return nil, errors.New("--await is for a guest whose disk's init runs; leave it or SETUP out")
		}
	}
	command := args
	if len(command) == 0 && await == "" {
		command = []string{"agent"} // it is there without a disk
	}
	var err error
	if s.machineRequest, err = m.request(command); err != nil {
		return nil, err
	}
	s.command = args
	return s, nil
}

func (s *snapshotRequest) run(ctx context.Context, g *globals) error {
	cannot := func(err error) error { return &statusError{guest.StatusCannotRun, err} }
	ctx, cancel := g.signals.keepTime(ctx, s.timeout, g.relayed)
	defer cancel()
	s.images.log = g.logger()
	var err error
	if s.kernel, err = g.kernelFile(ctx, s.kernel); err != nil {
		return s.cannot(ctx, err)
	}
	boxed, err := s.choosePlace(ctx, g)
	switch {
	case ctx.Err() != nil:
		return &statusError{endStatus(context.Cause(ctx)), context.Cause(ctx)}
	case err != nil:
		return cannot(err)
	case boxed:
		final, err := absPath(s.dir)
		if err != nil {
			return cannot(err)
		}
		writable := []string{filepath.Dir(final)}
		for _, f := range s.shares {
			if f.writable {
				writable = append(writable, f.dir)
			}
		}
		return s.runBoxed(ctx, g, writable)
	}
	return s.here(ctx, g)
}

// here makes the snapshot in this process.
func (s *snapshotRequest) here(ctx context.Context, g *globals) error {
	cannot := func(err error) error { return &statusError{guest.StatusCannotRun, err} }
	p, err := newPartial(s.dir)
	if err != nil {
		return cannot(err)
	}
	defer p.Close()
	o := &opened{}
	defer func() { o.Close(ctx, g.logger()) }()
	if err := s.openKernel(o); err != nil {
		return cannot(err)
	}
	about := snapshotAbout{
		Moovm: version, Created: time.Now().UTC().Truncate(time.Second), Kernel: s.kernel, Release: o.kernel.Release,
		CPU: hostCPU(), Memory: s.memory, CPUs: s.cpus, Agent: s.await == nil,
	}
	if err := s.openOverlays(o, p, &about); err != nil {
		return cannot(err)
	}
	if err := s.openShares(o); err != nil {
		return cannot(err)
	}
	for _, f := range s.shares {
		about.Shares = append(about.Shares, snapshotShare{Tag: f.tag, Writable: f.writable})
	}
	if err := s.freeze(ctx, g, o, p, &about); err != nil {
		var status *statusError
		if ctx.Err() != nil {
			return &statusError{endStatus(context.Cause(ctx)), context.Cause(ctx)}
		} else if errors.As(err, &status) {
			return err
		}
		return cannot(err)
	}
	return nil
}

// openOverlays opens an overlay in the folder on each disk.
func (s *snapshotRequest) openOverlays(o *opened, p *partial, about *snapshotAbout) error {
	add := func(base *cowdisk.Disk, err error, readOnly bool, serial string) error {
		if err != nil {
			return err
		}
		d, is, err := p.addDisk(len(about.Disks), base, s.images.options())
		if err != nil {
			return errors.Join(err, base.Close())
		}
		o.hold("disk "+d.Path(), inOrder{d, base})
		o.disks = append(o.disks, guest.Disk{COW: d, ReadOnly: readOnly, Serial: serial})
		about.Disks = append(about.Disks, is)
		return nil
	}
	options := s.images.options()
	options.ReadOnly = true
	if s.base != "" {
		path, format, err := cowdisk.SplitFormat(s.base)
		if err != nil {
			return fmt.Errorf("--base: %w", err)
		}
		o := options
		o.Format = format
		base, err := advise(cowdisk.OpenAny(path, o))
		if err := add(base, err, false, ""); err != nil {
			return err
		}
	}
	for _, f := range s.disks {
		base, err := f.open(options)
		if err := add(base, err, f.readOnly, f.serial); err != nil {
			return err
		}
	}
	return nil
}

// freeze boots the guest, sets it up, and writes it into the folder.
func (s *snapshotRequest) freeze(ctx context.Context, g *globals, o *opened, p *partial, about *snapshotAbout) error {
	needs, err := s.needs(o.modules)
	if err != nil {
		return err
	}
	at := filepath.Dir(p.final)
	needs.Write, needs.Images = append(needs.Write, at), append(needs.Images, at)
	console, err := s.openConsole()
	if err != nil {
		return err
	}
	if console != nil {
		defer console.Close()
	}
	waiting := &awaited{re: s.await, seen: make(chan struct{})}
	if s.console == "-" {
		waiting.out = os.Stdout
	} else if console != nil {
		waiting.out = console
	}
	a := newAgentLine()
	defer a.Close()
	c := guest.Config{
		Kernel: o.kernel, Modules: o.modules, Disks: o.disks, Shares: o.shares, Append: s.append, Transport: s.transport,
		Memory: s.memory, CPUs: s.cpus, NoTree: s.noTree, Version: version, Logger: g.logger(), Console: vmm.Serial{Out: waiting},
		BeforeStart: func(*vmm.Machine) error {
			giveMemoryBack()
			if !s.confine || !g.mayConfine {
				return nil
			}
			return confineSelf(g.logger(), needs)
		},
	}
	started := make(chan struct{})
	if s.await == nil {
		c.Command = guestinit.AgentCommand(false)
		c.Stdin, c.Stdout, c.Stderr = a.toGuest, a.fromGuest, os.Stderr
		c.OnStart = func(string) { close(started) }
	}
	run, err := guest.Start(ctx, c)
	if err != nil {
		return err
	}
	defer run.Close()
	ended := make(chan error, 1)
	go func() {
		r, err := run.Wait()
		if err == nil {
			err = fmt.Errorf("the guest ended before it could be frozen (%v)", r.Reason)
		}
		a.fromGuest.Close()
		ended <- err
	}()
	ready := waiting.seen
	if s.await == nil {
		ready = started
	}
	select {
	case <-ready:
	case err := <-ended:
		return exitWith(guest.ExitStatus(guest.Result{ExitStatus: guest.StatusCannotRun}, err), err)
	}
	snapshot, err := s.take(ctx, run, a, o, p, about)
	if err != nil {
		select {
		case ended := <-ended: // that is why
			var status *statusError
			if !errors.As(err, &status) {
				err = ended
			}
		default:
		}
		return err
	}
	defer snapshot.Close()
	run.Close() // nobody needs it any more
	if err := snapshot.Save(p.path, about); err != nil {
		return err
	}
	return p.publish()
}

// take runs the set-up and freezes the guest.
func (s *snapshotRequest) take(ctx context.Context, run *guest.Guest, a *agentLine, o *opened, p *partial, about *snapshotAbout) (*guest.Snapshot, error) {
	if s.await == nil {
		client := agent.NewClient(a.stdout, a.stdin)
		if len(s.command) > 0 {
			if err := runAgent(ctx, client, s.command, nil); err != nil {
				return nil, err
			}
		}
		held, err := client.Hold(ctx)
		if err != nil {
			return nil, err
		}
		about.Commands = held.Commands()
	}
	snapshot, err := run.Snapshot(ctx, guest.SnapshotOptions{Frozen: func() error {
		for i, d := range o.disks {
			// What the guest writes from now on is nobody's.
			live := filepath.Join(p.path, about.Disks[i].File+".live")
			if err := d.COW.Snapshot(live); err != nil {
				return err
			}
			if err := errors.Join(os.Remove(live), ownersOnly(filepath.Join(p.path, about.Disks[i].File))); err != nil {
				return err
			}
		}
		return nil
	}})
	about.Modules = err == nil && snapshot.HasModules()
	return snapshot, err
}

// ownersOnly lets nobody write to a file, and nobody but its owner read it. It
// goes by descriptor, as a confined process must.
func ownersOnly(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Chmod(0o400)
}

// agentLine is the streams of a guest's agent.
type agentLine struct {
	toGuest, stdout  *io.PipeReader
	stdin, fromGuest *io.PipeWriter
}

func newAgentLine() *agentLine {
	a := &agentLine{}
	a.toGuest, a.stdin = io.Pipe()
	a.stdout, a.fromGuest = io.Pipe()
	return a
}

// Close ends them all.
func (a *agentLine) Close() {
	for _, c := range []io.Closer{a.toGuest, a.stdin, a.stdout, a.fromGuest} {
		c.Close()
	}
}

// runAgent runs a command with this program's streams. A status that is not 0
// is a statusError.
func runAgent(ctx context.Context, c *agent.Client, args []string, stdin io.Reader) error {
	session, err := c.Start(agent.Command{Args: args, Env: guestinit.CommandEnv(nil), Dir: "/"}, stdin, os.Stdout, os.Stderr)
	if err != nil {
		return err
	}
	select {
	case <-session.Done():
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	exit, err := session.Wait()
	switch {
	case err != nil:
		return err
	case exit.Error != "":
		return &statusError{exit.Status, errors.New(printable.Text(exit.Error))}
	}
	return exitWith(exit.Status, nil)
}

// awaited is a console that something is waited for on.
type awaited struct {
	re   *regexp.Regexp // nil: for nothing
	out  io.Writer      // may be nil
	seen chan struct{}

	mu   sync.Mutex
	tail []byte
	done bool
}

// awaitedTail is how much of a console is looked at, in bytes.
const awaitedTail = 16 << 10

func (a *awaited) Write(p []byte) (int, error) {
	a.mu.Lock()
	if a.re != nil && !a.done {
		a.tail = append(a.tail, p...)
		if a.re.Match(bytes.ReplaceAll(a.tail, []byte("\r"), nil)) {
			a.done, a.tail = true, nil
			close(a.seen)
		} else if len(a.tail) > awaitedTail {
			a.tail = a.tail[len(a.tail)-awaitedTail:]
		}
	}
	a.mu.Unlock()
	if a.out == nil {
		return len(p), nil
	}
	return a.out.Write(p)
}
