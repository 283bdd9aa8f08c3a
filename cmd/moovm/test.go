package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/guesttest"
)

func newTestCommand(g *globals) *cobra.Command {
	var (
		c             guesttest.Config
		disks, shares []string
		memory        = sizeFlag(guesttest.DefaultMemory)
	)
	cmd := &cobra.Command{
		Use:   "test [flags] BINARY [ARG…]",
		Short: "Run a Go test binary inside a real kernel",
		Long: `Boots a guest and runs a Go test binary in it, as root, with ARG…, the package's
folder as working folder and this program's environment. It works as the -exec
program of go test. Output, signals and exit status pass through; files that
the tests are told to write (profiles, coverage) come back.

Without --base, the guest's root is this machine's own, read-only below an
overlay in memory: all programs and libraries are there. /tmp is empty. With
--base, it is an overlay on that image, gone when the machine stops.

--setup 'SHELL' runs before the tests, as root in the guest, with the tests'
folder and environment; what it writes goes to stderr. If it fails, the tests
do not run, and moovm says so and ends with 125. BINARY may also be a script
that ends with exec of a test binary: it is then the script of the tests.

Where this machine's KVM is missing or cannot run a kernel, the same happens in
the sandbox, which is slower and which all runs at a time share.

Exit status: the test binary's; 124 timeout, 125 the machine could not run or
ended too early, 126 kernel panic. A run that passed, but whose kernel had an
oops or a lockup, is 1.`,
		Example: `  moovm test ./x.test -test.v -test.run TestMount
  go test -exec 'moovm test' ./...
  go test -exec 'moovm test --kernel 5.10/vmlinuz --kernel 6.12/vmlinuz' -v ./fs
  moovm test --setup 'mount -t tracefs t /mnt; sysctl -w vm.overcommit_memory=1' ./x.test
  moovm test --base base.img --disk size=1G --disk size=64M,fault=EIO@1M+4K ./x.test`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError(errors.New("moovm test: the test binary is missing; `go test -c` makes one"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, s := range disks {
				d, err := guesttest.ParseDisk(s, parseSize)
				if err != nil {
					return usageError(fmt.Errorf("moovm test: %w", err))
				}
				c.Disks = append(c.Disks, d)
			}
			for _, s := range shares {
				f, err := parseShare(s)
				if err != nil {
					return usageError(fmt.Errorf("moovm test: %w", err))
				}
				c.Shares = append(c.Shares, guesttest.Share{Dir: f.dir, Target: f.target(), Writable: f.writable})
			}
			if cmd.Flags().Changed("cpus") && c.CPUs < 1 {
				return usageError(fmt.Errorf("moovm test: --cpus %d: a guest has at least one processor", c.CPUs))
			}
			c.Memory, c.Quiet = int64(memory), g.quiet
			if err := c.Check(); err != nil {
				return usageError(fmt.Errorf("moovm test: %w", err))
			}
			for i, k := range c.Kernels {
				file, err := g.kernelFile(cmd.Context(), k)
				if err != nil {
					return exitWith(guest.StatusCannotRun, err)
				}
				c.Kernels[i] = file
			}
			// Not the command's context: a signal is the test binary's.
			status, err := guesttest.Run(context.Background(), c, args[0], args[1:])
			return exitWith(status, err)
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&c.Kernels, "kernel", nil, "kernel "+kernelHelp+" (repeatable: the tests run in each; default: the list $MOOVM_KERNEL, or the cached one)")
	f.StringVar(&c.Modules, "modules", "", "the kernel's modules `DIR` (default: beside the kernel, or /lib/modules)")
	f.StringArrayVar(&c.LoadModules, "load", nil, "kernel `MODULE` to load first (repeatable)")
	f.StringArrayVar(&c.Setup, "setup", nil, "run `SHELL` in the guest before the tests: mounts, settings (repeatable)")
	f.StringVar(&c.Append, "append", "", "added to the kernel's command line: `\"ARG…\"`")
	f.StringVar(&c.Base, "base", "", "an ephemeral overlay on `FILE[,format=raw|cow]` as the root file system")
	f.StringVar(&c.Root, "root", "", "root file system without --base: `host or initramfs` (default host)")
	f.StringArrayVar(&disks, "disk", nil, "a further disk `size=SIZE|FILE[,ro][,format=raw|cow][,serial=NAME][,slow=TIME][,volatile][,fault=[OP:]EIO@OFFSET[+LENGTH]]` (repeatable); a comma in FILE is written twice")
	f.StringArrayVar(&shares, "share", nil, "`TAG=DIR[,rw]`: a folder of this machine, at /mnt/TAG in the guest (repeatable)")
	f.StringArrayVar(&c.Env, "env", nil, "`NAME=VALUE` added to the environment (repeatable)")
	f.Var(&memory, "memory", "the guest's memory")
	f.IntVar(&c.CPUs, "cpus", 0, "the guest's processors (default: this machine's, at most 4; in the sandbox 1)")
	f.DurationVar(&c.Timeout, "timeout", 0, "end the guest after `TIME` (default: -test.timeout and a little more)")
	f.DurationVar(&c.BootTimeout, "boot-timeout", 0, "how long the guest may take to start the tests: `TIME` (default 1m, in the sandbox 3m)")
	f.StringVar(&c.Artifacts, "artifacts", "", "keep console log, core files, and the overlay of a failed run in `DIR`")
	f.BoolVar(&c.Keep, "keep", false, "keep the overlay of a run that passed, too")
	f.BoolVar(&c.IgnoreOops, "ignore-oops", false, "let tests pass although the kernel had an oops or a lockup")
	f.BoolVar(&c.NoConfine, "no-confine", false, noConfineHelp)
	f.StringVar(&c.Accel, "accel", "auto", "auto, kvm or sandbox: where the machine runs")
	f.SetInterspersed(false)
	return cmd
}
