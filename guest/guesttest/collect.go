package guesttest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// What one run may bring back. The bytes are those of data: holes stay holes,
// and count nothing.
const (
	maxFiles = 10_000
	maxBytes = 8 << 30
	maxDepth = 32 // of folders
)

// ErrTooMuch says that a guest left more than a run may bring back.
var ErrTooMuch = errors.New("the guest left too much")

// collector brings files from a folder that the guest could write to back to
// this machine. The guest may have put anything there: no link is followed,
// only regular files count, and nothing that comes back is executable. Files
// whose names are the guest's are only ever made, never written over.
//
// One collector serves all kernels of a run.
type collector struct {
	files int   // that may still come
	bytes int64 // likewise
	made  map[string]fs.FileInfo
}

func newCollector() *collector {
	return &collector{files: maxFiles, bytes: maxBytes, made: map[string]fs.FileInfo{}}
}

// source opens a regular file below root; nil = there is none.
func source(root *os.Root, name string) (*os.File, error) {
	before, err := root.Lstat(name)
	if err != nil || !before.Mode().IsRegular() {
		return nil, nil
	}
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || !os.SameFile(before, st) {
		f.Close()
		return nil, err
	}
	return f, nil
}

// named brings back a file whose name on this machine is the user's: a regular
// file is replaced by a new one, a device or a pipe is written to, a symbolic
// link is refused. A coverage profile (cover) is joined to the one that the
// kernel before has made.
func (c *collector) named(root *os.Root, name, target string, cover bool) error {
	in, err := source(root, name)
	if in == nil {
		return err
	}
	defer in.Close()
	if err := c.count(target); err != nil {
		return err
	}
	switch st, err := os.Lstat(target); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case st.Mode()&fs.ModeSymlink != 0:
		return fmt.Errorf("%s is a symbolic link, and what a guest wrote goes through none; name the file itself", target)
	case st.IsDir():
		return &os.PathError{Op: "write", Path: target, Err: unix.EISDIR}
	case !st.Mode().IsRegular():
		out, err := os.OpenFile(target, os.O_WRONLY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		return errors.Join(c.stream(out, in, target), out.Close())
	case cover && c.made[target] != nil && os.SameFile(st, c.made[target]):
		return c.join(in, target)
	}
	return c.replace(in, target)
}

// replace puts a new file in target's place once it is whole.
func (c *collector) replace(in *os.File, target string) error {
	dir, err := os.MkdirTemp(filepath.Dir(target), ".moovm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	tmp := filepath.Join(dir, "new")
	out, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	st, err := out.Stat()
	if err = errors.Join(err, c.copy(out, in, target), out.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, target); err != nil {
		return err
	}
	c.made[target] = st
	return nil
}

// join adds a coverage profile to another, without its first line (mode: …).
func (c *collector) join(in *os.File, target string) error {
	out, err := os.OpenFile(target, os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	r := bufio.NewReader(in)
	for {
		_, err := r.ReadSlice('\n')
		if err == nil || errors.Is(err, io.EOF) {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return errors.Join(err, out.Close())
		}
	}
	return errors.Join(c.stream(out, r, target), out.Close())
}

// names are the files that may come back of a folder; nil = all, with its
// folders.
type names struct {
	pattern *regexp.Regexp
	// again says that a file of that name, which is there already, is the same.
	again func(name string) bool
}

var (
	// coverNames are what a program built with -cover writes into GOCOVERDIR.
	// A covmeta file is named after its contents.
	coverNames = &names{regexp.MustCompile(`^(covmeta\.[0-9a-f]{32}|covcounters\.[0-9a-f]{32}\.[0-9]+\.[0-9]+)$`),
		func(name string) bool { return strings.HasPrefix(name, "covmeta.") }}
	coreNames = &names{pattern: regexp.MustCompile(`^core\.[^/]+$`)}
)

// artifactsDir is where package testing keeps artifacts, below the output
// folder.
const artifactsDir = "_artifacts"

// folder brings back files of the folder name in root, as files that are new
// in the folder target. What is in target must not be a link on the way.
func (c *collector) folder(root *os.Root, name, target string, which *names) error {
	st, err := root.Lstat(name)
	if err != nil || !st.IsDir() {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o777); err != nil {
		return err
	}
	parent, err := os.OpenRoot(filepath.Dir(target))
	if err != nil {
		return err
	}
	defer parent.Close()
	return c.tree(root, name, parent, filepath.Base(target), which, 0)
}

func (c *collector) tree(root *os.Root, name string, parent *os.Root, to string, which *names, depth int) error {
	shown := filepath.Join(parent.Name(), to)
	if depth > maxDepth {
		return fmt.Errorf("%s: %w: folders in %d folders", shown, ErrTooMuch, maxDepth)
	}
	dir, err := root.Open(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	var target *os.Root // made with the first file
	for {
		entries, err := dir.ReadDir(256)
		for _, e := range entries {
			if which != nil && (!e.Type().IsRegular() || !which.pattern.MatchString(e.Name())) ||
				!e.IsDir() && !e.Type().IsRegular() {
				continue
			}
			if target == nil {
				if target, err = beneath(parent, to, depth == 0 && which != nil); err != nil {
					return err
				}
				defer target.Close()
			}
			if err := c.entry(root, filepath.Join(name, e.Name()), target, e, which, depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// entry brings back one entry of a folder.
func (c *collector) entry(root *os.Root, from string, target *os.Root, e fs.DirEntry, which *names, depth int) error {
	if e.IsDir() {
		if err := c.count(filepath.Join(target.Name(), e.Name())); err != nil {
			return err
		}
		return c.tree(root, from, target, e.Name(), nil, depth+1)
	}
	return c.new(root, from, target, e.Name(), which)
}

// beneath opens the folder name in parent, and makes it if there is none. A
// link in its place is only followed where the user named it.
func beneath(parent *os.Root, name string, named bool) (*os.Root, error) {
	if err := parent.Mkdir(name, 0o777); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	path := filepath.Join(parent.Name(), name)
	if named {
		return os.OpenRoot(path)
	}
	if st, err := parent.Lstat(name); err != nil {
		return nil, err
	} else if !st.IsDir() {
		return nil, fmt.Errorf("%s is no folder, and what a guest wrote goes through no link; move it away", path)
	}
	return parent.OpenRoot(name)
}

// new brings back a file whose name the guest chose.
func (c *collector) new(root *os.Root, from string, target *os.Root, name string, which *names) error {
	in, err := source(root, from)
	if in == nil {
		return err
	}
	defer in.Close()
	path := filepath.Join(target.Name(), name)
	if err := c.count(path); err != nil {
		return err
	}
	out, err := target.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if errors.Is(err, fs.ErrExist) {
		if which != nil && which.again != nil && which.again(name) {
			return nil
		}
		return fmt.Errorf("%s is there already, and a guest writes over nothing; move it away: %w", path, fs.ErrExist)
	}
	if err != nil {
		return err
	}
	if err := errors.Join(c.copy(out, in, path), out.Close()); err != nil {
		return errors.Join(err, target.Remove(name))
	}
	return nil
}

// count takes one file from what may come.
func (c *collector) count(path string) error {
	if c.files--; c.files < 0 {
		return fmt.Errorf("%s: %w: over %d files and folders", path, ErrTooMuch, maxFiles)
	}
	return nil
}

// stream copies what in has to say.
func (c *collector) stream(out io.Writer, in io.Reader, path string) error {
	n, err := io.Copy(out, io.LimitReader(in, c.bytes+1))
	if c.bytes -= n; err == nil && c.bytes < 0 {
		err = fmt.Errorf("%s: %w: over %d bytes", path, ErrTooMuch, int64(maxBytes))
	}
	return err
}

// copy copies a file and keeps its holes.
func (c *collector) copy(out, in *os.File, path string) error {
	st, err := in.Stat()
	if err != nil {
		return err
	}
	for at := int64(0); at < st.Size(); {
		data, err := in.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return err
		}
		end, err := in.Seek(data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if _, err := in.Seek(data, io.SeekStart); err != nil {
			return err
		}
		if _, err := out.Seek(data, io.SeekStart); err != nil {
			return err
		}
		if err := c.stream(out, io.LimitReader(in, min(end, st.Size())-data), path); err != nil {
			return err
		}
		at = end
	}
	return out.Truncate(st.Size())
}
