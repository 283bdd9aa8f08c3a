package imagefs

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/moovm/moovm/cowdisk"
)

// Layer is what can be seen of one image of a backing chain, together with
// what lies below it. cowdisk.Layer implements it. Methods may be called at
// any time and from any goroutine.
type Layer interface {
	// Info is what `moovm info` shows.
	Info() cowdisk.Info
	// Size is the size of the disk in bytes.
	Size() int64
	// Allocated is the number of sectors that are in this image now.
	Allocated() int64
	// HeaderBytes is the header as it is in the file; nil without one.
	HeaderBytes() []byte
	// BitmapLen is the length of the bitmap in bytes; 0 without one.
	BitmapLen() int64
	// BitmapAt reads the live bitmap like an io.ReaderAt.
	BitmapAt(p []byte, off int64) (int, error)
	// Extents calls yield for each extent of the n bytes from off on, in order
	// and without gaps, until yield returns an error, which it returns.
	Extents(ctx context.Context, off, n int64, yield func(cowdisk.Extent) error) error
}

// Image is a disk with its backing chain.
type Image interface {
	Layer
	// Chain is the image's layers now: first the overlay, last the base.
	Chain() []Layer
}

// COW shows a cowdisk.Disk as an Image.
func COW(d *cowdisk.Disk) Image { return cow{d} }

type cow struct{ *cowdisk.Disk }

func (c cow) Chain() []Layer {
	layers := c.Layers()
	chain := make([]Layer, len(layers))
	for i := range layers {
		chain[i] = layers[i]
	}
	return chain
}

// Counter is one line of stats.
type Counter struct {
	Name  string
	Value uint64
}

// Disk is one disk of the machine.
type Disk struct {
	// Name is the guest's name of the disk: vda, vdb, …
	Name string
	// Serial is what the guest reads as the disk's serial number; may be empty.
	Serial string
	// ReadOnly says that the guest cannot write to the disk.
	ReadOnly bool
	// Image is the disk's contents and where they come from.
	Image Image
	// Stats are the device's counters in the order they are shown; may be nil.
	// It is called from any goroutine. The copy-ups of a cowdisk are added.
	Stats func() []Counter
	// RevealPaths lets the guest see paths of the host.
	RevealPaths bool
}

// DiskName is what a Linux guest calls its virtio disk i: vda, vdb, … vdz,
// vdaa, …
func DiskName(i int) string {
	s := ""
	for i++; i > 0; i = (i - 1) / 26 {
		s = string(rune('a'+(i-1)%26)) + s
	}
	return "vd" + s
}

// ErrDisk says that a disk cannot be shown as it was described.
var ErrDisk = errors.New("imagefs: unusable disk")

const bySerial = "by-serial"

func (d *Disk) validate() error {
	switch {
	case d.Image == nil:
		return fmt.Errorf("%w: %q has no image", ErrDisk, d.Name)
	case d.Name == "", d.Name == bySerial, d.Name != fileName(d.Name):
		return fmt.Errorf("%w: %q cannot be the name of a folder; use a name like vda", ErrDisk, d.Name)
	}
	return nil
}

// fileName turns s into something that can be a file's name: at most 255
// bytes, no slash, no control characters, and neither "." nor "..".
func fileName(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == '/' || r < ' ' || r == 0x7f {
			return '_'
		}
		return r
	}, strings.ToValidUTF8(s, "_"))
	if len(s) > 255 {
		s = strings.ToValidUTF8(s[:255], "")
	}
	if s == "." || s == ".." {
		s = strings.Repeat("_", len(s))
	}
	return s
}

// hide keeps the host's paths out of what the guest sees.
func (d *Disk) hide(path string) string {
	if d.RevealPaths || path == "" {
		return path
	}
	return filepath.Base(path)
}

func (d *Disk) info(l Layer) cowdisk.Info {
	i := l.Info()
	if !d.RevealPaths {
		i.Filename = d.hide(i.Filename)
		i.FullBackingFilename = ""
	}
	return i
}

func (d *Disk) counters() []Counter {
	var cs []Counter
	if d.Stats != nil {
		cs = append(cs, d.Stats()...)
	}
	if s, ok := d.Image.(interface{ Stats() cowdisk.Stats }); ok {
		for _, c := range cs {
			if c.Name == "copy_ups" {
				return cs
			}
		}
		cs = append(cs, Counter{"copy_ups", s.Stats().CopyUps})
	}
	return cs
}
