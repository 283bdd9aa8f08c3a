package main

import (
	"fmt"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/moovm/moovm/cowdisk"
)

func newCreateCommand(g *globals) *cobra.Command {
	var (
		o       cowdisk.CreateOptions
		size    sizeFlag
		variant string
	)
	cmd := &cobra.Command{
		Use:   "create [-b BASE] [-f v2|v3] [-s SIZE] IMAGE",
		Short: "Make a new overlay image",
		Long: `Makes a new copy-on-write image. With -b it shows BASE's contents until they are
written over; without, it is a disk of zeros and needs -s. The image is sparse:
a new one is as large as its header and bitmap. BASE must not change any more.

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
			if o.Backing == "" && !cmd.Flags().Changed("size") {
				return usageError(fmt.Errorf("moovm create: a disk without a base needs a size; add -s SIZE or -b BASE"))
			}
			if cmd.Flags().Changed("size") && size == 0 {
				return usageError(fmt.Errorf("moovm create: a disk of size 0 holds nothing; give -s a size of at least 512 bytes"))
			}
			v, err := cowdisk.ParseVariant(variant)
			if err != nil {
				return usageError(err)
			}
			o.Variant, o.Size, o.Log = v, int64(size), g.logger()
			if err := cowdisk.Create(args[0], o); err != nil {
				return err
			}
			if !g.quiet {
				d, err := cowdisk.Open(args[0], cowdisk.Options{ReadOnly: true, NoLock: true, Backing: o.Backing, AllowMissingBacking: o.AllowMissingBacking})
				if err != nil {
					return err
				}
				defer d.Close()
				fmt.Fprintf(cmd.ErrOrStderr(), "%s: a disk of %s (%d bytes), layout %v\n",
					args[0], humanize.IBytes(uint64(d.Size())), d.Size(), v)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.Backing, "base", "b", "", "backing `FILE`: raw disk image, block device or another overlay")
	f.VarP(&size, "size", "s", "size of the disk (default: the base's)")
	f.StringVarP(&variant, "format", "f", "v2", "layout: v2 (QEMU, x86-64) or v3 (User Mode Linux)")
	f.BoolVar(&o.AllowMissingBacking, "allow-missing-backing", false, "make the image although its base does not exist")
	return cmd
}
