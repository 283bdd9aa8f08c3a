package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/delta"
)

func newExportCommand(g *globals) *cobra.Command {
	var (
		images imageFlags
		since  string
		from   int64
	)
	cmd := &cobra.Command{
		Use:   "export [--since LAYER] IMAGE[,format=raw|cow] > STREAM",
		Short: "Write what an image holds as a stream, for another machine",
		Long: `Writes what the disk holds, overlay and backing files together, to standard
output, compressed and with checksums. With --since only what lies above LAYER,
one of the files that the image stands on: it can be put on any disk of the same
contents there. The disk of a running machine is frozen first (moovm ctl).

` + formatHelp,
		Example: `  moovm export --since base.img root.cow | ssh there moovm import -b base.img,format=raw root.cow
  moovm export root.cow > root.delta`,
		Args: wantArgs("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			path, format, err := cowdisk.SplitFormat(args[0])
			if err != nil {
				return usageError(fmt.Errorf("moovm export: %w", err))
			}
			if from < 0 {
				return usageError(fmt.Errorf("moovm export: --from %d: pieces are counted from 0", from))
			}
			if f, ok := cmd.OutOrStdout().(*output); ok && f.w == os.Stdout && term.IsTerminal(int(os.Stdout.Fd())) {
				return usageError(errors.New("moovm export: a stream is not for a terminal; send it to a file or a program"))
			}
			return job(cmd.Context(), g, "exporting", "the stream is not whole", func(report func(done, total int64)) error {
				o := delta.ExportOptions{Options: images.options(), Since: since, From: from, Progress: report}
				o.Format = named(path, format)
				return delta.Export(cmd.Context(), cmd.OutOrStdout(), path, o)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&since, "since", "", "only what lies above `LAYER`, which the image stands on")
	f.Int64Var(&from, "from", 0, "leave out the first `N` pieces, which an import that was cut off has")
	images.register(f)
	return cmd
}

// named is a format that the name of a file says, if nothing else does.
func named(path string, f cowdisk.Format) cowdisk.Format {
	if f == cowdisk.FormatUnknown && strings.HasSuffix(path, ".cow") {
		return cowdisk.FormatCOW
	}
	return f
}

func newImportCommand(g *globals) *cobra.Command {
	var (
		images       imageFlags
		base         string
		resume, tell bool
	)
	cmd := &cobra.Command{
		Use:   "import [-b BASE[,format=raw|cow]] [--resume] IMAGE < STREAM",
		Short: "Make an image of a stream that export wrote",
		Long: `Reads a stream from standard input and makes IMAGE of it: on BASE if the stream
has only what lies above something, and BASE must have the same contents as that
had. It has its name only when it is whole. One that was cut off is kept, and
--pieces tells how much of it is there: send the rest, export --from N, to
import --resume.`,
		Example: `  moovm import -b base.img,format=raw root.cow < root.delta
  ssh there moovm export --since base.img --from $(moovm import --pieces root.cow) root.cow |
      moovm import -b base.img,format=raw --resume root.cow`,
		Args: wantArgs("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if tell {
				n, err := delta.Begun(args[0])
				if errors.Is(err, fs.ErrNotExist) {
					n, err = 0, nil
				}
				if err == nil {
					fmt.Fprintln(cmd.OutOrStdout(), n)
				}
				return err
			}
			path, format, err := cowdisk.SplitFormat(base)
			if err != nil {
				return usageError(fmt.Errorf("moovm import: -b %w", err))
			}
			return job(cmd.Context(), g, "importing", "what there is is kept; see --resume", func(report func(done, total int64)) error {
				o := delta.ImportOptions{Options: images.options(), Base: path, BaseFormat: named(path, format), Resume: resume, Progress: report}
				return delta.Import(cmd.Context(), interruptible(cmd.Context(), cmd.InOrStdin()), args[0], o)
			})
		},
	}
	f := cmd.Flags()
	f.StringVarP(&base, "base", "b", "", "what the new image stands on: `BASE[,format=raw|cow]`; a relative path starts at IMAGE's folder")
	f.BoolVar(&resume, "resume", false, "go on with an import that was cut off")
	f.BoolVar(&tell, "pieces", false, "print how many pieces such an import has, and do nothing")
	images.register(f)
	return cmd
}

// interruptible is r, whose reads end with ctx. One that is under way is left
// to itself.
func interruptible(ctx context.Context, r io.Reader) io.Reader {
	out, in := io.Pipe()
	context.AfterFunc(ctx, func() { in.CloseWithError(context.Cause(ctx)) })
	go func() {
		_, err := io.CopyBuffer(struct{ io.Writer }{in}, r, make([]byte, 256<<10))
		in.CloseWithError(err) // io.EOF if it is nil
	}()
	return out
}
