package filefs

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// validSeconds is how long the client may keep names and attributes: nobody
// else changes the files while they are served.
const validSeconds = 3600

// do carries the request out. The answer's fields go to out; data is how many
// bytes are in their place behind the answer's header already.
func (s *server) do(c *call, out *encoder) (data int, err error) {
	switch c.op {
	case opInit:
		return 0, s.init(c, out)
	case opLookup:
		return 0, s.lookup(c, out)
	case opGetattr:
		return 0, s.getattr(c.node, out)
	case opOpen:
		if _, err := s.file(c.node); err != nil {
			return 0, err
		}
		out.zeros(16) // struct fuse_open_out: the node is all the handle there is
		return 0, nil
	case opOpendir:
		out.zeros(16)
		return 0, nil
	case opRelease, opReleasedir, opFlush, opFsyncdir, opReaddir, opDestroy:
		return 0, nil // the folder reads as empty: who mounts it knows what is in it
	case opStatfs:
		return 0, s.statfs(out)
	case opSyncfs:
		return 0, s.sync()
	}
	f, err := s.file(c.node)
	if err != nil {
		return 0, err
	}
	switch c.op {
	case opSetattr:
		if err := s.setattr(f, c); err != nil {
			return 0, err
		}
		return 0, s.getattr(c.node, out)
	case opRead:
		return s.read(f, c)
	case opWrite:
		return 0, s.write(f, c, out)
	case opFsync:
		return 0, s.fsync(f, c)
	case opFallocate:
		return 0, s.fallocate(f, c)
	case opLseek:
		return 0, s.lseek(f, c, out)
	}
	return 0, unix.ENOSYS
}

// args reads the arguments, at most n bytes of them.
func (s *server) args(c *call, n int) *decoder {
	p := s.request[inHeaderSize:][:n]
	n, _ = io.ReadFull(c.r, p) // what is short says so field by field
	return &decoder{b: p[:n]}
}

// file is the file of a node.
func (s *server) file(node uint64) (*os.File, error) {
	switch {
	case node == rootNode:
		return nil, unix.EISDIR
	case node < firstFile || node-firstFile >= uint64(len(s.files)):
		return nil, unix.ESTALE
	}
	return s.files[node-firstFile], nil
}

func (s *server) init(c *call, out *encoder) error {
	in := s.args(c, 16)
	major, _, readahead, flags := in.u32(), in.u32(), in.u32(), in.u32()
	if in.short || major != versionMajor {
		return unix.EPROTO
	}
	out.u32(versionMajor)
	out.u32(versionMinor)
	out.u32(readahead)
	out.u32(flags & (initAsyncRead | initBigWrites | initWritebackCache | initMaxPages))
	out.u16(0) // requests in the background: the client's default
	out.u16(0)
	out.u32(maxPages * 4096) // bytes of a write
	out.u32(1)               // granularity of times in ns
	out.u16(maxPages)
	out.zeros(2 + 4 + 7*4)
	return nil
}

func (s *server) lookup(c *call, out *encoder) error {
	if c.node != rootNode {
		return unix.ENOTDIR
	}
	name, _, ended := bytes.Cut(s.args(c, maxArgs).b, []byte{0})
	i, err := strconv.ParseUint(string(name), 10, 16)
	if !ended || err != nil || i >= uint64(len(s.files)) || strconv.FormatUint(i, 10) != string(name) {
		return unix.ENOENT
	}
	out.u64(firstFile + i)
	out.u64(0) // generation
	out.u64(validSeconds)
	out.u64(validSeconds)
	out.u64(0)
	return s.attributes(firstFile+i, out)
}

func (s *server) getattr(node uint64, out *encoder) error {
	out.u64(validSeconds)
	out.u64(0)
	return s.attributes(node, out)
}

// attributes appends a struct fuse_attr.
func (s *server) attributes(node uint64, out *encoder) error {
	st := unix.Stat_t{Mode: unix.S_IFDIR | 0o555, Nlink: 2, Blksize: 4096}
	if node != rootNode {
		f, err := s.file(node)
		if err != nil {
			return err
		}
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return err
		}
	}
	for _, v := range []uint64{node, uint64(st.Size), uint64(st.Blocks), uint64(st.Atim.Sec), uint64(st.Mtim.Sec), uint64(st.Ctim.Sec)} {
		out.u64(v)
	}
	for _, v := range []uint32{uint32(st.Atim.Nsec), uint32(st.Mtim.Nsec), uint32(st.Ctim.Nsec), st.Mode, uint32(st.Nlink), st.Uid, st.Gid, 0, uint32(st.Blksize), 0} {
		out.u32(v)
	}
	return nil
}

// setattr sets size and times. Whose a file is stays this machine's affair.
func (s *server) setattr(f *os.File, c *call) error {
	in := s.args(c, 88)
	valid := in.u32()
	in.take(4)
	in.u64() // handle
	size := in.u64()
	in.u64() // lock owner
	atime, mtime := in.u64(), in.u64()
	in.u64() // ctime
	atimeNsec, mtimeNsec := in.u32(), in.u32()
	switch {
	case in.short:
		return unix.EINVAL
	case valid&(setMode|setUID|setGID) != 0:
		return unix.EPERM
	}
	if valid&setSize != 0 {
		if err := unix.Ftruncate(int(f.Fd()), int64(size)); err != nil {
			return err
		}
	}
	if valid&(setAtime|setMtime) == 0 {
		return nil
	}
	times := []unix.Timespec{
		setTime(valid&setAtime != 0, valid&setAtimeNow != 0, atime, atimeNsec),
		setTime(valid&setMtime != 0, valid&setMtimeNow != 0, mtime, mtimeNsec),
	}
	// By its descriptor: AT_EMPTY_PATH came with Linux 5.8.
	return unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), times, 0)
}

func setTime(set, now bool, sec uint64, nsec uint32) unix.Timespec {
	switch {
	case !set:
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	case now:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	}
	return unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
}

// position reads the handle, the offset and the size of a read or write.
func (s *server) position(c *call) (off int64, size int, err error) {
	in := s.args(c, 40)
	in.u64() // handle
	o, n := in.u64(), in.u32()
	in.take(4)
	in.u64()
	in.u64() // flags
	if in.short || int64(o) < 0 || n > maxPages*4096 {
		return 0, 0, unix.EINVAL
	}
	return int64(o), int(n), nil
}

func (s *server) read(f *os.File, c *call) (int, error) {
	off, size, err := s.position(c)
	if err != nil {
		return 0, err
	}
	w := *c.w // the header in front is written last
	if err := w.Wrote(outHeaderSize); err != nil {
		return 0, unix.EIO
	}
	if s.pieces, err = w.Buffers(min(size, w.Len()), s.pieces[:0]); err != nil {
		return 0, unix.EIO
	}
	done := 0
	for _, p := range s.pieces {
		n, err := f.ReadAt(p, off+int64(done))
		done += n
		if err == io.EOF {
			break
		} else if err != nil {
			return 0, err
		}
	}
	return done, nil
}

func (s *server) write(f *os.File, c *call, out *encoder) error {
	off, size, err := s.position(c)
	if err != nil {
		return err
	}
	if s.pieces, err = c.r.Buffers(size, s.pieces[:0]); err != nil {
		return unix.EINVAL
	}
	done := 0
	for _, p := range s.pieces {
		n, err := f.WriteAt(p, off+int64(done))
		done += n
		if err != nil && done > 0 {
			break // the rest is asked for again
		} else if err != nil {
			return err
		}
	}
	out.u32(uint32(done))
	out.u32(0)
	return nil
}

func (s *server) fsync(f *os.File, c *call) error {
	in := s.args(c, 16)
	in.u64() // handle
	if in.u32()&fsyncData != 0 {
		return unix.Fdatasync(int(f.Fd()))
	}
	return f.Sync()
}

func (s *server) sync() error {
	for _, f := range s.files {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return nil
}

func (s *server) fallocate(f *os.File, c *call) error {
	in := s.args(c, 32)
	in.u64() // handle
	off, size, mode := in.u64(), in.u64(), in.u32()
	if in.short || int64(off) < 0 || int64(size) <= 0 {
		return unix.EINVAL
	}
	for {
		if err := unix.Fallocate(int(f.Fd()), mode, int64(off), int64(size)); err != unix.EINTR {
			return err
		}
	}
}

func (s *server) lseek(f *os.File, c *call, out *encoder) error {
	in := s.args(c, 24)
	in.u64() // handle
	off, whence := in.u64(), in.u32()
	if in.short || whence != unix.SEEK_DATA && whence != unix.SEEK_HOLE {
		return unix.EINVAL
	}
	to, err := unix.Seek(int(f.Fd()), int64(off), int(whence))
	out.u64(uint64(to))
	return err
}

// statfs appends what is known of the file system that the first file is on.
func (s *server) statfs(out *encoder) error {
	var st unix.Statfs_t
	if len(s.files) > 0 {
		if err := unix.Fstatfs(int(s.files[0].Fd()), &st); err != nil {
			return err
		}
	}
	for _, v := range []uint64{st.Blocks, st.Bfree, st.Bavail, st.Files, st.Ffree} {
		out.u64(v)
	}
	out.u32(uint32(st.Bsize))
	out.u32(255) // longest name
	out.u32(uint32(st.Frsize))
	out.zeros(4 + 6*4)
	return nil
}
