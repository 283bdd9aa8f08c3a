package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/internal/bytejson"
	"github.com/moovm/moovm/internal/printable"
)

func newMapCommand() *cobra.Command {
	var (
		images imageFlags
		asJSON bool
		svg    string
	)
	cmd := &cobra.Command{
		Use:   "map [--json] [--svg FILE] IMAGE",
		Short: "Show where each range of the disk comes from",
		Long: `Lists the disk's extents in order: where each begins, how long it is, and
whether its data is in the image (depth 0), in a backing file (depth 1 and
more) or nowhere (it reads as zeros). Of a chain that cannot be opened whole it
shows what can, and says of the rest what is wrong, such as "base, missing".`,
		Example: `  moovm map root.cow
  moovm map --json root.cow | jq 'map(select(.depth == 0) | .length) | add'
  moovm map --svg root.svg root.cow`,
		Args: wantArgs("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, trouble, err := images.inspect(args[0])
			if err != nil {
				return err
			}
			defer d.Close()
			if trouble != nil {
				fmt.Fprintf(cmd.ErrOrStderr(), "moovm: warning: %s\n", printable.Text(trouble.Detail))
			}
			if svg != "" {
				if err := writeFile(svg, func(w io.Writer) error { return d.WriteSVG(cmd.Context(), w) }); err != nil {
					return err
				}
				if !asJSON {
					return nil
				}
			}
			out := bufio.NewWriter(cmd.OutOrStdout())
			if asJSON {
				err = mapJSON(cmd, out, d, trouble)
			} else {
				err = mapText(cmd, out, d, trouble)
			}
			if err != nil {
				return err
			}
			return out.Flush()
		},
	}
	f := cmd.Flags()
	f.BoolVar(&asJSON, "json", false, "print JSON, as qemu-img does")
	f.StringVar(&svg, "svg", "", "draw the disk into `FILE`: what is overlay, backing file, zeros")
	images.register(f)
	return cmd
}

// mapExtent is an extent, with the kind of the problem if it lies in a file that could not be opened.
type mapExtent struct {
	cowdisk.Extent
	Problem string `json:"problem,omitempty"`
}

// hides reports whether e lies in the file that could not be opened.
func (p *problem) hides(e cowdisk.Extent) bool { return p != nil && p.cut && !e.Present }

// mapJSON streams the list, one extent a line: a large disk's does not fit in
// memory.
func mapJSON(cmd *cobra.Command, out *bufio.Writer, d *cowdisk.Disk, trouble *problem) error {
	before := "["
	err := d.Extents(cmd.Context(), 0, d.Size(), func(e cowdisk.Extent) error {
		m := mapExtent{Extent: e}
		if trouble.hides(e) {
			m.Zero, m.Problem = false, trouble.Kind // nobody knows what is there
			m.Depth++
			m.Filename = trouble.Path
		}
		m.Filename = bytejson.Encode(m.Filename)
		line, err := json.Marshal(m)
		if err != nil {
			return err
		}
		out.WriteString(before)
		before = ",\n "
		_, err = out.Write(line)
		return err
	})
	if err != nil {
		return err
	}
	_, err = out.WriteString("]\n")
	return err
}

func mapText(cmd *cobra.Command, out *bufio.Writer, d *cowdisk.Disk, trouble *problem) error {
	fmt.Fprintf(out, "%15s %15s  %s\n", "start", "length", "from")
	return d.Extents(cmd.Context(), 0, d.Size(), func(e cowdisk.Extent) error {
		from := "zeros"
		if trouble.hides(e) {
			from = fmt.Sprintf("base, %s: %s", trouble.Kind, trouble.Path)
		} else if e.Data && e.Offset != nil {
			from = fmt.Sprintf("%s at %d", e.Filename, *e.Offset)
		} else if e.Data {
			from = e.Filename
		}
		_, err := fmt.Fprintf(out, "%15d %15d  %s\n", e.Start, e.Length, printable.Text(from))
		return err
	})
}
