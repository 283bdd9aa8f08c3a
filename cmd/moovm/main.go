// Command moovm makes copy-on-write root disks and boots Linux guests on them.
//
// Run `moovm help` for its commands; the library packages beside it do the
// work: cowdisk, virtioblk, vmm and guest.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/moovm/moovm/guest/guesttest"
)

// version is set by the linker.
var version = "dev"

// Exit statuses of every command; `run` adds its own.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2

	exitInterrupted = 128 + int(syscall.SIGINT)
)

// statusError carries an exit status; a nil err means that everything there
// is to say has been said.
type statusError struct {
	status int
	err    error
}

func (e *statusError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}

func (e *statusError) Unwrap() error { return e.err }

// misuse is an error about how the command was called: its help is what remedies it.
type misuse struct{ error }

func (e misuse) Unwrap() error { return e.error }

func usageError(err error) error { return &statusError{exitUsage, misuse{err}} }

func main() {
	guesttest.Hook() // this program is also the guests' init
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	status := run(ctx, os.Args[1:])
	stop()
	os.Exit(status)
}

func run(ctx context.Context, args []string) int {
	root := newRoot(&globals{mayConfine: true})
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	status := exitFailed
	var se *statusError
	if errors.As(err, &se) {
		if status, err = se.status, se.err; err == nil {
			return status
		}
	}
	fmt.Fprintf(root.ErrOrStderr(), "moovm: %s\n", strings.TrimPrefix(err.Error(), "moovm "))
	if errors.As(err, &misuse{}) {
		fmt.Fprintln(root.ErrOrStderr(), "Run with --help for usage and examples.")
	}
	return status
}

// globals are the flags every command has.
type globals struct {
	quiet   bool
	verbose int

	// mayConfine is for the program itself: tests that run a command in their
	// own process go on afterwards.
	mayConfine bool
	noConfine  bool
}

func (g *globals) logger() *slog.Logger {
	level := slog.LevelWarn
	switch {
	case g.quiet:
		level = slog.LevelError
	case g.verbose == 1:
		level = slog.LevelInfo
	case g.verbose > 1:
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

func newRootCommand() *cobra.Command { return newRoot(&globals{}) }

func newRoot(g *globals) *cobra.Command {
	root := &cobra.Command{
		Use:   "moovm",
		Short: "Copy-on-write root disks, and a small KVM machine that boots stock Linux on them",
		Long: `moovm makes copy-on-write root disks (the COW format of User Mode Linux and QEMU)
and boots stock Linux kernels on them in a small KVM machine of its own.`,
		Example: `  moovm create -b base.img root.cow
  moovm run --kernel vmlinuz --disk root.cow
  moovm run --kernel vmlinuz --base base.img -- uname -a`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError(fmt.Errorf("there is no command %q", args[0]))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError(err) })
	root.PersistentFlags().BoolVarP(&g.quiet, "quiet", "q", false, "say only errors")
	root.PersistentFlags().CountVarP(&g.verbose, "verbose", "v", "say more; twice for debugging")
	root.AddCommand(
		newCreateCommand(g),
		newInfoCommand(),
		newMapCommand(),
		newCheckCommand(g),
		newCommitCommand(g),
		newRebaseCommand(g),
		newFlattenCommand(g),
		newResizeCommand(g),
		newCompareCommand(g),
		newRunCommand(g),
		newTestCommand(g),
		newDoctorCommand(),
		newSandboxCommand(g),
		newServeCommand(g),
	)
	return root
}

// wantArgs is cobra.ExactArgs with a usage error that names the arguments.
func wantArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usageError(fmt.Errorf("%s: %s is missing", cmd.CommandPath(), names[len(args)]))
		case len(args) > len(names):
			return usageError(fmt.Errorf("%s: %q is one argument too many", cmd.CommandPath(), args[len(names)]))
		}
		return nil
	}
}
