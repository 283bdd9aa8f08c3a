package lineage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moovm/moovm/cowdisk"
)

// ErrStoodOn says that other images stand on one.
var ErrStoodOn = errors.New("other images stand on it")

// StoodOnError is an ErrStoodOn that names them.
type StoodOnError struct {
	Path string
	By   []*Image
}

// Error implements error.
func (e *StoodOnError) Error() string {
	var names []string
	for i, o := range e.By {
		if i == 5 {
			names = append(names, fmt.Sprintf("%d more", len(e.By)-i))
			break
		}
		name := o.Path
		if o.InUse {
			name += " (in use)"
		}
		names = append(names, name)
	}
	return fmt.Sprintf("image %s: %v: %s; remove or rebase those first", e.Path, ErrStoodOn, strings.Join(names, ", "))
}

// Is implements the errors.Is protocol.
func (e *StoodOnError) Is(target error) bool { return target == ErrStoodOn }

// Remove removes an image on which, of all images below its own folder and the
// ones named, none stands. With raw the file may be a raw disk, else it must be
// a COW image. What is in use is refused (cowdisk.ErrLocked), and nobody can
// begin to use it meanwhile, nor make an overlay on it.
//
// Images elsewhere, that nobody named a folder of, are not known.
func Remove(ctx context.Context, path string, raw bool, folders ...string) error {
	real, err := cowdisk.HostFS{}.Resolve(path)
	if err != nil {
		return err
	}
	switch st, err := os.Lstat(path); {
	case err != nil:
		return err
	case st.Mode()&fs.ModeSymlink != 0:
		return fmt.Errorf("%s is a link to %s; name that", path, real)
	case !st.Mode().IsRegular():
		return fmt.Errorf("%s is no regular file", path)
	}
	file, err := cowdisk.HostFS{}.Open(real, cowdisk.OpenMode{Write: true})
	if err != nil {
		return err
	}
	defer file.Close()
	st, err := file.Stat()
	if err != nil {
		return err
	}
	if _, err := cowdisk.Probe(file, st.Size); errors.Is(err, cowdisk.ErrNotCOW) && !raw {
		return fmt.Errorf("%s is no COW image; if it is a raw disk image, say so: %s,format=raw", path, strings.ReplaceAll(path, ",", ",,"))
	}
	f, err := Scan(ctx, append([]string{filepath.Dir(real)}, folders...)...)
	if err != nil {
		return err
	}
	if by := f.StandingOn(real); len(by) > 0 {
		return &StoodOnError{path, by}
	}
	if i := f.unreadable(); i != nil {
		return fmt.Errorf("%s: whether %s stands on it is not known: %w", path, i.Path, i.Problem)
	}
	return os.Remove(real)
}

// StandingOn are the images that name the file at path as their base, by
// whatever name.
func (f *Forest) StandingOn(path string) []*Image {
	if i := f.images[path]; i != nil {
		return i.Overlays
	}
	return nil
}

// unreadable is a file or folder that could not be read, if there is one.
func (f *Forest) unreadable() *Image {
	for _, path := range slices.Sorted(maps.Keys(f.images)) {
		if i := f.images[path]; errors.Is(i.Problem, fs.ErrPermission) {
			return i
		}
	}
	return nil
}
