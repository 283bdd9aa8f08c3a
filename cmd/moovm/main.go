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
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/moovm/moovm/guest/guesttest"
	"github.com/moovm/moovm/internal/printable"
)

// version is set by the linker.
var version = "dev"

func main() {
	guesttest.Hook(relayedRole(), networkRole(), vsockRole()) // this program is also the guests' init
	os.Exit(program(os.Args[1:], false, ""))
}

// program is what this process does, from its arguments to its exit status.
// pulled is what the relaying side made of --image.
func program(args []string, relayed bool, pulled string) int {
	g := &globals{args: args, relayed: relayed, relayedRoot: pulled, mayConfine: true}
	if relayed {
		g.signals = catchInterrupts(signalTimeout, signalQuit)
	} else {
		g.signals = catchInterrupts()
	}
	defer g.signals.Close()
	root := newRoot(g)
	root.SetArgs(args)
	return execute(g.signals.ctx, root)
}

func execute(ctx context.Context, root *cobra.Command) int {
	out := watchOutput(root)
	err := out.failed(root.ExecuteContext(ctx))
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
	fmt.Fprintf(root.ErrOrStderr(), "moovm: %s\n", printable.Lines(strings.TrimPrefix(err.Error(), "moovm ")))
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

	args    []string // of this program
	signals *interrupts
	relayed bool // see relayedRole
	// relayedRoot is the oci.Root that the other side made, as JSON.
	relayedRoot string
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
		newPullCommand(g),
		newInfoCommand(),
		newMapCommand(),
		newCheckCommand(g),
		newCommitCommand(g),
		newRebaseCommand(g),
		newFlattenCommand(g),
		newResizeCommand(g),
		newCompareCommand(g),
		newRunCommand(g),
		newSnapshotCommand(g),
		newCtlCommand(),
		newKernelCommand(g),
		newTreeCommand(),
		newRmCommand(),
		newExportCommand(g),
		newImportCommand(g),
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
		if i := slices.Index(args, ""); i >= 0 {
			return usageError(fmt.Errorf("%s: %s is empty", cmd.CommandPath(), names[i]))
		}
		return nil
	}
}
