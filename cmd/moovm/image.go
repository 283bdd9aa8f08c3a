package main

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"

	"github.com/spf13/pflag"

	"github.com/moovm/moovm/cowdisk"
)

// imageFlags are the flags of every command that opens an image.
type imageFlags struct {
	roots        []string
	allowStale   bool
	allowMissing bool
	force        bool
	log          *slog.Logger // where guests run; nil = nobody is told
}

func (f *imageFlags) register(fs *pflag.FlagSet) {
	fs.StringArrayVar(&f.roots, "backing-root", nil, "follow backing paths below `DIR` too, besides the image's own folder (repeatable)")
	fs.BoolVar(&f.allowStale, "allow-stale-backing", false, "go on although the backing file changed after the image was made")
	fs.BoolVar(&f.allowMissing, "allow-missing-backing", false, "go on without the backing file; its sectors read as zeros")
	fs.BoolVar(&f.force, "force", false, "go on although an image is damaged; what is missing of it reads as zeros")
}

func (f *imageFlags) options() cowdisk.Options {
	return cowdisk.Options{BackingRoots: f.roots, AllowStaleBacking: f.allowStale, AllowMissingBacking: f.allowMissing, AllowDamage: f.force, Log: f.log}
}

// tool are the options of the maintenance functions.
func (f *imageFlags) tool(report func(done, total int64)) cowdisk.ToolOptions {
	return cowdisk.ToolOptions{Options: f.options(), Progress: report}
}

// openToRead opens an image to look at it, also while a machine uses it.
func (f *imageFlags) openToRead(path string) (*cowdisk.Disk, error) {
	o := f.options()
	o.ReadOnly, o.NoLock = true, true
	return advise(cowdisk.Open(path, o))
}

// advise adds the flag that allows what the library refused.
func advise(d *cowdisk.Disk, err error) (*cowdisk.Disk, error) {
	for kind, flag := range map[error]string{
		cowdisk.ErrBackingOutside: "--backing-root DIR",
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
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
