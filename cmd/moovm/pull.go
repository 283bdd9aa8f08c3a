package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/moovm/moovm/internal/bytejson"
	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/oci"
)

// pullFlags say how images are found.
type pullFlags struct {
	platform string
	mirrors  []string
	size     sizeFlag
}

func (p *pullFlags) register(f *pflag.FlagSet) {
	f.StringVar(&p.platform, "platform", "", "the image's platform, as `OS/ARCH` (default linux/amd64)")
	f.StringArrayVar(&p.mirrors, "mirror", nil, "`REGISTRY=HOST`: a mirror that is asked first, such as docker.io=mirror.example:5000 (repeatable; http:// in front of HOST means without TLS)")
}

func (p *pullFlags) used() bool { return p.size != 0 || p.platform != "" || len(p.mirrors) > 0 }

// options find what is wrong with the flags.
func (p *pullFlags) options() (oci.Options, oci.CreateOptions, error) {
	o := oci.Options{Platform: p.platform, Stdin: os.Stdin}
	for _, m := range p.mirrors {
		registry, at, ok := strings.Cut(m, "=")
		if !ok || registry == "" || at == "" {
			return o, oci.CreateOptions{}, fmt.Errorf("--mirror %s: write REGISTRY=HOST, such as docker.io=mirror.example:5000", m)
		}
		if o.Mirrors == nil {
			o.Mirrors = map[string][]string{}
		}
		o.Mirrors[registry] = append(o.Mirrors[registry], at)
	}
	return o, oci.CreateOptions{Size: int64(p.size)}, nil
}

// imageCache is where root disks of images are kept.
func imageCache(g *globals) (oci.Cache, error) {
	dir, err := host.CacheDir()
	log := g.logger()
	return oci.Cache{Dir: filepath.Join(dir, "images"), Log: func(format string, args ...any) { log.Info(fmt.Sprintf(format, args...)) }}, err
}

func newPullCommand(g *globals) *cobra.Command {
	var (
		p      pullFlags
		out    string
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "pull [-o BASE.img] [-s SIZE] REF|FILE|-",
		Short: "Make a root disk of a container image",
		Long: `Finds a container image and makes an ext4 root disk of it, which is an ordinary
base: for create -b and run --base. Prints its path. It needs no privileges, no
container engine and no mkfs; two disks of the same image are equal, byte for
byte.

REF is a name as docker pull takes it; credentials are those of docker login.
FILE is a tarball of docker save or of the OCI layout, packed or not, or such a
folder; where several images are in it, FILE#NAME says which. - reads a tarball
from standard input. A name that exists as a file or folder is that file;
docker://REF never is.

The disk is kept in the cache by the image's digest, and so are the layers of
registries, which images share; layers that nobody used for a month are removed.
What a tag means is asked each time. With -o the disk becomes that file instead.
Do not change a base: overlays of it would break.

The disk is sparse, and as large as -s says: without it, 4 GiB or half of the
contents more than the image needs. The kernel is moovm's, the image needs none.`,
		Example: `  moovm pull debian:12
  moovm create -b "$(moovm pull -q debian:12)" root.cow
  moovm pull -o base.img -s 20G registry.example/some/image@sha256:…
  docker save image | moovm pull -o base.img -`,
		Args: wantArgs("REF"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("size") && p.size == 0 {
				return usageError(errors.New("moovm pull: a disk of size 0 holds nothing; leave -s out, or give it a size such as 10G"))
			}
			o, co, err := p.options()
			if err != nil {
				return usageError(fmt.Errorf("moovm pull: %w", err))
			}
			r, err := pull(cmd.Context(), g, args[0], out, o, co)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), r)
			}
			if !g.quiet {
				how := ""
				if r.Cached {
					how = ", in the cache"
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "%s: %d layers, a disk of %s, %s%s\n", r.Name, r.Layers, humanize.IBytes(uint64(r.Size)), r.Digest, how)
			}
			fmt.Fprintln(cmd.OutOrStdout(), r.Path)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVarP(&out, "output", "o", "", "make the disk at `FILE`, which must not exist, and not in the cache")
	f.VarP(&p.size, "size", "s", "size of the disk (default: what the image needs, and more)")
	f.BoolVar(&asJSON, "json", false, "print path, digest, size and what the image says about its command as JSON")
	p.register(f)
	return cmd
}

// pull makes the root disk of an image, in the cache or at out.
func pull(ctx context.Context, g *globals, ref, out string, o oci.Options, co oci.CreateOptions) (*oci.Root, error) {
	cache, err := imageCache(g)
	if err != nil {
		return nil, err
	}
	report, end := progress(g, "pulling")
	co.Progress = report
	var r *oci.Root
	if out == "" {
		r, err = cache.Pull(ctx, ref, o, co)
	} else {
		r, err = cache.PullTo(ctx, ref, out, o, co)
	}
	end()
	if err != nil && ctx.Err() != nil && errors.Is(context.Cause(ctx), errInterrupted) {
		return nil, &statusError{exitInterrupted, errors.New("interrupted; of the image there are only whole layers in the cache")}
	}
	return r, err
}

// imageRoot is the root disk for `run --image`, and what the image says about
// its command: the one that was pulled last if there is one.
func imageRoot(ctx context.Context, g *globals, ref string, o oci.Options, co oci.CreateOptions) (*oci.Root, error) {
	cache, err := imageCache(g)
	if err != nil {
		return nil, err
	}
	if r := cache.Find(ref, o, co); r != nil {
		return r, nil
	}
	return pull(ctx, g, ref, "", o, co)
}

// takeImage makes the image's root disk the machine's, and its command, folder,
// environment and user the command's.
func (r *machineRequest) takeImage(ctx context.Context, g *globals) error {
	if r.image == "" {
		return nil
	}
	root := &oci.Root{}
	var err error
	if g.relayedRoot != "" { // the other side has pulled it
		err = bytejson.Unmarshal([]byte(g.relayedRoot), root)
	} else {
		root, err = imageRoot(ctx, g, r.image, r.pull, r.create)
	}
	if err != nil {
		return err
	}
	r.root = root
	r.base = root.Path + ",format=raw"
	r.command = root.Config.Command(r.command)
	if len(r.command) == 0 {
		return fmt.Errorf("--image %s: the image says nothing about its command; write one behind --", r.image)
	}
	return nil
}

// imageCommand is what the image says about the command, but for its arguments.
func (r *machineRequest) imageCommand() (dir, user string, env []string) {
	if r.root == nil {
		return "/", "", nil
	}
	c := r.root.Config
	if dir = c.WorkingDir; dir == "" {
		dir = "/"
	}
	return filepath.Join("/", dir), c.User, c.Env
}
