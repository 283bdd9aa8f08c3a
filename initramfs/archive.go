// Package initramfs writes the archive that the kernel unpacks as its first root
// file system: an init with its configuration, kernel modules, and other files.
package initramfs

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/cavaliergopher/cpio"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/kmod"
)

// File is one entry of an initramfs.
type File struct {
	// Name is the path in the archive; folders above it are made.
	Name string
	// Mode is as in stat(2). Without type bits it is a regular file; without
	// permissions it is 0755 for folders and 0644 for the rest.
	Mode uint32
	// Data is the contents of a regular file, or the target of a symbolic link.
	Data []byte
	// HostPath is a file whose contents are used instead of Data.
	HostPath string
	// Major and Minor are the number of a device node.
	Major, Minor uint32
}

// An Archive is an initial RAM file system to be written as the newc archive
// that the kernel unpacks: the init, its configuration, kernel modules,
// /dev/console, and anything else. The same input gives the same bytes.
type Archive struct {
	// Init is the host path of the static program that becomes /init. Empty
	// leaves /init out (Files may have it).
	Init string
	// Libraries lets Init be a dynamic program: its loader and libraries are
	// found on this machine and go along.
	Libraries bool
	// Config is written to ConfigPath, its Modules taken from the field below.
	// nil leaves it out.
	Config *control.InitConfig
	// Modules are written, unpacked, to ModulesPath, in load order.
	Modules []kmod.ModuleFile
	// Files are further entries.
	Files []File
}

// ModulesPath is the folder of the modules in the initramfs.
const ModulesPath = "/moovm/modules"

// ErrNotStatic says that a program cannot be an init, because it needs a
// dynamic loader that an initramfs does not have.
var ErrNotStatic = errors.New("not a static program")

// Bytes returns the archive.
func (a *Archive) Bytes() ([]byte, error) {
	var b bytes.Buffer
	if a.Init != "" {
		if st, err := os.Stat(a.Init); err == nil {
			b.Grow(int(min(st.Size(), 64<<20)) + 4<<20) // saves copying a large program about
		}
	}
	_, err := a.WriteTo(&b)
	return b.Bytes(), err
}

// WriteTo writes the archive to w.
func (a *Archive) WriteTo(w io.Writer) (int64, error) {
	c := &writer{to: countingWriter{w: w}, dirs: map[string]bool{"": true, ".": true}}
	c.cpio = cpio.NewWriter(&c.to)
	err := a.write(c)
	if err == nil {
		err = c.cpio.Close()
	}
	if err != nil {
		err = fmt.Errorf("initramfs: %w", err)
	}
	return c.to.n, err
}

func (a *Archive) write(c *writer) error {
	// The kernel opens /dev/console as init's stdin, stdout and stderr before
	// anything is mounted; without it a Go program cannot even say why it ends.
	files := []File{
		{Name: "dev/console", Mode: cpio.TypeChar | 0o600, Major: 5, Minor: 1},
		{Name: "dev/null", Mode: cpio.TypeChar | 0o666, Major: 1, Minor: 3},
		{Name: "proc", Mode: cpio.TypeDir},
		{Name: "sys", Mode: cpio.TypeDir},
		{Name: "run", Mode: cpio.TypeDir},
		{Name: "tmp", Mode: cpio.TypeDir | 0o1777},
		{Name: "root", Mode: cpio.TypeDir | 0o700},
	}
	if a.Init != "" {
		err := CheckStatic(a.Init)
		if a.Libraries && errors.Is(err, ErrNotStatic) {
			var libraries []File
			libraries, err = LibraryFiles(a.Init)
			files = append(files, libraries...)
		}
		if err != nil {
			return err
		}
		files = append(files, File{Name: "init", Mode: 0o755, HostPath: a.Init})
	}
	files = append(files, a.Files...)
	var config control.InitConfig
	if a.Config != nil {
		config = *a.Config
	}
	for _, f := range files {
		if err := c.add(f); err != nil {
			return err
		}
	}
	config.Modules = nil
	for i, m := range a.Modules {
		data, err := m.Load()
		if err != nil {
			return err
		}
		name := fmt.Sprintf("%s/%03d-%s.ko", ModulesPath, i, m.Name)
		if err := c.add(File{Name: name, Data: data}); err != nil {
			return err
		}
		config.Modules = append(config.Modules, control.InitModule{Name: m.Name, Path: name, Optional: m.Optional})
	}
	if a.Config == nil {
		return nil
	}
	data, err := config.Marshal()
	if err != nil {
		return err
	}
	return c.add(File{Name: control.ConfigPath, Mode: 0o600, Data: data})
}

// CheckStatic looks for a dynamic loader in an ELF program. Anything that is
// not ELF (a script) is the caller's business.
func CheckStatic(name string) error {
	f, err := elf.Open(name)
	if err != nil {
		var bad *elf.FormatError
		if errors.As(err, &bad) || errors.Is(err, io.EOF) {
			return nil
		}
		return err
	}
	defer f.Close()
	if f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("init %s is a program for %s, not for x86-64", name, strings.TrimPrefix(f.Machine.String(), "EM_"))
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("init %s needs a dynamic loader; build it with CGO_ENABLED=0: %w", name, ErrNotStatic)
		}
	}
	return nil
}

// writer adds files to a cpio archive, and folders as they are needed.
type writer struct {
	to    countingWriter
	cpio  *cpio.Writer
	dirs  map[string]bool
	inode int64
}

func (c *writer) add(f File) error {
	name := strings.TrimPrefix(path.Clean("/"+f.Name), "/")
	if name == "" {
		return nil // the root is there
	}
	if err := c.parents(path.Dir(name)); err != nil {
		return err
	}
	mode := f.Mode
	if mode&cpio.ModeType == 0 {
		mode |= cpio.TypeReg
	}
	if mode&cpio.ModePerm == 0 && mode&cpio.ModeType != cpio.TypeDir {
		mode |= 0o644
	}
	switch mode & cpio.ModeType {
	case cpio.TypeDir:
		if c.dirs[name] {
			return nil
		}
		c.dirs[name] = true
		if mode&cpio.ModePerm == 0 {
			mode |= 0o755
		}
		return c.header(name, mode, 0)
	case cpio.TypeChar, cpio.TypeBlock:
		return c.device(name, mode, f.Major, f.Minor)
	case cpio.TypeReg:
		if f.HostPath != "" {
			return c.hostFile(name, mode, f.HostPath)
		}
	}
	if err := c.header(name, mode, int64(len(f.Data))); err != nil {
		return err
	}
	_, err := c.cpio.Write(f.Data)
	return err
}

// parents makes the folders above an entry.
func (c *writer) parents(dir string) error {
	if dir == "." || dir == "" || c.dirs[dir] {
		return nil
	}
	if err := c.parents(path.Dir(dir)); err != nil {
		return err
	}
	c.dirs[dir] = true
	return c.header(dir, cpio.TypeDir|0o755, 0)
}

func (c *writer) header(name string, mode uint32, size int64) error {
	c.inode++
	links := 1
	if mode&cpio.ModeType == cpio.TypeDir {
		links = 2
	}
	if size > 0xffffffff {
		return fmt.Errorf("%s: %d bytes do not fit a cpio archive", name, size)
	}
	return c.cpio.WriteHeader(&cpio.Header{Name: name, Mode: cpio.FileMode(mode), Size: size, Inode: c.inode, Links: links})
}

func (c *writer) hostFile(name string, mode uint32, host string) error {
	f, err := os.Open(host)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", host)
	}
	if err := c.header(name, mode, st.Size()); err != nil {
		return err
	}
	if n, err := io.Copy(c.cpio, io.LimitReader(f, st.Size())); err != nil {
		return err
	} else if n != st.Size() {
		return fmt.Errorf("%s became shorter while it was read", host)
	}
	return nil
}

// device writes a device node itself: the cpio library has no field for the
// device's number (Documentation/driver-api/early-userspace/buffer-format.rst).
func (c *writer) device(name string, mode, major, minor uint32) error {
	if err := c.cpio.Flush(); err != nil {
		return err
	}
	c.inode++
	h := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		c.inode, mode, 0, 0, 1, 0, 0, 0, 0, major, minor, len(name)+1, 0, name)
	for len(h)%4 != 0 {
		h += "\x00"
	}
	_, err := io.WriteString(&c.to, h)
	return err
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
