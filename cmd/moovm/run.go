package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/internal/host"
)

func newRunCommand(g *globals) *cobra.Command {
	m := &machineFlags{}
	var from string
	cmd := &cobra.Command{
		Use:   "run [flags] [-- COMMAND [ARG…]]",
		Short: "Boot a guest on a disk, or run one command in it",
		Long: `Boots a Linux kernel in moovm's own KVM machine. Without COMMAND the disk's init
(systemd) takes over and this terminal is the guest's serial console; Ctrl-A x
stops the machine, Ctrl-A h shows help. With COMMAND, that runs on the root
disk, and its standard streams and exit status are this program's; with -t it
has a terminal, which is this one, and Ctrl-A works as on the console.

With --restore the guest is one from a snapshot: see moovm snapshot. Its disks are
overlays that are gone when it stops, nothing in the snapshot changes, and any
number can run at a time. Its shares are named again, and what else would shape
the machine is the snapshot's. It ends with COMMAND.

The first interrupt (SIGINT, SIGTERM) of a machine without COMMAND presses its
power button, the second stops it at once; with COMMAND the first one stops it.

Once everything is open, this process confines itself, where the kernel can
(Landlock, a seccomp filter, no new privileges): a guest that breaks out of its
machine can open no file, but those of its shares, start no program and make no
connection. --no-confine leaves that out. In the sandbox the same happens to
the process that runs the machine; QEMU around it is not confined.

--net user is a network without rights on this machine: 10.0.2.15 in the guest,
with DHCP and DNS, TCP and UDP (no IPv6), ping of the router 10.0.2.2. It
reaches public addresses; with an allow= only what those name. Never reached:
this machine's loopback (host opens it, as host.moovm.internal), multicast;
private, link-local and cloud metadata addresses and this machine's own only
when named. forward= leads from a port here to one there. A COMMAND finds the
interface configured; a disk's own system does that itself. The network runs
in a process of its own; the one that runs the guest has no socket.

The disk's metadata is in the guest at /run/moovm. Where this machine's KVM is
missing or cannot run a kernel, the same happens in the sandbox (moovm help
sandbox), which is slower; --accel chooses.

Exit status: COMMAND's; 124 timeout, 125 the machine could not run or ended too
early, 126 kernel panic, 130 interrupted; 0 after a power-off.`,
		Example: `  moovm run --image debian:12 -- cat /etc/os-release
  moovm run --kernel vmlinuz --disk root.cow
  moovm run --kernel vmlinuz --base base.img -- sh -c 'uname -a; exit 7'
  moovm run --kernel vmlinuz --base base.img --disk data.cow -t -- bash
  moovm run --kernel vmlinuz --base base.img --net user,forward=8080:80 -- ./server
  moovm run --kernel vmlinuz --base base.img --net user,allow=mirror.example:80 -- apt-get update
  moovm run --kernel vmlinuz --disk root.cow --metrics unix:root.metrics
  moovm run --kernel vmlinuz --disk root.cow --disk data.img,format=raw,ro --memory 2G --timeout 5m -- make check`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if dash := cmd.ArgsLenAtDash(); len(args) > 0 && dash != 0 {
				return usageError(fmt.Errorf("moovm run: %q is not a flag; write -- before the guest's command", args[0]))
			}
			if from != "" {
				r, err := newRestoreRequest(cmd.Flags(), m, from, args)
				if err != nil {
					return usageError(fmt.Errorf("moovm run: %w", err))
				}
				return r.run(cmd.Context(), g)
			}
			r, err := m.request(args)
			if err != nil {
				return usageError(fmt.Errorf("moovm run: %w", err))
			}
			return r.run(cmd.Context(), g)
		},
	}
	m.register(cmd.Flags())
	cmd.Flags().StringVar(&from, "restore", "", "go on from the snapshot in `DIR` (moovm snapshot) instead of booting")
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// run is the way of `moovm run`: what was asked, what is open, a guest here or
// in the sandbox, one exit status.
func (r *machineRequest) run(ctx context.Context, g *globals) error {
	ctx, cancel := g.signals.keepTime(ctx, r.timeout, g.relayed) // from here, wherever the guest runs
	defer cancel()
	if r.tty && !isTerminal(os.Stdin, os.Stdout) {
		return &statusError{guest.StatusCannotRun, errors.New("--tty: standard input and output are no terminal; leave it out")}
	}
	// Everything that can be wrong is looked at first, on this side of the
	// sandbox. The disks stay locked while the sandbox works on them.
	r.images.log = g.logger()
	var err error
	if r.kernel, err = g.kernelFile(ctx, r.kernel); err != nil {
		return r.cannot(ctx, err)
	}
	if err := r.takeImage(ctx, g); err != nil {
		if ended := (*statusError)(nil); errors.As(err, &ended) {
			return err
		}
		return r.cannot(ctx, err)
	}
	o, err := r.open(ctx)
	if err != nil {
		return &statusError{guest.StatusCannotRun, err}
	}
	defer func() { o.Close(ctx, g.logger()) }()
	boxed, err := r.choosePlace(ctx, g)
	switch {
	case ctx.Err() != nil, err != nil:
		return r.cannot(ctx, err)
	case boxed:
		writable, err := r.writable()
		if err != nil {
			return &statusError{guest.StatusCannotRun, err}
		}
		return r.runBoxed(ctx, g, writable)
	}
	return r.boot(ctx, g, o)
}

// cannot is the error of a machine that never ran: what ended ctx, or else err.
func (r *machineRequest) cannot(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return &statusError{endStatus(cause), cause}
	}
	return &statusError{guest.StatusCannotRun, err}
}

// choosePlace decides whether the sandbox is needed, and says so if that is not
// what one would think.
func (r *machineRequest) choosePlace(ctx context.Context, g *globals) (boxed bool, err error) {
	place, err := host.Choose(ctx, r.accel, guest.ProbeKVM)
	var none *host.NoKVMError
	if errors.As(err, &none) {
		return false, fmt.Errorf("%s; use --accel sandbox, or see moovm doctor", none.Reason)
	}
	if err == nil && place.Reason != "" && !g.quiet {
		fmt.Fprintf(os.Stderr, "moovm: running in the sandbox, which is slower: %s\n", place.Reason)
	}
	return place.Sandbox, err
}
