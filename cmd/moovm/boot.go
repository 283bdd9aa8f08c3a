package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/internal/confine"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/vmm"
)

// boot runs the guest in this process.
func (r *machineRequest) boot(ctx context.Context, g *globals, o *opened) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	log := g.logger()
	c := guest.Config{
		Kernel: o.kernel, Modules: o.modules, Initrd: o.initrd, Disks: o.disks, Shares: o.shares,
		Append: r.append, Transport: r.transport, Memory: r.memory, CPUs: r.cpus, NoTree: r.noTree,
		Version: version, Logger: log,
	}
	needs, err := r.needs(o.modules)
	if err != nil {
		return &statusError{guest.StatusCannotRun, err}
	}
	*o = opened{closers: o.closers} // what only the start needs is kept by nobody
	defer o.Close(ctx, log)         // before ctx is forgotten, which may have ended by itself
	console, err := r.openConsole()
	if err != nil {
		return &statusError{guest.StatusCannotRun, err}
	}
	if console != nil {
		defer console.Close()
		c.Console.Out = console
	}
	var counters *metricsServer
	if r.metrics != "" {
		if counters, err = listenMetrics(r.metrics); err != nil {
			return &statusError{guest.StatusCannotRun, fmt.Errorf("--metrics: %w", err)}
		}
		defer counters.Close()
	}
	if r.net != nil {
		n, end, err := r.openNetwork(log)
		if err != nil {
			return &statusError{guest.StatusCannotRun, err}
		}
		defer end.Close()
		c.Networks = []guest.Network{n}
	}
	if r.vsock.cid != 0 {
		s, err := r.openVsock(log)
		if err != nil {
			return &statusError{guest.StatusCannotRun, err}
		}
		defer s.Close()
		c.Vsock = s.dev
	}
	var asked *controlled
	if r.control.socket != "" {
		if asked, err = r.listenControl(c.Disks); err != nil {
			return &statusError{guest.StatusCannotRun, fmt.Errorf("--control: %w", err)}
		}
		defer asked.Close()
	}
	c.BeforeStart = r.beforeStart(g, log, counters, asked, needs)
	tty, err := r.connect(&c, g, end)
	if err != nil {
		return &statusError{guest.StatusCannotRun, err}
	}
	if tty != nil {
		defer tty.Close()
	}
	if asked != nil {
		asked.watch(&c.Console)
	}
	result, err := r.bootAndWait(ctx, g, c, tty, asked, end)
	if tty != nil {
		tty.Close()
	}
	return ended(ctx, log, result, err)
}

// openConsole makes the file for the serial console, if one is named.
func (r *machineRequest) openConsole() (*os.File, error) {
	if r.console == "" || r.console == "-" {
		return nil, nil
	}
	f, err := os.Create(r.console)
	if err != nil {
		return nil, fmt.Errorf("--console: %w", err)
	}
	return f, nil
}

// beforeStart is what is done when all that the machine needs is open and
// nothing of the guest has run.
func (r *machineRequest) beforeStart(g *globals, log *slog.Logger, counters *metricsServer, asked *controlled, needs confine.Needs) func(*vmm.Machine) error {
	confined := r.confine && g.mayConfine
	return func(machine *vmm.Machine) error {
		giveMemoryBack()
		spareProcessor()
		if counters != nil {
			counters.Serve(machine.Stats)
		}
		if asked != nil {
			asked.serve(machine)
		}
		if !confined {
			return nil
		}
		return confineSelf(log, needs)
	}
}

// connect gives the guest its streams: the command's, or the console's. If the
// guest has the terminal, that is returned.
func (r *machineRequest) connect(c *guest.Config, g *globals, end context.CancelCauseFunc) (tty *terminal, err error) {
	interactive := isTerminal(os.Stdin, os.Stdout) && (r.tty || len(r.command) == 0)
	if interactive {
		keys := terminalKeys{quit: func() { end(errQuit) }}
		if g.relayed {
			keys.quit = nil // who relays has looked at the keys
		}
		if tty, err = openTerminal(os.Stdin, os.Stdout, keys); err != nil {
			return nil, err
		}
	}
	if r.console == "-" || r.console == "" && len(r.command) == 0 {
		c.Console.Out = os.Stdout
	}
	dir, user, env := r.imageCommand()
	switch {
	case len(r.command) == 0 && tty != nil:
		c.Console.In = tty
	case len(r.command) == 0:
		c.Console.In = os.Stdin
	case tty != nil:
		rows, columns := tty.Size()
		c.Command = &control.Command{Args: r.command, Dir: dir, User: user, Env: env, Terminal: true, Rows: rows, Columns: columns}
		if name := os.Getenv("TERM"); name != "" {
			c.Command.Env = append([]string{"TERM=" + name}, env...)
		}
		c.Stdin, c.Stdout, c.Stderr = tty, os.Stdout, os.Stderr
	default:
		c.Command = &control.Command{Args: r.command, Dir: dir, User: user, Env: env}
		c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	}
	return tty, nil
}

// bootAndWait is guest.Boot with the power button at the first interrupt of a
// guest that runs no command, and the terminal's size for one that does.
func (r *machineRequest) bootAndWait(ctx context.Context, g *globals, c guest.Config, tty *terminal, asked *controlled, end context.CancelCauseFunc) (guest.Result, error) {
	run, err := guest.Start(ctx, c)
	if err != nil {
		return guest.Result{}, err
	}
	defer run.Close()
	if asked != nil {
		asked.running(run, func() { end(errQuit) })
	}
	if len(r.command) == 0 {
		defer g.signals.handle(askFirst(os.Stderr, run.Machine().PowerButton, func(s os.Signal) { end(signalCause(s, r.timeout)) }))()
	} else if tty != nil {
		tty.watchSize(func(rows, columns uint16) {
			_ = run.Control().Resize(rows, columns) // the guest may have ended
		})
	}
	return run.Wait()
}

// ended reports how a guest ended, and makes the exit status of it.
func ended(ctx context.Context, log *slog.Logger, result guest.Result, err error) error {
	if errors.Is(err, errQuit) {
		fmt.Fprintln(os.Stderr, "moovm: stopped")
		return nil
	}
	log.Log(ctx, slog.LevelInfo, "guest ended", "reason", result.Reason.String(), "took", result.Took)
	var failed *vmm.VCPUError
	if errors.As(err, &failed) {
		fmt.Fprint(os.Stderr, failed.Registers())
	}
	if stopped := (*guest.StoppedError)(nil); errors.As(err, &stopped) && !errors.Is(err, context.DeadlineExceeded) {
		return &statusError{exitInterrupted, err}
	}
	return exitWith(guest.ExitStatus(result, err), err)
}

// needs is what this process still has to open while the guest runs.
func (r *machineRequest) needs(modules *kmod.Modules) (confine.Needs, error) {
	var n confine.Needs
	if modules != nil {
		dir, err := absPath(modules.Dir())
		if err != nil {
			return n, err
		}
		n.Read = append(n.Read, dir)
	}
	for _, s := range r.shares {
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
	if r.metrics != "" {
		dir, err := absPath(filepath.Dir(r.metrics))
		if err != nil {
			return n, err
		}
		n.Remove, n.Sockets = append(n.Remove, dir), true
	}
	if r.control.socket != "" {
		dir, err := absPath(filepath.Dir(r.control.socket))
		if err != nil {
			return n, err
		}
		n.Remove, n.Sockets = append(n.Remove, dir), true
	}
	if r.vsock.cid != 0 {
		dir, err := absPath(filepath.Dir(r.vsock.path))
		if err != nil {
			return n, err
		}
		n.Remove, n.Sockets = append(n.Remove, dir), true
	}
	if r.control.dir != "" {
		dir, err := absPath(r.control.dir)
		if err != nil {
			return n, err
		}
		n.Images = []string{dir}
	}
	return n, nil
}

// absPath is where the kernel gets to with path.
func absPath(path string) (string, error) { return cowdisk.HostFS{}.Resolve(path) }
