package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/internal/bytejson"
	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/internal/reexec"
	"github.com/moovm/moovm/internal/sandbox"
)

// relayedRole is this program on the emulated host, when this program on this
// machine does the rest: it has the keyboard and keeps the time. The arguments
// are the same.
func relayedRole() reexec.Role {
	return reexec.Role{Name: "relayed", Main: func(root string) int { return program(os.Args[1:], true, root) }}
}

// runBoxed runs this same command line on an emulated host, which may write to
// the files and folders named.
func (r *machineRequest) runBoxed(ctx context.Context, g *globals, writable []string) error {
	cannot := func(err error) error { return &statusError{guest.StatusCannotRun, err} }
	if r.metrics != "" {
		return cannot(errors.New("--metrics: the socket would be in the sandbox, where nobody can reach it; leave it out, or use --accel kvm"))
	}
	if r.net != nil || r.vsock.cid != 0 {
		return cannot(errors.New("--net and --vsock: the sandbox has no way to this machine's network and sockets; leave them out, or use --accel kvm"))
	}
	if r.control.socket != "" {
		return cannot(errors.New("--control: the socket would be in the sandbox, where nobody can reach it; leave it out, or use --accel kvm"))
	}
	program, err := reexec.Path()
	if err != nil {
		return cannot(err)
	}
	c := sandbox.Config{
		// Memory for the guest, for what it writes to an ephemeral overlay, and
		// for the emulated host itself.
		Memory: max(sandbox.DefaultMemory, 2*r.memory+2<<30),
		Logger: g.logger(),
	}
	if c.Kernel, err = host.SandboxKernel(r.kernel); err != nil {
		return cannot(err)
	}
	for _, path := range writable {
		if path, err = absPath(path); err != nil {
			return cannot(err)
		}
		c.Writable = append(c.Writable, path)
	}
	root := ""
	if r.root != nil { // there is no network to pull it by
		b, err := bytejson.Marshal(r.root)
		if err != nil {
			return cannot(err)
		}
		root = string(b)
	}
	box := box{
		args: append([]string{program}, g.args...), env: []string{relayedRole().Env(root)},
		terminal: r.tty || len(r.command) == 0, escape: true, failed: guest.StatusCannotRun,
	}
	return box.run(ctx, g, c)
}

// writable are the files and folders that the machine writes to.
func (r *machineRequest) writable() (paths []string, err error) {
	for _, f := range r.disks {
		if !f.readOnly {
			path, err := absPath(f.path)
			if err != nil {
				return nil, err
			}
			paths = append(paths, path)
		}
	}
	for _, f := range r.shares {
		if f.writable {
			dir, err := absPath(f.dir)
			if err != nil {
				return nil, err
			}
			paths = append(paths, dir)
		}
	}
	if r.console != "" && r.console != "-" { // which need not exist yet
		path, err := absPath(r.console)
		if err != nil {
			return nil, err
		}
		paths = append(paths, filepath.Dir(path))
	}
	return paths, nil
}

// box is a command for the sandbox, with this process's streams.
type box struct {
	args []string
	env  []string // besides what every command gets
	// terminal gives it a terminal, if this process has one; escape ends it
	// with Ctrl-A x.
	terminal, escape bool
	failed           int // the exit status of a sandbox that does not work
}

// run runs the command there. Interrupts are the command's from when it has
// started; before, they end the sandbox.
func (b *box) run(ctx context.Context, g *globals, c sandbox.Config) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	signals := make(chan os.Signal, 4)
	pass := func(s os.Signal) {
		select {
		case signals <- s:
		default: // the ones before are enough
		}
	}
	defer g.signals.handle(pass)()
	if err := b.configure(&c); err != nil {
		return &statusError{b.failed, err}
	}
	c.Signals, c.EndSignal = signals, endSignal
	if b.terminal && isTerminal(os.Stdin, os.Stdout) {
		keys := terminalKeys{interrupt: func() { pass(syscall.SIGINT) }}
		if b.escape {
			keys.quit = func() { end(errQuit) }
		}
		tty, err := openTerminal(os.Stdin, os.Stdout, keys)
		if err != nil {
			return &statusError{b.failed, err}
		}
		defer tty.Close()
		c.Stdin = tty
		c.Command.Terminal = true
		c.Command.Rows, c.Command.Columns = tty.Size()
		sizes := make(chan sandbox.WindowSize, 1)
		resized := func(rows, columns uint16) {
			select {
			case <-sizes: // only the last one counts
			default:
			}
			select {
			case sizes <- sandbox.WindowSize{Rows: rows, Columns: columns}:
			default:
			}
		}
		tty.watchSize(resized)
		c.WindowSizes = sizes
		c.OnStart = func(string) {
			tty.started()
			resized(tty.Size()) // it may have changed while nobody could be told
		}
		status, err := sandbox.Run(ctx, c)
		tty.Close() // what is said now is said on a terminal as it was
		return b.ended(ctx, status, err)
	}
	status, err := sandbox.Run(ctx, c)
	return b.ended(ctx, status, err)
}

// configure fills in what every use of the sandbox has in common: this program
// as init, this folder, some of the environment.
func (b *box) configure(c *sandbox.Config) (err error) {
	if c.Init, err = reexec.Path(); err != nil {
		return err
	}
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	// The shell's search for the program happens here, where the user is.
	args := slices.Clone(b.args)
	if path, err := exec.LookPath(args[0]); err == nil {
		if args[0], err = filepath.Abs(path); err != nil {
			return err
		}
	}
	env := slices.Concat(sandboxEnviron(os.Environ()), b.env, []string{host.SandboxEnv + "=1"})
	c.Command = control.Command{Args: args, Env: env, Dir: dir}
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	return nil
}

// ended makes the exit status of what the sandbox returned.
func (b *box) ended(ctx context.Context, status int, err error) error {
	cause := context.Cause(ctx)
	var interrupted *sandbox.InterruptedError
	switch {
	case errors.As(err, &interrupted):
		return &statusError{exitInterrupted, errInterrupted}
	case cause != nil && (err != nil || status == 128+int(endSignal(cause))): // it could not even catch the signal
		if errors.Is(cause, errQuit) {
			fmt.Fprintln(os.Stderr, "moovm: stopped")
			return nil
		}
		return &statusError{endStatus(cause), cause}
	case err != nil:
		return &statusError{b.failed, err}
	}
	return exitWith(status, nil)
}

// endSignal tells the command why it must end.
func endSignal(cause error) syscall.Signal {
	switch {
	case errors.Is(cause, context.DeadlineExceeded):
		return signalTimeout
	case errors.Is(cause, errQuit):
		return signalQuit
	}
	return syscall.SIGINT
}

// sandboxVariables are the environment variables that programs get in the
// sandbox: what says who and where one is, and what moovm itself reads. Others
// may be secrets, which are nobody's business there.
var sandboxVariables = []string{"PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "COLORTERM", "NO_COLOR", "LANG", "LANGUAGE", "TZ", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "LC_*", "MOOVM_*"}

// sandboxEnviron is the part of an environment that goes to the sandbox.
func sandboxEnviron(environ []string) (out []string) {
	for _, e := range environ {
		name, _, _ := strings.Cut(e, "=")
		if slices.ContainsFunc(sandboxVariables, func(v string) bool {
			prefix, family := strings.CutSuffix(v, "*")
			return name == v || family && strings.HasPrefix(name, prefix)
		}) {
			out = append(out, e)
		}
	}
	return out
}
