package vmm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// image is guest memory that will not change any more: the contents a machine
// had at one instant. Any number of machines map it privately, so that their
// writes stay their own.
//
// It is a list of segments that covers [0, size) in order. The first freeze of
// a machine yields the machine's whole memory file; that of a fork yields the
// pages it wrote, in a file of their own, over the segments of the image it
// was forked from. A long hole is a segment without a file, because touching a
// hole through a private mapping would allocate a page in the file as well.
type image struct {
	size     int64
	segments []segment
	refs     atomic.Int32 // snapshots and memories that hold it
}

// segment is length bytes at off, found at pos of file; zeros without a file.
type segment struct {
	off, length int64
	file        *memFile
	pos         int64
}

func (s segment) end() int64 { return s.off + s.length }

// memFile is a memory file, or a file on disk, that images share.
type memFile struct {
	fd   int
	refs atomic.Int32 // images that name it
}

func (f *memFile) release() error {
	if f.refs.Add(-1) > 0 {
		return nil
	}
	return unix.Close(f.fd)
}

// newImage makes an image, which keeps its files open until its last owner
// has released it.
func newImage(size int64, segments []segment) *image {
	im := &image{size: size, segments: segments}
	im.refs.Store(1)
	for f := range im.files() {
		f.refs.Add(1)
	}
	return im
}

// retain adds an owner.
func (im *image) retain() *image {
	im.refs.Add(1)
	return im
}

// release ends one owner's hold. What is mapped stays mapped.
func (im *image) release() error {
	if im.refs.Add(-1) > 0 {
		return nil
	}
	var err error
	for f := range im.files() {
		err = errors.Join(err, f.release())
	}
	return err
}

// files are the image's files, each once.
func (im *image) files() map[*memFile]bool {
	set := map[*memFile]bool{}
	for _, s := range im.segments {
		if s.file != nil {
			set[s.file] = true
		}
	}
	return set
}

// imageBlock is the least hole that becomes a segment of its own: the reach of
// a page-table page, so that a mapping is not cut up for less.
const imageBlock = 2 << 20

// fileSegments describes a sparse file of size bytes.
func fileSegments(f *memFile, size int64) ([]segment, error) {
	var list []segment
	for at := int64(0); at < size; {
		data, err := unix.Seek(f.fd, at, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			data = size // nothing but a hole
		case err != nil:
			return nil, fmt.Errorf("guest memory: look for holes: %w", err)
		}
		data = min(max(data, at), size)
		if start := data &^ (imageBlock - 1); start > at {
			list = join(list, segment{off: at, length: start - at})
			at = start
		}
		if at < size && data < size {
			end := min((at|(imageBlock-1))+1, size)
			list = join(list, segment{off: at, length: end - at, file: f, pos: at})
			at = end
		} else if data == size && at < size {
			list = join(list, segment{off: at, length: size - at})
			at = size
		}
	}
	return list, nil
}

// join appends s to list, to its last segment if it goes on there.
func join(list []segment, s segment) []segment {
	if s.length == 0 {
		return list
	}
	if n := len(list); n > 0 {
		l := &list[n-1]
		if l.file == s.file && l.end() == s.off && (s.file == nil || l.pos+l.length == s.pos) {
			l.length += s.length
			return list
		}
	}
	return append(list, s)
}

// slice are the segments of [off, off+length), cut to fit.
func (im *image) slice(off, length int64) []segment {
	var list []segment
	for _, s := range im.segments {
		from, to := max(s.off, off), min(s.end(), off+length)
		if from >= to {
			continue
		}
		c := segment{off: from, length: to - from, file: s.file}
		if s.file != nil {
			c.pos = s.pos + from - s.off
		}
		list = append(list, c)
	}
	return list
}

// over lays the upper segments, in order and without overlap, over im's.
func (im *image) over(upper []segment) []segment {
	var list []segment
	at := int64(0)
	for _, u := range upper {
		for _, s := range im.slice(at, u.off-at) {
			list = join(list, s)
		}
		list = join(list, u)
		at = u.end()
	}
	for _, s := range im.slice(at, im.size-at) {
		list = join(list, s)
	}
	return list
}

// writeFile writes the image into the sparse file f: holes stay holes.
func (im *image) writeFile(f interface {
	io.WriterAt
	Truncate(int64) error
}) error {
	if err := f.Truncate(im.size); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for _, s := range im.segments {
		if s.file == nil {
			continue
		}
		if err := s.copyTo(f, buf); err != nil {
			return err
		}
	}
	return nil
}

// copyTo writes the segment's data, less its holes and pages of zeros, at its
// place in w.
func (s segment) copyTo(w io.WriterAt, buf []byte) error {
	for at := s.pos; at < s.pos+s.length; {
		data, err := unix.Seek(s.file.fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		hole, err := unix.Seek(s.file.fd, data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		for at = data; at < min(hole, s.pos+s.length); {
			n, err := unix.Pread(s.file.fd, buf[:min(int64(len(buf)), hole-at, s.pos+s.length-at)], at)
			if err != nil {
				return err
			}
			if n == 0 {
				return io.ErrUnexpectedEOF
			}
			if err := writePages(w, buf[:n], s.off+at-s.pos); err != nil {
				return err
			}
			at += int64(n)
		}
	}
	return nil
}

// writePages writes p at off, but for the pages that are zero.
func writePages(w io.WriterAt, p []byte, off int64) error {
	var zero [pageSize]byte
	for len(p) > 0 {
		n := 0
		for n < len(p) && !bytes.Equal(p[n:min(n+pageSize, len(p))], zero[:min(pageSize, len(p)-n)]) {
			n = min(n+pageSize, len(p))
		}
		if n > 0 {
			if _, err := w.WriteAt(p[:n], off); err != nil {
				return err
			}
		}
		n = min(n+pageSize, len(p)) // and past the page of zeros
		p, off = p[n:], off+int64(n)
	}
	return nil
}
