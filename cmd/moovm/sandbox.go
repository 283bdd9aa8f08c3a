package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/internal/reexec"
	"github.com/moovm/moovm/internal/sandbox"
)

func newSandboxCommand(g *globals) *cobra.Command {
	memory := sizeFlag(sandbox.DefaultMemory)
	var (
		c       sandbox.Config
		console string
	)
	cmd := &cobra.Command{
		Use:   "sandbox [flags] -- COMMAND [ARG…]",
		Short: "Run a command on an emulated host whose KVM works",
		Long: `Boots an emulated host (QEMU without hardware help, its processor has AMD SVM)
and runs COMMAND there: /dev/kvm works in it. All files of this machine are
there as they are; what COMMAND writes is thrown away, except below the
folders given with --writable. The exit status is the command's.`,
		Example: `  moovm sandbox -- ls -l /dev/kvm
  moovm sandbox --memory 8G --writable out -- ./e2e.test -test.v`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError(fmt.Errorf("moovm sandbox: COMMAND is missing"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if c.Kernel == "" {
				k, err := host.Kernel()
				if err != nil {
					return err
				}
				c.Kernel = k
			}
			for i, dir := range c.Writable {
				abs, err := filepath.Abs(dir)
				if err != nil {
					return err
				}
				c.Writable[i] = abs
			}
			c.Memory = int64(memory)
			c.Logger = g.logger()
			if console != "" {
				f, err := os.Create(console)
				if err != nil {
					return err
				}
				defer f.Close()
				c.Console = f
			}
			status, err := runInSandbox(cmd.Context(), c, args)
			if err != nil {
				return err
			}
			return &statusError{status: status}
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Kernel, "kernel", "", "kernel of the emulated host `FILE` (default: $MOOVM_KERNEL, or the cached one)")
	f.StringVar(&c.Modules, "modules", "", "its modules `DIR` (default: beside the kernel)")
	f.Var(&memory, "memory", "memory of the emulated host")
	f.IntVar(&c.CPUs, "cpus", sandbox.DefaultCPUs, "processors of the emulated host")
	f.StringArrayVar(&c.Writable, "writable", nil, "`DIR` the command may write to (repeatable)")
	f.StringVar(&console, "console", "", "keep what the emulated host's kernel says in `FILE`")
	f.StringVar(&c.QEMU, "qemu", "", "emulator `PROGRAM` (default "+sandbox.DefaultQEMU+")")
	f.SetInterspersed(false)
	return cmd
}

// runInSandbox fills in what every use of the sandbox has in common: this
// program as init, this environment and folder, this terminal.
func runInSandbox(ctx context.Context, c sandbox.Config, args []string) (int, error) {
	init, err := reexec.Path()
	if err != nil {
		return 0, err
	}
	dir, err := os.Getwd()
	if err != nil {
		return 0, err
	}
	// The shell's search for the program happens here, where the user is.
	if path, err := exec.LookPath(args[0]); err == nil {
		if args[0], err = filepath.Abs(path); err != nil {
			return 0, err
		}
	}
	c.Init = init
	c.Command = guest.Command{Args: args, Env: append(os.Environ(), host.SandboxEnv+"=1"), Dir: dir}
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	if term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd())) {
		c.Command.Terminal = true
	}
	return sandbox.Run(ctx, c)
}
