package main

import (
	"fmt"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/internal/printable"
)

func newCreateCommand(g *globals) *cobra.Command {
	var (
		o       cowdisk.CreateOptions
		size    sizeFlag
		variant string
		base    string
		images  imageFlags
	)
	cmd := &cobra.Command{
		Use:   "create [-b BASE] [-f v2|v3] [-s SIZE] IMAGE",
		Short: "Make a new overlay image",
		Long: `Makes a new copy-on-write image. With -b it shows BASE's contents until they are
written over; without, it is a disk of zeros and needs -s. The image is sparse:
a new one is as large as its header and bitmap. BASE must not change any more.
A relative BASE starts at IMAGE's folder, as it will when the image is used.

The image remembers whether BASE is raw or COW. A name that ends in .cow is COW;
otherwise ,format=raw or ,format=cow says it. Without either, BASE's first bytes
are looked at, which a guest may have written: what begins like a COW image is
refused.

Where the data begins in the file depends on the layout. In v3 it is at a multiple
of 4096, the page size. In v2 it is at a multiple of 512, of 4096 only for sizes
whose MiB leave a remainder of 10 or 11 when divided by 16, such as 10250M; with
others the host's page cache makes first writes of 4 KiB about a third slower.`,
		Example: `  moovm create -b base.img root.cow
  moovm create -s 10G data.cow
  moovm create -b base.img -s 10250M fast.cow
  moovm create -b base.img -f v3 uml.cow`,
		Args: wantArgs("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if base == "" && !cmd.Flags().Changed("size") {
				return usageError(fmt.Errorf("moovm create: a disk without a base needs a size; add -s SIZE or -b BASE"))
			}
			if cmd.Flags().Changed("size") && size == 0 {
				return usageError(fmt.Errorf("moovm create: a disk of size 0 holds nothing; give -s a size of at least 512 bytes"))
			}
			v, err := cowdisk.ParseVariant(variant)
			if err != nil {
				return usageError(err)
			}
			if o.Backing, o.BackingFormat, err = cowdisk.SplitFormat(base); err != nil {
				return usageError(fmt.Errorf("moovm create: %w", err))
			}
			opts := images.options()
			o.Variant, o.Size, o.Log, o.BackingRoots = v, int64(size), g.logger(), opts.BackingRoots
			o.AllowStaleBacking, o.AllowMissingBacking = opts.AllowStaleBacking, opts.AllowMissingBacking
			if _, err := advise(nil, cowdisk.Create(args[0], o)); err != nil || g.quiet {
				return err
			}
			d, trouble, err := images.inspect(args[0])
			if err != nil {
				return err
			}
			defer d.Close()
			out := cmd.ErrOrStderr()
			fmt.Fprintf(out, "%s: a disk of %s (%d bytes), layout %v\n", printable.Text(args[0]), humanize.IBytes(uint64(d.Size())), d.Size(), v)
			if trouble != nil {
				fmt.Fprintf(out, "moovm: warning: other commands will not open it: %s\n", printable.Text(trouble.Detail))
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVarP(&base, "base", "b", "", "backing `FILE[,format=raw|cow]`: raw disk image, block device or another overlay")
	f.VarP(&size, "size", "s", "size of the disk (default: the base's)")
	f.StringVarP(&variant, "format", "f", "v2", "layout: v2 (QEMU, x86-64) or v3 (User Mode Linux)")
	images.register(f)
	return cmd
}
