package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/internal/agent"
	"github.com/moovm/moovm/internal/printable"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/vmm"
)

// restoreRequest is what is asked of `moovm run --restore`.
type restoreRequest struct {
	*machineRequest
	dir string
}

// forRestore are the flags of moovm run that do not shape the machine.
var forRestore = []string{"restore", "share", "timeout", "console", "accel", "modules", "no-confine", "backing-root", "quiet", "verbose"}

func newRestoreRequest(flags *pflag.FlagSet, m *machineFlags, dir string, args []string) (*restoreRequest, error) {
	var err error
	flags.Visit(func(f *pflag.Flag) {
		if err == nil && !slices.Contains(forRestore, f.Name) {
			err = fmt.Errorf("--%s: what the machine is, the snapshot says; leave it or --restore out", f.Name)
		}
	})
	if err != nil {
		return nil, err
	}
	r := &restoreRequest{dir: dir}
	command := args
	if len(command) == 0 {
		command = []string{"none"} // whether one is needed the snapshot says
	}
	if r.machineRequest, err = m.request(command); err != nil {
		return nil, err
	}
	r.command = args
	return r, nil
}

// restored is a snapshot, open, with disks of its own.
type restored struct {
	opened
	snapshot *guest.Snapshot
	about    snapshotAbout
}

// openRestore opens the snapshot and makes what its guest gets of its own.
func (r *restoreRequest) openRestore(ctx context.Context) (_ *restored, err error) {
	o := &restored{}
	defer func() {
		if err != nil {
			o.Close(ctx, r.images.log)
		}
	}()
	if o.snapshot, err = guest.OpenSnapshot(r.dir, &o.about); err != nil {
		return nil, err
	}
	o.hold("the snapshot", o.snapshot)
	switch {
	case o.about.Agent && len(r.command) == 0:
		return nil, errors.New("the snapshot's guest waits for commands; name one after --")
	case !o.about.Agent && len(r.command) > 0:
		return nil, errors.New("the snapshot's guest runs its disk's own init, which takes no COMMAND; leave it out")
	}
	for _, d := range o.about.Disks {
		options := r.images.options()
		for _, b := range d.Bases {
			moved, err := b.check()
			if err != nil {
				return nil, err
			}
			options.AllowStaleBacking = options.AllowStaleBacking || moved
		}
		if d.File != filepath.Base(d.File) || !strings.HasSuffix(d.File, ".cow") {
			return nil, fmt.Errorf("%s: %w: a disk is called %q", r.dir, vmm.ErrSnapshotDamaged, d.File)
		}
		path := filepath.Join(r.dir, d.File)
		if _, err := os.Lstat(path); err != nil {
			return nil, fmt.Errorf("a layer of the snapshot is missing: %w", err)
		}
		cow, err := openEphemeral(path+",format=cow", options)
		if err != nil {
			return nil, err
		}
		o.hold("disk "+path, cow)
		o.disks = append(o.disks, guest.Disk{COW: cow})
	}
	if len(r.shares) != len(o.about.Shares) {
		return nil, fmt.Errorf("the snapshot's guest has %d shares; name as many with --share, in the same order", len(o.about.Shares))
	}
	for i, s := range o.about.Shares {
		if f := r.shares[i]; f.tag != s.Tag || f.writable != s.Writable {
			return nil, fmt.Errorf("--share %s: the snapshot's share %d is %s, %s", f.text, i+1, printable.Text(s.Tag), map[bool]string{true: "writable", false: "read-only"}[s.Writable])
		}
	}
	if o.about.Modules {
		if err := r.openModules(o); err != nil {
			return nil, err
		}
	}
	return o, r.openShares(&o.opened)
}

// openModules finds the kernel's modules, where they lie beside the kernel of
// before, or as --modules says.
func (r *restoreRequest) openModules(o *restored) (err error) {
	release := o.about.Release
	if release != filepath.Base(release) || release == ".." {
		return fmt.Errorf("%s: %w: a kernel calls itself %q", r.dir, vmm.ErrSnapshotDamaged, release)
	}
	if r.modules != "" {
		o.modules, err = kmod.OpenModules(r.modules, release)
	} else {
		o.modules, err = kmod.FindModules(&kernel.Kernel{Path: o.about.Kernel, Release: release})
	}
	return err
}

func (r *restoreRequest) run(ctx context.Context, g *globals) error {
	cannot := func(err error) error { return &statusError{guest.StatusCannotRun, err} }
	ctx, cancel := g.signals.keepTime(ctx, r.timeout, g.relayed)
	defer cancel()
	r.images.log = g.logger()
	o, err := r.openRestore(ctx)
	if err != nil {
		return cannot(err)
	}
	defer func() { o.Close(ctx, g.logger()) }()
	boxed, err := r.choosePlace(ctx, g)
	switch {
	case ctx.Err() != nil:
		return &statusError{endStatus(context.Cause(ctx)), context.Cause(ctx)}
	case err != nil:
		return cannot(err)
	case boxed:
		r.memory = o.about.Memory
		r.kernel = o.about.Kernel // the sandbox's own may be the same
		writable, err := r.writable()
		if err != nil {
			return cannot(err)
		}
		return r.runBoxed(ctx, g, writable)
	}
	return r.goOn(ctx, g, o)
}

// goOn runs the snapshot's guest in this process.
func (r *restoreRequest) goOn(ctx context.Context, g *globals, o *restored) error {
	cannot := func(err error) error { return &statusError{guest.StatusCannotRun, err} }
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	needs, err := r.needs(o.modules)
	if err != nil {
		return cannot(err)
	}
	console, err := r.openConsole()
	if err != nil {
		return cannot(err)
	}
	c := guest.ForkConfig{Disks: o.disks, Shares: o.shares, Version: version, Logger: g.logger(), BeforeStart: func(*vmm.Machine) error {
		giveMemoryBack()
		if !r.confine || !g.mayConfine {
			return nil
		}
		return confineSelf(g.logger(), needs)
	}}
	if o.modules != nil {
		c.Modules = o.modules.Dir()
	}
	a := newAgentLine()
	defer a.Close()
	if console != nil {
		defer console.Close()
		c.Console.Out = console
	} else if r.console == "-" || !o.about.Agent {
		c.Console.Out = os.Stdout
	}
	var tty *terminal
	switch {
	case o.about.Agent:
		c.Stdin, c.Stdout, c.Stderr = a.toGuest, a.fromGuest, os.Stderr
	case isTerminal(os.Stdin, os.Stdout):
		keys := terminalKeys{quit: func() { end(errQuit) }}
		if g.relayed {
			keys.quit = nil
		}
		if tty, err = openTerminal(os.Stdin, os.Stdout, keys); err != nil {
			return cannot(err)
		}
		defer tty.Close()
		c.Console.In = tty
	default:
		c.Console.In = os.Stdin
	}
	run, err := o.snapshot.Fork(ctx, c)
	if err != nil {
		return cannot(err)
	}
	defer run.Close()
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _ = run.Wait()
		a.fromGuest.Close()
	}()
	if !o.about.Agent {
		defer g.signals.handle(askFirst(os.Stderr, run.Machine().PowerButton, func(s os.Signal) { end(signalCause(s, r.timeout)) }))()
		result, err := run.Wait()
		if tty != nil {
			tty.Close()
		}
		return ended(ctx, g.logger(), result, err)
	}
	err = r.runIn(ctx, a, o.about.Commands)
	var status *statusError
	switch {
	case err == nil || errors.As(err, &status):
		return err
	case ctx.Err() != nil:
		return &statusError{endStatus(context.Cause(ctx)), context.Cause(ctx)}
	case errors.Is(err, agent.ErrGone):
		<-gone
		result, err := run.Wait()
		return ended(ctx, g.logger(), result, err)
	}
	return cannot(err)
}

// runIn tells the guest who it is and runs the command in it.
func (r *restoreRequest) runIn(ctx context.Context, a *agentLine, commands uint32) error {
	client, held := agent.Clone(a.stdout, a.stdin, commands)
	id := agent.Identity{Clone: true, Entropy: make([]byte, 64), Time: time.Now().UnixNano()}
	rand.Read(id.Entropy)
	if err := held.Go(ctx, id); err != nil {
		return err
	}
	return runAgent(ctx, client, r.command, os.Stdin)
}
