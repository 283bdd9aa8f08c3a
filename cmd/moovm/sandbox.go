package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/internal/sandbox"
)

func newSandboxCommand(g *globals) *cobra.Command {
	memory := sizeFlag(sandbox.DefaultMemory)
	var (
		c       sandbox.Config
		console string
		env     []string
	)
	cmd := &cobra.Command{
		Use:   "sandbox [flags] -- COMMAND [ARG…]",
		Short: "Run a command on an emulated host whose KVM works",
		Long: `Boots an emulated host (QEMU without hardware help, its processor has AMD SVM)
and runs COMMAND there: /dev/kvm works in it. All files of this machine are
there as they are; what COMMAND writes is thrown away, except to the files and
below the folders given with --writable. Of the environment it gets PATH, HOME, USER, TERM,
LANG, LC_*, TZ, TMPDIR and the like, MOOVM_*, and what --env names. An interrupt
that comes before COMMAND has started ends the sandbox (exit status 130); later
ones are COMMAND's, whose exit status is this program's.`,
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
			var err error
			if c.Kernel, err = g.kernelFile(cmd.Context(), c.Kernel); err != nil {
				return err
			}
			for i, dir := range c.Writable {
				abs, err := absPath(dir)
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
			extra, err := variables(env)
			if err != nil {
				return usageError(fmt.Errorf("moovm sandbox: %w", err))
			}
			box := box{args: args, env: extra, terminal: true, failed: exitFailed}
			return box.run(cmd.Context(), g, c)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Kernel, "kernel", "", "kernel of the emulated host "+kernelHelp+" (default: $MOOVM_KERNEL, or the cached one)")
	f.StringVar(&c.Modules, "modules", "", "its modules `DIR` (default: beside the kernel)")
	f.Var(&memory, "memory", "memory of the emulated host")
	f.IntVar(&c.CPUs, "cpus", sandbox.DefaultCPUs, "processors of the emulated host")
	f.StringArrayVar(&c.Writable, "writable", nil, "folder or regular file `PATH` the command may write to; a file keeps its holes and gets new ones (repeatable)")
	f.StringArrayVar(&env, "env", nil, "`NAME[=VALUE]`: a further environment variable for COMMAND, with its value here if none is given (repeatable)")
	f.StringVar(&console, "console", "", "keep what the emulated host's kernel says in `FILE`")
	f.StringVar(&c.QEMU, "qemu", "", "emulator `PROGRAM` (default "+sandbox.DefaultQEMU+")")
	f.SetInterspersed(false)
	return cmd
}

// variables are NAME=VALUE of what --env gave. A name alone that is not set here
// is left out.
func variables(env []string) (out []string, err error) {
	for _, e := range env {
		name, _, valued := strings.Cut(e, "=")
		if name == "" {
			return nil, fmt.Errorf("--env %s: write NAME or NAME=VALUE", e)
		}
		if value, set := os.LookupEnv(name); !valued && set {
			out = append(out, name+"="+value)
		} else if valued {
			out = append(out, e)
		}
	}
	return out, nil
}
