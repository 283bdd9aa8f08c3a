package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/kernel/debian"
)

// kernelPrefix begins a kernel that is named and not a file.
const kernelPrefix = "debian:"

// kernelHelp is how a kernel is named.
const kernelHelp = "`FILE`: vmlinuz (bzImage) or ELF vmlinux; or debian:NAME, fetched by apt and kept (current, 6.1, 6.12-cloud…)"

// kernelFile is the file of a kernel: itself, or if it is named, the one of that
// name, which is fetched if need be.
func (g *globals) kernelFile(ctx context.Context, kernel string) (string, error) {
	name, ok := strings.CutPrefix(kernel, kernelPrefix)
	if !ok {
		return kernel, nil
	}
	cache, err := host.CacheDir()
	if err != nil {
		return "", err
	}
	return debian.Fetch(ctx, cache, name, func(what string) {
		if !g.quiet {
			fmt.Fprintf(os.Stderr, "moovm: %s\n", what)
		}
	})
}

func newKernelCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "kernel NAME…",
		Short: "Fetch stock Debian kernels by name, and print where they are",
		Long: `Fetches kernels with this machine's apt, which verifies them, unpacks them into
the cache without installing them, and prints their files, a line each: the same
as --kernel debian:NAME does when it is used the first time. Modules lie beside
them. No privileges are needed.

Names: ` + strings.Join(debian.Names(), ", ") + `. current is the kernel of this machine's
own suite, which run and test use if no other is named.`,
		Example: `  moovm kernel current 6.12
  moovm run --kernel "$(moovm kernel 5.10)" --base base.img -- uname -r`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError(fmt.Errorf("moovm kernel: name one of %s", strings.Join(debian.Names(), ", ")))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, name := range args {
				file, err := g.kernelFile(cmd.Context(), kernelPrefix+strings.TrimPrefix(name, kernelPrefix))
				if err != nil {
					return err
				}
				fmt.Fprintln(cmd.OutOrStdout(), file)
			}
			return nil
		},
	}
}
