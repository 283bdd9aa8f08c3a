package lineage

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/moovm/moovm/cowdisk"
)

// Image is a file in a Forest: a COW image, or what one stands on.
type Image struct {
	// Path is the file's, absolute and without links.
	Path string
	// Backing is the base as the image's header names it; empty in one that
	// stands alone, and in a raw disk.
	Backing string
	// Format is cow, or raw for what is no image and stands below one. It is
	// empty if the file was not looked at.
	Format string
	// Size is the disk's, ActualSize what the file takes up, in bytes.
	Size, ActualSize int64
	// InUse says that a process has the file open as a disk, itself or as a
	// base. Only Linux tells.
	InUse bool
	// Problem says why the file was not read, or what is wrong with it; nil if
	// nothing is.
	Problem error

	// On is what the image stands on, nil if nothing. Overlays stand on it, in
	// the order of their paths.
	On       *Image
	Overlays []*Image

	id cowdisk.FileID
}

// Problems of images.
var (
	// ErrMissing: the base is not there.
	ErrMissing = errors.New("it is not there")
	// ErrOutside: it lies outside of the folders that were scanned.
	ErrOutside = errors.New("it lies outside of the folders that were looked at")
	// ErrLoop: the image stands on itself.
	ErrLoop = errors.New("it stands on itself")
)

// Forest is the images below some folders, and what they stand on.
type Forest struct {
	images map[string]*Image // by path
	roots  []string
}

// Scan reads the headers of all images below the folders. Symlinks in the
// folders are not followed. It fails if a folder does not exist, or ctx ends; a
// file that cannot be read is in the forest, with its Problem.
func Scan(ctx context.Context, folders ...string) (*Forest, error) {
	f := &Forest{images: map[string]*Image{}}
	for _, name := range folders {
		root, err := cowdisk.HostFS{}.Resolve(name)
		if err != nil {
			return nil, err
		}
		f.roots = append(f.roots, root)
		if err := f.walk(ctx, root); err != nil {
			return nil, err
		}
	}
	f.link()
	return f, nil
}

func (f *Forest) walk(ctx context.Context, root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil && path == root:
			return err
		case err != nil: // a folder that cannot be read: what is in it is not known
			f.images[path] = &Image{Path: path, Problem: err}
		case d.Type().IsRegular():
			f.add(path)
		}
		return nil
	})
}

// add adds a file if it is an image, or may be one.
func (f *Forest) add(path string) {
	if f.images[path] != nil {
		return
	}
	i := &Image{Path: path}
	if i.read(); i.Format == "cow" || i.Problem != nil {
		f.images[path] = i
	}
}

// read reads what there is to know of one file.
func (i *Image) read() {
	file, err := os.OpenFile(i.Path, os.O_RDONLY|openFlags, 0)
	if err != nil {
		i.Problem = err
		return
	}
	defer file.Close()
	st, err := file.Stat()
	if err != nil {
		i.Problem = err
		return
	}
	i.Format, i.Size = "raw", st.Size()
	i.ActualSize, i.id = identity(st)
	i.InUse = inUse(file)
	h, err := cowdisk.Probe(file, st.Size())
	switch {
	case errors.Is(err, cowdisk.ErrNotCOW):
	case errors.Is(err, cowdisk.ErrAmbiguous):
		i.readAmbiguous()
	case err != nil:
		i.Format, i.Problem = "cow", err
	default:
		i.Format, i.Size, i.Backing = "cow", h.DiskSize(), h.Backing
	}
}

// readAmbiguous asks the image's base which of two layouts it has.
func (i *Image) readAmbiguous() {
	i.Format = "cow"
	d, trouble, err := cowdisk.Inspect(i.Path, cowdisk.Options{ReadOnly: true, NoLock: true})
	if err != nil {
		i.Problem = err
		return
	}
	defer d.Close()
	i.Size, i.Backing, i.Problem = d.Size(), d.Info().BackingFilename, trouble
}

// link finds what each image stands on.
func (f *Forest) link() {
	for _, path := range slices.Sorted(maps.Keys(f.images)) {
		if i := f.images[path]; i.Backing != "" {
			i.On = f.base(i)
		}
	}
	for _, path := range slices.Sorted(maps.Keys(f.images)) {
		if i := f.images[path]; i.On != nil {
			i.On.Overlays = append(i.On.Overlays, i)
		}
	}
	for _, i := range f.images {
		i.findLoop()
	}
}

// base is what i's header names.
func (f *Forest) base(i *Image) *Image {
	path := i.Backing
	if !filepath.IsAbs(path) {
		path = filepath.Join(filepath.Dir(i.Path), path)
	}
	path = filepath.Clean(path)
	if b := f.images[path]; b != nil {
		return b
	}
	b := &Image{Path: path, Problem: ErrOutside}
	if f.covers(path) {
		real, err := cowdisk.HostFS{}.Resolve(path)
		switch {
		case err == nil && f.images[real] != nil: // by way of a link
			return f.images[real]
		case err == nil && f.covers(real):
			b.Path, b.Problem = real, nil
			if b.read(); errors.Is(b.Problem, fs.ErrNotExist) {
				b.Problem = ErrMissing
			}
			for _, other := range f.images { // the same file by another name
				if b.id != (cowdisk.FileID{}) && other.id == b.id {
					return other
				}
			}
		}
	}
	f.images[b.Path] = b
	return b
}

// covers reports whether a path lies below a folder that was scanned.
func (f *Forest) covers(path string) bool {
	return slices.ContainsFunc(f.roots, func(root string) bool {
		rel, err := filepath.Rel(root, path)
		return err == nil && filepath.IsLocal(rel)
	})
}

// findLoop marks an image that stands on itself.
func (i *Image) findLoop() {
	seen := map[*Image]bool{}
	for b := i; b != nil && !seen[b]; b = b.On {
		seen[b] = true
		if b.On == i {
			i.Problem = ErrLoop
		}
	}
}

// Image is the image at path, which has no links in it; nil if there is none.
func (f *Forest) Image(path string) *Image { return f.images[path] }

// Trees are the images that stand on nothing, in the order of their paths; of
// those that stand on each other in a loop, the first.
func (f *Forest) Trees() (out []*Image) {
	seen := map[*Image]bool{}
	var mark func(i *Image)
	mark = func(i *Image) {
		if !seen[i] {
			seen[i] = true
			for _, o := range i.Overlays {
				mark(o)
			}
		}
	}
	paths := slices.Sorted(maps.Keys(f.images))
	for _, loops := range []bool{false, true} {
		for _, path := range paths {
			if i := f.images[path]; !seen[i] && (i.On == nil || loops) {
				out = append(out, i)
				mark(i)
			}
		}
	}
	return out
}

// Root is what the image stands on in the end: itself if that is nothing.
func (i *Image) Root() *Image {
	seen := map[*Image]bool{}
	for ; i.On != nil && !seen[i]; i = i.On {
		seen[i] = true
	}
	return i
}
