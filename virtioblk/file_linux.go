package virtioblk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// File is a Backend on a raw image file or block device. Discard and
// WriteZeroes punch holes where the file system can.
type File struct {
	f    *os.File
	fd   int
	size atomic.Int64
}

// OpenFile opens a raw image file or block device; its size is a whole number
// of sectors, the rest is not shown.
func OpenFile(path string, readOnly bool) (*File, error) {
	flag := os.O_RDWR
	if readOnly {
		flag = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return nil, err
	}
	d := &File{f: f, fd: int(f.Fd())}
	if err := d.UpdateSize(); err != nil {
		f.Close()
		return nil, err
	}
	return d, nil
}

// UpdateSize looks at the file's size again; tell the device with
// Device.Resized.
func (d *File) UpdateSize() error {
	n, err := d.f.Seek(0, io.SeekEnd) // also right for block devices
	if err != nil {
		return fmt.Errorf("virtioblk: size of %s: %w", d.f.Name(), err)
	}
	d.size.Store(n)
	return nil
}

// Size implements Backend.
func (d *File) Size() int64 { return d.size.Load() }

// ReadAt implements Backend.
func (d *File) ReadAt(p []byte, off int64) (int, error) { return d.f.ReadAt(p, off) }

// WriteAt implements Backend.
func (d *File) WriteAt(p []byte, off int64) (int, error) { return d.f.WriteAt(p, off) }

// Flush implements Backend.
func (d *File) Flush() error {
	for {
		err := unix.Fdatasync(d.fd)
		if err != unix.EINTR {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

// Close closes the file; no request may be in flight.
func (d *File) Close() error { return d.f.Close() }

// iovMax is how many buffers preadv and pwritev take (UIO_MAXIOV).
const iovMax = 1024

// ReadvAt implements VectorReader.
func (d *File) ReadvAt(bufs [][]byte, off int64) (int, error) {
	return d.vector(bufs, off, unix.Preadv, d.ReadAt)
}

// WritevAt implements VectorWriter.
func (d *File) WritevAt(bufs [][]byte, off int64) (int, error) {
	return d.vector(bufs, off, unix.Pwritev, d.WriteAt)
}

func (d *File) vector(bufs [][]byte, off int64,
	call func(fd int, bufs [][]byte, off int64) (int, error), one func([]byte, int64) (int, error)) (int, error) {
	total := 0
	for len(bufs) > 0 {
		part := bufs[:min(len(bufs), iovMax)]
		n, err := call(d.fd, part, off)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return total, &os.PathError{Op: "vectored I/O", Path: d.f.Name(), Err: err}
		}
		total, off = total+n, off+int64(n)
		for len(bufs) > 0 && n >= len(bufs[0]) {
			n -= len(bufs[0])
			bufs = bufs[1:]
		}
		if n > 0 || len(part) > 0 && len(bufs) > 0 && &part[0] == &bufs[0] {
			// A short transfer ended inside a buffer, or at once at the
			// end of the file: ReadAt and WriteAt know how to go on.
			m, err := one(bufs[0][n:], off)
			total, off = total+m, off+int64(m)
			if err != nil {
				return total, err
			}
			bufs = bufs[1:]
		}
	}
	return total, nil
}

// Discard implements Discarder. Where holes cannot be punched it does nothing,
// as a discard may.
func (d *File) Discard(off, n int64) error {
	err := d.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}

// WriteZeroes implements ZeroWriter.
func (d *File) WriteZeroes(off, n int64, mayUnmap bool) error {
	err := error(unix.EOPNOTSUPP)
	if mayUnmap {
		err = d.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = d.fallocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	for n > 0 {
		m, err := d.f.WriteAt(zeros[:min(n, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(m), n-int64(m)
	}
	return nil
}

var zeros [64 << 10]byte // never written

func (d *File) fallocate(mode uint32, off, n int64) error {
	if n == 0 {
		return nil
	}
	for {
		err := unix.Fallocate(d.fd, mode, off, n)
		if err != unix.EINTR {
			return os.NewSyscallError("fallocate", err)
		}
	}
}
