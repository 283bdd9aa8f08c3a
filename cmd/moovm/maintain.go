package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/internal/printable"
)

// job runs a tool that may take long: with a progress bar on a terminal, and a status and a sentence of its own when Ctrl-C ends it.
func job(ctx context.Context, g *globals, what, remedy string, tool func(report func(done, total int64)) error) error {
	report, end := progress(g, what)
	_, err := advise(nil, tool(report))
	end()
	if err != nil && ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return &statusError{exitInterrupted, fmt.Errorf("interrupted; %s", remedy)}
	}
	return err
}

func newCommitCommand(g *globals) *cobra.Command {
	var images imageFlags
	cmd := &cobra.Command{
		Use:   "commit IMAGE",
		Short: "Merge an overlay into its backing file",
		Long: `Writes what is in the overlay into its backing file and empties the overlay.
Other overlays of that backing file become stale. If it is interrupted, run it
again: the overlay's contents are the same at every moment.`,
		Example: "  moovm commit root.cow",
		Args:    wantArgs("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return job(cmd.Context(), g, "committing", "run the same command again to finish", func(report func(done, total int64)) error {
				return cowdisk.Commit(cmd.Context(), args[0], images.tool(report))
			})
		},
	}
	images.register(cmd.Flags())
	return cmd
}

// formatHelp explains how disks of either kind are named.
const formatHelp = `A name that ends in .cow is a COW image; otherwise ,format=raw or ,format=cow
behind the name says what the file is. Without either its first bytes are looked
at, which a guest may have written: what begins like a COW image is refused.`

// registerInUse adds the flag that reads an image without a lock.
func registerInUse(f *pflag.FlagSet, inUse *bool) {
	f.BoolVar(inUse, "in-use", false, "read the image although another program writes to it; what is found may be out of date or torn")
}

func newRebaseCommand(g *globals) *cobra.Command {
	var (
		images     imageFlags
		base       string
		headerOnly bool
	)
	cmd := &cobra.Command{
		Use:   "rebase [-u] -b BASE IMAGE",
		Short: "Change an image's backing file",
		Long: `Makes BASE the backing file. The disk's contents stay equal: where BASE differs
from the old backing file, the old contents are copied into the image. With -u
only the header changes: for a backing file that was moved, or one that changed
and is known to be right. An empty BASE means none.`,
		Example: "  moovm rebase -b newer.img root.cow\n  moovm rebase -u -b /images/base.img root.cow",
		Args:    wantArgs("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("base") {
				return usageError(errors.New("moovm rebase: -b BASE is missing"))
			}
			file, format, err := cowdisk.SplitFormat(base)
			if err != nil {
				return usageError(fmt.Errorf("moovm rebase: %w", err))
			}
			if headerOnly {
				o := images.tool(nil)
				o.OtherFormat = format
				_, err := advise(nil, cowdisk.RebaseHeader(args[0], file, o))
				return err
			}
			return job(cmd.Context(), g, "rebasing", "the image is as good as before; run the same command again to finish", func(report func(done, total int64)) error {
				o := images.tool(report)
				o.OtherFormat = format
				return cowdisk.Rebase(cmd.Context(), args[0], file, o)
			})
		},
	}
	f := cmd.Flags()
	f.StringVarP(&base, "base", "b", "", "the new backing `FILE[,format=raw|cow]`; a relative path starts at the image's folder")
	f.BoolVarP(&headerOnly, "header-only", "u", false, "change the header only; the contents are then what BASE makes of them")
	images.register(f)
	return cmd
}

func newFlattenCommand(g *globals) *cobra.Command {
	var (
		images imageFlags
		format string
		inUse  bool
	)
	cmd := &cobra.Command{
		Use:   "flatten [-f raw|v2|v3] [--in-use] IMAGE[,format=raw|cow] OUT",
		Short: "Write the whole disk as a standalone image",
		Long: `Writes the contents of the disk, overlay and backing files together, to the new
file OUT: a sparse raw image, or with -f a COW image without a backing file.

` + formatHelp,
		Example: "  moovm flatten root.cow root.img\n  qemu-img convert -f raw -O qcow2 root.img root.qcow2",
		Args:    wantArgs("IMAGE", "OUT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			variant := cowdisk.VariantUnknown
			if format != "raw" {
				var err error
				if variant, err = cowdisk.ParseVariant(format); err != nil {
					return usageError(err)
				}
			}
			path, source, err := cowdisk.SplitFormat(args[0])
			if err != nil {
				return usageError(fmt.Errorf("moovm flatten: %w", err))
			}
			return job(cmd.Context(), g, "flattening", "nothing was left behind", func(report func(done, total int64)) error {
				o := images.tool(report)
				o.Format, o.NoLock = source, inUse
				return cowdisk.Flatten(cmd.Context(), path, args[1], variant, o)
			})
		},
	}
	f := cmd.Flags()
	registerInUse(f, &inUse)
	f.StringVarP(&format, "format", "f", "raw", "raw, v2 (QEMU) or v3 (User Mode Linux)")
	images.register(f)
	return cmd
}

func newResizeCommand(g *globals) *cobra.Command {
	var (
		images imageFlags
		shrink bool
	)
	cmd := &cobra.Command{
		Use:   "resize [--shrink] IMAGE SIZE",
		Short: "Make a disk larger, or with --shrink smaller",
		Long: `Changes the disk's size. What is added reads as zeros. The file system on the
disk does not change by itself: grow it afterwards (resize2fs), shrink it before.`,
		Example: "  moovm resize root.cow 20G",
		Args:    wantArgs("IMAGE", "SIZE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := parseSize(args[1])
			if err != nil {
				return usageError(fmt.Errorf("moovm resize: %w", err))
			}
			err = job(cmd.Context(), g, "resizing", "the image is as it was", func(report func(done, total int64)) error {
				return cowdisk.Resize(cmd.Context(), args[0], size, shrink, images.tool(report))
			})
			if err != nil {
				return err
			}
			if !g.quiet {
				fmt.Fprintf(cmd.ErrOrStderr(), "%s: now a disk of %s\n", printable.Text(args[0]), humanize.IBytes(uint64(size)))
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&shrink, "shrink", false, "allow a smaller size; what lies beyond it is lost")
	images.register(f)
	return cmd
}

func newCompareCommand(g *globals) *cobra.Command {
	var (
		images imageFlags
		inUse  bool
	)
	cmd := &cobra.Command{
		Use:   "compare [--in-use] A[,format=raw|cow] B[,format=raw|cow]",
		Short: "Compare the contents of two disks",
		Long: `Compares two disks, COW images with their backing files or raw images, and names
the first difference. Where one is longer, its end must be zeros.

Exit status: 0 same contents, 1 different, 2 wrong usage or an image that could
not be read.

` + formatHelp,
		Example: "  moovm compare root.cow root.img",
		Args:    wantArgs("A", "B"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var c cowdisk.Comparison
			a, formatA, err := cowdisk.SplitFormat(args[0])
			if err != nil {
				return usageError(fmt.Errorf("moovm compare: %w", err))
			}
			b, formatB, err := cowdisk.SplitFormat(args[1])
			if err != nil {
				return usageError(fmt.Errorf("moovm compare: %w", err))
			}
			err = job(cmd.Context(), g, "comparing", "nothing was decided", func(report func(done, total int64)) (err error) {
				o := images.tool(report)
				o.Format, o.OtherFormat, o.NoLock = formatA, formatB, inUse
				c, err = cowdisk.Compare(cmd.Context(), a, b, o)
				return err
			})
			if se := (*statusError)(nil); errors.As(err, &se) {
				return err
			}
			if err != nil { // as cmp(1) and qemu-img compare do: trouble is not "different"
				return &statusError{exitUsage, err}
			}
			if !c.Equal {
				if !g.quiet {
					fmt.Fprintf(cmd.OutOrStdout(), "%s and %s differ at byte %d (sector %d)\n", printable.Text(args[0]), printable.Text(args[1]), c.Offset, c.Offset/512)
				}
				return &statusError{status: 1}
			}
			if !g.quiet {
				fmt.Fprintf(cmd.OutOrStdout(), "%s and %s have the same contents\n", printable.Text(args[0]), printable.Text(args[1]))
			}
			return nil
		},
	}
	registerInUse(cmd.Flags(), &inUse)
	images.register(cmd.Flags())
	return cmd
}
