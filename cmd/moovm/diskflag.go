package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/moovm/moovm/cowdisk"
)

// diskFlag is one --disk FILE[,opt…].
type diskFlag struct {
	path     string
	readOnly bool
	serial   string
	format   cowdisk.Format // unknown = look
}

// parseDisk reads FILE[,ro][,serial=NAME][,format=raw|cow]. A comma in the
// file's name is written twice.
func parseDisk(s string) (diskFlag, error) {
	words := splitCommas(s)
	d := diskFlag{path: words[0]}
	if d.path == "" {
		return d, fmt.Errorf("%s: the file's name is missing", s)
	}
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		switch {
		case w == "ro":
			d.readOnly = true
		case key == "serial" && value != "":
			if len(value) > 20 {
				return d, fmt.Errorf("%s: the serial %q is longer than virtio-blk's 20 bytes", s, value)
			}
			d.serial = value
		case w == "format=raw", w == "format=cow":
			d.format, _ = cowdisk.ParseFormat(value)
		default:
			return d, fmt.Errorf("%s: there is no option %q; use ro, serial=NAME, format=raw or format=cow (a comma in the file's name is written twice)", s, w)
		}
	}
	if err := ambiguous(words); err != nil {
		return d, fmt.Errorf("%s: %w", s, err)
	}
	return d, nil
}

// ambiguous refuses PATH,OPTION… where all of that is the name of a file: the
// user may have meant either.
func ambiguous(words []string) error {
	for n := len(words); n > 1; n-- {
		name := strings.Join(words[:n], ",")
		if _, err := os.Lstat(name); err == nil {
			return fmt.Errorf("%q and %q can both be meant; write a comma in a name twice (%s), or rename the first",
				name, words[0], strings.ReplaceAll(name, ",", ",,"))
		}
	}
	return nil
}

// splitCommas splits at single commas; a double one stands for a comma.
func splitCommas(s string) []string {
	words := strings.Split(strings.ReplaceAll(s, ",,", "\x00"), ",")
	for i := range words {
		words[i] = strings.ReplaceAll(words[i], "\x00", ",")
	}
	return words
}

// open opens the disk's image. A file that is no COW image is a raw disk only
// if the user says so: a COW image with a damaged header must not be taken for
// one and written over. One that names other files is an image only if he says
// so, too, or its name does: a guest may have written that into a raw disk.
func (d diskFlag) open(o cowdisk.Options) (*cowdisk.Disk, error) {
	o.ReadOnly, o.Format = o.ReadOnly || d.readOnly, d.format
	if o.Format == cowdisk.FormatUnknown && strings.HasSuffix(d.path, ".cow") {
		o.Format = cowdisk.FormatCOW
	}
	disk, err := advise(cowdisk.OpenAny(d.path, o))
	if err == nil && o.Format == cowdisk.FormatUnknown && disk.Info().Format != "cow" {
		disk.Close()
		err = &cowdisk.Error{Path: d.path, Kind: cowdisk.ErrNotCOW, Detail: "no MOOO magic at its start",
			Remedy: "if it is a raw disk image, say so: " + strings.ReplaceAll(d.path, ",", ",,") + ",format=raw"}
	}
	if err != nil {
		return nil, err
	}
	return disk, nil
}

// openEphemeral opens an overlay over base that has no name any more: it goes
// with the process, however that ends.
func openEphemeral(base string, o cowdisk.Options) (*cowdisk.Disk, error) {
	dir, err := os.MkdirTemp("", "moovm-")
	if err != nil {
		return nil, fmt.Errorf("a place for the ephemeral overlay: %w; $TMPDIR chooses another", err)
	}
	defer os.RemoveAll(dir)
	path := dir + "/overlay.cow"
	base, format, err := cowdisk.SplitFormat(base)
	if err != nil {
		return nil, fmt.Errorf("--base: %w", err)
	}
	if base, err = absPath(base); err != nil {
		return nil, err
	}
	co := cowdisk.CreateOptions{Backing: base, BackingFormat: format, BackingRoots: o.BackingRoots, AllowStaleBacking: o.AllowStaleBacking}
	if _, err := advise(nil, cowdisk.Create(path, co)); err != nil {
		return nil, err
	}
	o.Backing, o.Log = base, nil // nobody can change the base under it: it is locked
	return advise(cowdisk.Open(path, o))
}
