package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/moovm/moovm/guest/imagefs"
	"github.com/moovm/moovm/internal/closing"
	"github.com/moovm/moovm/internal/printable"
	"github.com/moovm/moovm/internal/unixsock"
	"github.com/moovm/moovm/virtio/vhostuser"
	"github.com/moovm/moovm/virtio9p/fence"
	"github.com/moovm/moovm/virtioblk"
)

func newServeCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "serve",
		Short:   "Serve a disk to other machines, or the metadata tree on a socket",
		Example: "  moovm serve vhost-user --socket disk.sock root.cow\n  moovm serve 9p --listen unix:tree.sock root.cow",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError(fmt.Errorf("moovm serve: there is no %q; serve vhost-user or 9p", args[0]))
			}
			return usageError(errors.New("moovm serve: say what: vhost-user or 9p"))
		},
		RunE: func(*cobra.Command, []string) error { return nil },
	}
	cmd.AddCommand(newServeVhostUserCommand(g), newServe9PCommand(g))
	return cmd
}

func newServeVhostUserCommand(g *globals) *cobra.Command {
	var (
		images imageFlags
		socket string
		queues int
	)
	cmd := &cobra.Command{
		Use:   "vhost-user --socket PATH IMAGE[,ro][,serial=NAME][,format=raw|cow]",
		Short: "Our block device for any other virtual machine monitor",
		Long: `Serves IMAGE as a vhost-user block device on a UNIX socket, for QEMU, Cloud
Hypervisor, crosvm and others, until it is interrupted. One client at a time.

Started again after it was killed, it goes on where it stopped: a client that
connects again (reconnect=1 in QEMU) loses no write that had completed.`,
		Example: `  moovm serve vhost-user --socket disk.sock root.cow
  qemu-system-x86_64 -object memory-backend-memfd,id=m,size=1G,share=on -machine memory-backend=m \
      -chardev socket,id=c,path=disk.sock,reconnect=1 -device vhost-user-blk-pci,chardev=c`,
		Args: wantArgs("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if socket == "" {
				return usageError(errors.New("moovm serve vhost-user: --socket PATH is missing"))
			}
			flag, err := parseDisk(args[0])
			if err != nil {
				return usageError(fmt.Errorf("moovm serve vhost-user: %w", err))
			}
			images.log = g.logger()
			d, err := flag.open(images.options())
			if err != nil {
				return err
			}
			defer func() { warnLate(g.logger(), closing.AtEnd(closing.Item{Name: "disk " + flag.path, Closer: d})) }()
			dev, err := virtioblk.New(virtioblk.Config{
				Backend: d, ReadOnly: flag.readOnly, Serial: flag.serial, Queues: queues, Logger: g.logger(),
			})
			if err != nil {
				return err
			}
			l, err := vhostuser.Listen(socket)
			if err != nil {
				return err
			}
			if err := g.confineServer(socket); err != nil {
				return err
			}
			if !g.quiet {
				fmt.Fprintf(cmd.ErrOrStderr(), "%s is served on %s\n", printable.Text(flag.path), printable.Text(socket))
			}
			err = vhostuser.Serve(cmd.Context(), l, dev, vhostuser.Options{Logger: g.logger(), CloseWait: closing.Limit})
			if cmd.Context().Err() != nil && errors.Is(err, vhostuser.ErrStuck) {
				return nil // it was to end; closing the disk says why it is not whole
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&socket, "socket", "", "`PATH` of the UNIX socket to make")
	f.IntVar(&queues, "queues", 1, "request queues")
	f.BoolVar(&g.noConfine, "no-confine", false, noConfineHelp)
	images.register(f)
	return cmd
}

func newServe9PCommand(g *globals) *cobra.Command {
	var (
		images imageFlags
		listen string
		reveal bool
	)
	cmd := &cobra.Command{
		Use:   "9p --listen unix:PATH IMAGE[,format=raw|cow]…",
		Short: "The metadata tree of images on a socket",
		Long: `Serves the tree that guests see at /run/moovm, for images on this machine, until
it is interrupted. The images are opened read-only, and shown as they are then;
what a running machine does to its own is in its guest. The first is disks/vda.`,
		Example: `  moovm serve 9p --listen unix:tree.sock root.cow
  mount -t 9p -o trans=unix,version=9p2000.L,ro tree.sock /mnt`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError(errors.New("moovm serve 9p: IMAGE is missing"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			socket, ok := strings.CutPrefix(listen, "unix:")
			if !ok || socket == "" {
				return usageError(fmt.Errorf("moovm serve 9p: --listen %q: write unix:PATH", listen))
			}
			var disks []imagefs.Disk
			for i, arg := range args {
				flag, err := parseDisk(arg)
				if err != nil {
					return usageError(fmt.Errorf("moovm serve 9p: %w", err))
				}
				o := images.options()
				o.ReadOnly, o.NoLock = true, true // also while a machine uses it
				d, err := flag.open(o)
				if err != nil {
					return err
				}
				defer d.Close()
				disks = append(disks, imagefs.Disk{
					Name: imagefs.DiskName(i), Serial: flag.serial, ReadOnly: true,
					Image: imagefs.COW(d), RevealPaths: reveal,
				})
			}
			tree, err := imagefs.New(version, disks...)
			if err != nil {
				return err
			}
			l, err := unixsock.Listen(socket)
			if err != nil {
				return err
			}
			if err := g.confineServer(socket); err != nil {
				return err
			}
			if !g.quiet {
				fmt.Fprintf(cmd.ErrOrStderr(), "the tree is served on %s\n", printable.Text(socket))
			}
			return fence.Serve(cmd.Context(), l, fence.Config{Attacher: tree, Logger: g.logger()})
		},
	}
	f := cmd.Flags()
	f.StringVar(&listen, "listen", "", "`unix:PATH` of the socket to make")
	f.BoolVar(&reveal, "reveal-paths", false, "show clients the paths of files on this machine")
	f.BoolVar(&g.noConfine, "no-confine", false, noConfineHelp)
	images.register(f)
	return cmd
}
