package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/internal/printable"
	"github.com/moovm/moovm/lineage"
)

func newTreeCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "tree [--json] [DIR|IMAGE…]",
		Short: "Show which images stand on which, their sizes, and which are in use",
		Long: `Shows all images below the folders (this one by default), each below what it
stands on. Of an image that is named, and its folder, the tree it belongs to is
shown. What an image's header names outside of these folders is told, and not
looked at: name those folders, too.`,
		Example: `  moovm tree
  moovm tree ~/vms /srv/bases
  moovm tree --json root.cow | jq -r '.. | .filename? // empty'`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = []string{"."}
			}
			trees, err := treesOf(cmd.Context(), args)
			if err != nil {
				return err
			}
			if asJSON {
				out := []*treeImage{}
				for _, i := range trees {
					out = append(out, describe(i, nil))
				}
				return printJSON(cmd.OutOrStdout(), out)
			}
			if len(trees) == 0 {
				fmt.Fprintln(cmd.ErrOrStderr(), "moovm: there are no images")
			}
			w := treeWriter{w: cmd.OutOrStdout()}
			w.dir, _ = absPath(".") // without it paths are long
			for _, i := range trees {
				w.image(i, "", "", nil)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// treesOf are the trees below folders, and those that images belong to.
func treesOf(ctx context.Context, names []string) ([]*lineage.Image, error) {
	var folders, images []string
	for _, name := range names {
		real, err := absPath(name)
		if err != nil {
			return nil, err
		}
		st, err := os.Stat(real)
		if err != nil {
			return nil, err
		}
		if st.IsDir() {
			folders = append(folders, real)
		} else {
			images = append(images, real)
		}
	}
	scan := slices.Clone(folders)
	for _, i := range images {
		scan = append(scan, filepath.Dir(i))
	}
	f, err := lineage.Scan(ctx, scan...)
	if err != nil {
		return nil, err
	}
	if len(images) == 0 {
		return f.Trees(), nil
	}
	wanted := map[*lineage.Image]bool{}
	for _, path := range images {
		i := f.Image(path)
		if i == nil {
			return nil, fmt.Errorf("%s is no image, and none stands on it", path)
		}
		wanted[i.Root()] = true
	}
	return slices.DeleteFunc(f.Trees(), func(i *lineage.Image) bool {
		below := slices.ContainsFunc(folders, func(dir string) bool {
			rel, err := filepath.Rel(dir, i.Path)
			return err == nil && filepath.IsLocal(rel)
		})
		return !wanted[i] && !below
	}), nil
}

// treeImage is an image in JSON, with what stands on it.
type treeImage struct {
	Filename string       `json:"filename"`
	Format   string       `json:"format,omitempty"`
	Size     int64        `json:"virtual-size"`
	Actual   int64        `json:"actual-size"`
	Backing  string       `json:"backing-filename,omitempty"`
	InUse    bool         `json:"in-use"`
	Problem  string       `json:"problem,omitempty"`
	Overlays []*treeImage `json:"overlays,omitempty"`
}

func describe(i *lineage.Image, above []*lineage.Image) *treeImage {
	t := &treeImage{Filename: i.Path, Format: i.Format, Size: i.Size, Actual: i.ActualSize, Backing: i.Backing, InUse: i.InUse}
	if i.Problem != nil {
		t.Problem = i.Problem.Error()
	}
	above = append(above, i)
	for _, o := range i.Overlays {
		if !slices.Contains(above, o) { // a loop
			t.Overlays = append(t.Overlays, describe(o, above))
		}
	}
	return t
}

// treeWriter draws trees for people.
type treeWriter struct {
	w   io.Writer
	dir string // in which paths are short
}

func (t *treeWriter) image(i *lineage.Image, first, rest string, above []*lineage.Image) {
	fmt.Fprintf(t.w, "%s%s", first, printable.Text(t.name(i.Path)))
	if i.Format != "" {
		fmt.Fprintf(t.w, "  %s %s, takes %s", i.Format, humanize.IBytes(uint64(max(i.Size, 0))), humanize.IBytes(uint64(max(i.ActualSize, 0))))
	}
	if i.InUse {
		fmt.Fprint(t.w, ", in use")
	}
	if i.Problem != nil {
		fmt.Fprintf(t.w, "  (%s)", printable.Text(i.Problem.Error()))
	}
	fmt.Fprintln(t.w)
	above = append(above, i)
	overlays := slices.DeleteFunc(slices.Clone(i.Overlays), func(o *lineage.Image) bool { return slices.Contains(above, o) })
	for n, o := range overlays {
		if n == len(overlays)-1 {
			t.image(o, rest+"└─ ", rest+"   ", above)
		} else {
			t.image(o, rest+"├─ ", rest+"│  ", above)
		}
	}
}

func (t *treeWriter) name(path string) string {
	if rel, err := filepath.Rel(t.dir, path); err == nil && filepath.IsLocal(rel) {
		return rel
	}
	return path
}

func newRmCommand() *cobra.Command {
	var folders []string
	cmd := &cobra.Command{
		Use:   "rm [--in DIR]… IMAGE…",
		Short: "Remove images that nothing stands on and nobody uses",
		Long: `Removes images. One that another image stands on, in its own folder or one named
with --in, with all below them, is refused, and so is one in use; images
elsewhere are not known. A raw disk image is removed only if it is called one:
FILE,format=raw.`,
		Example: `  moovm rm old.cow
  moovm rm --in ~/vms /srv/bases/debian.img,format=raw`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError(fmt.Errorf("moovm rm: name the IMAGE to remove"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, arg := range args {
				path, format, err := cowdisk.SplitFormat(arg)
				if err != nil {
					return usageError(fmt.Errorf("moovm rm: %w", err))
				}
				if err := lineage.Remove(cmd.Context(), path, format == cowdisk.FormatRaw, folders...); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringArrayVar(&folders, "in", nil, "look for images that stand on it below `DIR`, too (repeatable)")
	return cmd
}
