package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/internal/printable"
)

func newInfoCommand() *cobra.Command {
	var (
		images imageFlags
		asJSON bool
		chain  bool
	)
	cmd := &cobra.Command{
		Use:   "info [--chain] [--json] IMAGE|DIR",
		Short: "Show an image's header, sizes, allocation and backing chain, or a snapshot",
		Long: `Shows what the header says, and what is known of the backing files. What keeps
the image from being used (its base is missing, stale, outside the allowed
folders, unreadable, truncated; a loop; too many layers) is told on a warning:
line, and in JSON in problem, with kind and path. The exit status is 0.

Control characters and bytes that are no UTF-8 are shown escaped, as \xNN. In
the JSON of all commands a name that is no UTF-8 is "\u0000base64:" and its
bytes in base64.

Of a folder that moovm snapshot made it shows what is in it, and what it needs.`,
		Example: `  moovm info root.cow
  moovm info --chain --json root.cow | jq '.[].filename'`,
		Args: wantArgs("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if st, err := os.Stat(args[0]); err == nil && st.IsDir() {
				return snapshotInfo(cmd.OutOrStdout(), args[0], asJSON)
			}
			d, trouble, err := images.inspect(args[0])
			if err != nil {
				return err
			}
			defer d.Close()
			infos := []diskInfo{{Info: d.Info()}}
			if chain {
				infos = nil
				for _, l := range d.Layers() {
					infos = append(infos, diskInfo{Info: l.Info()})
				}
			}
			if n := len(infos) - 1; trouble != nil {
				infos[n].Problem = trouble
			}
			out := cmd.OutOrStdout()
			switch {
			case asJSON && chain:
				return printJSON(out, infos)
			case asJSON:
				return printJSON(out, infos[0])
			}
			for i, info := range infos {
				if i > 0 {
					fmt.Fprintln(out)
				}
				printInfo(out, info.Info)
				if info.Problem != nil {
					fmt.Fprintf(out, "%-18s %s\n", "warning:", printable.Text(info.Problem.Detail))
				}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&asJSON, "json", false, "print JSON, as qemu-img does")
	f.BoolVar(&chain, "chain", false, "show every layer, the image first")
	images.register(f)
	return cmd
}

// diskInfo is what info prints of a layer; the problem is told with the last one.
type diskInfo struct {
	cowdisk.Info
	Problem *problem `json:"problem,omitempty"`
}

func printInfo(w io.Writer, i cowdisk.Info) {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%-18s %s\n", name+":", printable.Text(fmt.Sprintf(format, args...)))
	}
	line("image", "%s", i.Filename)
	line("format", "%s", i.Format)
	line("virtual size", "%s (%d bytes)", humanize.IBytes(uint64(i.VirtualSize)), i.VirtualSize)
	line("actual size", "%s", humanize.IBytes(uint64(i.ActualSize)))
	if i.BackingFilename != "" {
		line("backing file", "%s", i.BackingFilename)
		if i.FullBackingFilename != i.BackingFilename {
			line("backing path", "%s", i.FullBackingFilename)
		}
	}
	if s := i.FormatSpecific; s != nil {
		line("layout", "%v, sectors of %d bytes", s.Variant, s.SectorSize)
		percent := 0.0
		if i.VirtualSize > 0 {
			percent = 100 * float64(s.AllocatedSectors) * 512 / float64(i.VirtualSize)
		}
		line("allocated", "%d sectors (%s, %.1f %%)", s.AllocatedSectors, humanize.IBytes(uint64(s.AllocatedSectors)*512), percent)
		hint := ""
		if s.DataOffset%4096 != 0 {
			hint = " (not at a page: see create --help)"
		}
		line("bitmap at", "%d, data at %d%s", s.BitmapOffset, s.DataOffset, hint)
	}
}

// snapshotInfo shows what the folder of a snapshot says of itself.
func snapshotInfo(w io.Writer, dir string, asJSON bool) error {
	var a snapshotAbout
	if err := guest.ReadManifest(dir, &a); err != nil {
		return err
	}
	if asJSON {
		return printJSON(w, a)
	}
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%-18s %s\n", name+":", printable.Text(fmt.Sprintf(format, args...)))
	}
	line("snapshot", "%s", dir)
	line("made", "%s by moovm %s", a.Created.Format("2006-01-02 15:04:05 MST"), a.Moovm)
	line("kernel", "%s (%s)", a.Release, a.Kernel)
	line("machine", "%d CPUs, %s", a.CPUs, humanize.IBytes(uint64(a.Memory)))
	line("host's CPU", "%s", a.CPU)
	if a.Agent {
		line("goes on with", "a COMMAND")
	} else {
		line("goes on with", "its disk's own init")
	}
	for i, d := range a.Disks {
		var bases []string
		for _, b := range d.Bases {
			bases = append(bases, b.Path)
		}
		line(fmt.Sprintf("disk %d", i), "%s on %s", d.File, strings.Join(bases, " on "))
	}
	for _, s := range a.Shares {
		mode := "read-only"
		if s.Writable {
			mode = "writable"
		}
		line("share", "%s, %s", s.Tag, mode)
	}
	return nil
}
