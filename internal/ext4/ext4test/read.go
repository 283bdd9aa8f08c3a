package ext4test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// File is a file that was read back.
type File struct {
	Mode         uint32 // as stat(2) has it
	UID, GID     uint32
	MTime        time.Time
	Links        int
	Inode        uint32
	Major, Minor uint32
	Target       string
	Size         int64
	Blocks       int64 // of data, on disk
	Xattrs       map[string]string
	Index        bool // a folder with an index
	Data         io.ReaderAt
}

// Contents are the bytes of a file.
func (f *File) Contents() ([]byte, error) {
	b := make([]byte, f.Size)
	if n, err := f.Data.ReadAt(b, 0); n < len(b) {
		return nil, err
	}
	return b, nil
}

// Read reads the tree of a file system: path, as "/usr/bin" is one, to file.
func Read(r io.ReaderAt) (map[string]*File, error) {
	fs := &reader{r: r, sb: make([]byte, 1024)}
	if _, err := r.ReadAt(fs.sb, 1024); err != nil {
		return nil, err
	}
	if fs.u16(fs.sb, 56) != 0xef53 || fs.u32(fs.sb, 24) != 2 || fs.u16(fs.sb, 88) != 256 {
		return nil, errors.New("no ext4 file system of 4096-byte blocks and 256-byte inodes")
	}
	files := map[string]*File{}
	return files, fs.walk("/", 2, files)
}

type reader struct {
	r  io.ReaderAt
	sb []byte
}

func (*reader) u16(b []byte, at int) uint16 { return binary.LittleEndian.Uint16(b[at:]) }
func (*reader) u32(b []byte, at int) uint32 { return binary.LittleEndian.Uint32(b[at:]) }

func (fs *reader) block(n uint32) ([]byte, error) {
	b := make([]byte, 4096)
	if k, err := fs.r.ReadAt(b, int64(n)*4096); k < len(b) && err != io.EOF {
		return nil, err
	}
	return b, nil
}

func (fs *reader) walk(path string, num uint32, files map[string]*File) error {
	f, err := fs.inode(num)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	files[path] = f
	if f.Mode&0o170000 != 0o040000 {
		return nil
	}
	b, err := f.Contents()
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if path == "/" {
		path = ""
	}
	for at := 0; at < len(b); {
		num, size, l := fs.u32(b, at), int(fs.u16(b, at+4)), int(b[at+6])
		if size < 8 || at+size > len(b) {
			return fmt.Errorf("%s: a bad entry at %d", path, at)
		}
		name := string(b[at+8 : at+8+l])
		at += size
		if num == 0 || name == "." || name == ".." {
			if f.Index && name == ".." {
				at = 4096
			}
			continue
		}
		if files[path+"/"+name] != nil {
			return fmt.Errorf("%s/%s is there twice", path, name)
		}
		if err := fs.walk(path+"/"+name, num, files); err != nil {
			return err
		}
	}
	return nil
}

func (fs *reader) inode(num uint32) (*File, error) {
	per := fs.u32(fs.sb, 40)
	d := make([]byte, 32)
	if _, err := fs.r.ReadAt(d, 4096+int64((num-1)/per)*32); err != nil {
		return nil, err
	}
	b := make([]byte, 256)
	if _, err := fs.r.ReadAt(b, int64(fs.u32(d, 8))*4096+int64((num-1)%per)*256); err != nil {
		return nil, err
	}
	f := &File{
		Mode: uint32(fs.u16(b, 0)), Inode: num, Links: int(fs.u16(b, 26)),
		UID: uint32(fs.u16(b, 2)) | uint32(fs.u16(b, 120))<<16, GID: uint32(fs.u16(b, 24)) | uint32(fs.u16(b, 122))<<16,
		Size:   int64(fs.u32(b, 4)) | int64(fs.u32(b, 108))<<32,
		Index:  fs.u32(b, 32)&0x1000 != 0,
		Xattrs: map[string]string{},
	}
	extra := fs.u32(b, 136)
	f.MTime = time.Unix(int64(int32(fs.u32(b, 16)))+int64(extra&3)<<32, int64(extra>>2)).UTC()
	switch f.Mode & 0o170000 {
	case 0o020000, 0o060000:
		if v := fs.u32(b, 40); v != 0 {
			f.Major, f.Minor = v>>8, v&0xff
		} else if v := fs.u32(b, 44); v != 0 {
			f.Major, f.Minor = v&0xfff00>>8, v&0xff|v>>12&0xfff00
		}
	case 0o120000:
		if f.Size < 60 {
			f.Target = string(b[40 : 40+f.Size])
			break
		}
		fallthrough
	case 0o100000, 0o040000:
		c := &contents{fs: fs, size: f.Size, at: map[int64]uint32{}}
		if err := c.extents(b[40:100], 0); err != nil {
			return nil, err
		}
		f.Data, f.Blocks = c, int64(len(c.at))
		if f.Mode&0o170000 == 0o120000 {
			t, err := f.Contents()
			if err != nil {
				return nil, err
			}
			f.Target = string(t)
		}
	}
	return f, fs.xattrs(f, b)
}

func (fs *reader) xattrs(f *File, b []byte) error {
	names := map[byte]string{1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security.", 7: "system."}
	list := func(b []byte, at, base int) {
		for fs.u32(b, at) != 0 {
			l, value, size := int(b[at]), int(fs.u16(b, at+2)), int(fs.u32(b, at+8))
			f.Xattrs[names[b[at+1]]+string(b[at+16:at+16+l])] = string(b[base+value : base+value+size])
			at += 16 + (l+3)&^3
		}
	}
	if fs.u32(b, 160) == 0xea020000 {
		list(b, 164, 164)
	}
	if n := fs.u32(b, 104); n != 0 {
		x, err := fs.block(n)
		if err != nil {
			return err
		}
		list(x, 32, 0)
	}
	return nil
}

// contents are the blocks of a file.
type contents struct {
	fs   *reader
	size int64
	at   map[int64]uint32
}

func (c *contents) extents(b []byte, depth int) error {
	if c.fs.u16(b, 0) != 0xf30a || depth > 5 {
		return errors.New("no tree of extents")
	}
	for i := range int(c.fs.u16(b, 2)) {
		e := b[12+12*i:]
		if c.fs.u16(b, 6) > 0 {
			next, err := c.fs.block(c.fs.u32(e, 4))
			if err != nil {
				return err
			}
			if err := c.extents(next, depth+1); err != nil {
				return err
			}
			continue
		}
		for k := range uint32(c.fs.u16(e, 4)) {
			c.at[int64(c.fs.u32(e, 0)+k)] = c.fs.u32(e, 8) + k
		}
	}
	return nil
}

func (c *contents) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) && off+int64(n) < c.size {
		at := off + int64(n)
		b := make([]byte, 4096)
		if block, ok := c.at[at/4096]; ok {
			var err error
			if b, err = c.fs.block(block); err != nil {
				return n, err
			}
		}
		n += copy(p[n:], b[at%4096:min(4096, at%4096+c.size-at)])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
