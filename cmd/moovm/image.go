package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"

	"github.com/spf13/pflag"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/internal/bytejson"
	"github.com/moovm/moovm/internal/host"
)

// imageFlags are the flags of every command that opens an image.
type imageFlags struct {
	roots        []string
	allowStale   bool
	allowMissing bool
	force        bool
	log          *slog.Logger // where guests run; nil = nobody is told
}

func (f *imageFlags) register(set *pflag.FlagSet) {
	set.StringArrayVar(&f.roots, "backing-root", nil, "follow backing paths below `DIR` too, besides the image's own folder (repeatable)")
	set.BoolVar(&f.allowStale, "allow-stale-backing", false, "go on although the backing file changed after the image was made")
	set.BoolVar(&f.allowMissing, "allow-missing-backing", false, "go on without the backing file; its sectors read as zeros")
	set.BoolVar(&f.force, "force", false, "go on although an image is damaged; what is missing of it reads as zeros")
}

func (f *imageFlags) options() cowdisk.Options {
	return cowdisk.Options{BackingRoots: append(f.roots[:len(f.roots):len(f.roots)], host.BackingRoots()...), AllowStaleBacking: f.allowStale,
		AllowMissingBacking: f.allowMissing, AllowDamage: f.force, Log: f.log}
}

// tool are the options of the maintenance functions.
func (f *imageFlags) tool(report func(done, total int64)) cowdisk.ToolOptions {
	return cowdisk.ToolOptions{Options: f.options(), Progress: report}
}

// inspect opens an image to look at it, also while a machine uses it, and however little of its chain is there.
func (f *imageFlags) inspect(path string) (*cowdisk.Disk, *problem, error) {
	d, trouble, err := cowdisk.Inspect(path, f.options())
	if err != nil || trouble == nil || f.allows(trouble) {
		return d, nil, err
	}
	_, advised := advise(nil, trouble)
	p := &problem{Kind: "damaged", Path: path, Detail: advised.Error()}
	for _, k := range problemKinds {
		if errors.Is(trouble, k.err) {
			p.Kind = k.name
			break
		}
	}
	ls := d.Layers()
	if last := ls[len(ls)-1].Info(); p.Kind == "stale" && len(ls) > 1 {
		p.Path = last.Filename
	} else if last.FullBackingFilename != "" {
		p.Path, p.cut = last.FullBackingFilename, true
	}
	return d, p, nil
}

func (f *imageFlags) allows(trouble error) bool {
	return f.allowStale && errors.Is(trouble, cowdisk.ErrStaleBacking) || f.allowMissing && errors.Is(trouble, cowdisk.ErrBackingMissing)
}

// problem is what is wrong with an image's chain.
type problem struct {
	Kind   string `json:"kind"`
	Path   string `json:"path"` // the file it is about
	Detail string `json:"detail"`
	cut    bool   // what lies in Path could not be opened
}

// problemKinds are the names of problems, the first that fits.
var problemKinds = []struct {
	err  error
	name string
}{
	{cowdisk.ErrBackingOutside, "outside"},
	{cowdisk.ErrStaleBacking, "stale"},
	{cowdisk.ErrBackingLoop, "loop"},
	{cowdisk.ErrChainTooLong, "chain-too-long"},
	{cowdisk.ErrBackingMissing, "missing"},
	{fs.ErrPermission, "unreadable"},
	{cowdisk.ErrTruncated, "truncated"},
	{cowdisk.ErrLocked, "in-use"},
	{cowdisk.ErrFormat, "format"},
}

// advise adds the flag that allows what the library refused.
func advise(d *cowdisk.Disk, err error) (*cowdisk.Disk, error) {
	for kind, flag := range map[error]string{
		cowdisk.ErrBackingOutside: "--backing-root DIR; for good: a line in " + host.BackingRootsFile(),
		cowdisk.ErrStaleBacking:   "--allow-stale-backing",
		cowdisk.ErrBackingMissing: "--allow-missing-backing",
		cowdisk.ErrDamaged:        "--force",
	} {
		if errors.Is(err, kind) {
			return d, &advice{err, flag}
		}
	}
	return d, err
}

type advice struct {
	error
	flag string
}

func (a *advice) Error() string { return a.error.Error() + " (flag " + a.flag + ")" }
func (a *advice) Unwrap() error { return a.error }

// printJSON writes v as indented JSON.
func printJSON(w io.Writer, v any) error {
	b, err := bytejson.Marshal(v)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := json.Indent(&out, b, "", "  "); err != nil {
		return err
	}
	out.WriteByte('\n')
	_, err = out.WriteTo(w)
	return err
}
