package vmm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Which pages of a private mapping are its own is told by /proc/self/pagemap
// (Documentation/admin-guide/mm/pagemap.rst): present or swapped, and not of a
// file.

const (
	pagemapPresent = 1 << 63
	pagemapSwapped = 1 << 62
	pagemapFile    = 1 << 61
)

// private lists the runs of pages, by place in the file, that the machine has
// written since the image that it shows; r.mu is held. Where the host cannot
// tell it is all of the memory.
func (r *ram) private() []segment {
	var runs, whole []segment
	told := true
	for i, reg := range r.regions {
		whole = append(whole, segment{off: r.offsets[i], length: int64(len(reg.Bytes))})
		told = told && eachPrivate(reg.Bytes, func(page, n int64) {
			runs = append(runs, segment{off: r.offsets[i] + page*pageSize, length: n * pageSize})
		})
	}
	if !told {
		return whole
	}
	return runs
}

// eachPrivate calls f with runs of the pages of mem, by number and count, that
// are not those of the file that it maps. False means that the host did not
// tell, or not of all.
func eachPrivate(mem []byte, f func(page, n int64)) bool {
	pm, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return false
	}
	defer pm.Close()
	buf := make([]byte, 64<<10)
	first, pages := pageOf(mem), int64(len(mem)/pageSize)
	run := int64(0)
	for done := int64(0); done < pages; {
		n, _ := pm.ReadAt(buf[:min(int64(len(buf)), 8*(pages-done))], 8*(first+done))
		if n < 8 {
			return false
		}
		for e := buf[:n&^7]; len(e) > 0; e = e[8:] {
			v := binary.LittleEndian.Uint64(e)
			if v&(pagemapPresent|pagemapSwapped) != 0 && v&pagemapFile == 0 {
				run++
			} else {
				if run > 0 {
					f(done-run, run)
				}
				run = 0
			}
			done++
		}
	}
	if run > 0 {
		f(pages-run, run)
	}
	return true
}

// maxSegments bounds the mappings that an image costs (a process has some
// 65 000 of them).
const maxSegments = 1024

// freezePrivate copies the pages that the machine has written into a file of
// their own; r.mu is held. What the memory maps stays as it is: those pages
// are the machine's own already.
func (r *ram) freezePrivate() (_ *image, err error) {
	runs := r.private()
	if len(runs) == 0 {
		return newImage(r.size, r.image.segments), nil
	}
	runs = coalesce(runs, maxSegments)
	f, err := newPages()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.release()) }()
	pos := int64(0)
	for i := range runs {
		runs[i].file, runs[i].pos = f, pos
		if err := r.copyOut(runs[i]); err != nil {
			return nil, fmt.Errorf("guest memory: copy %d bytes: %w", runs[i].length, err)
		}
		pos += runs[i].length
	}
	segments := r.image.over(runs)
	if len(segments) > 4*maxSegments {
		return r.freezeWhole(segments)
	}
	return newImage(r.size, segments), f.seal()
}

// freezeWhole copies all of the memory that these segments hold: an image
// whose generations have cut it into too many pieces starts anew.
func (r *ram) freezeWhole(segments []segment) (_ *image, err error) {
	f, err := newPages()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.release()) }()
	if err := unix.Ftruncate(f.fd, r.size); err != nil {
		return nil, fmt.Errorf("guest memory: %w", err)
	}
	for _, s := range segments {
		if s.file == nil {
			continue
		}
		if err := r.copyOut(segment{off: s.off, length: s.length, file: f, pos: s.off}); err != nil {
			return nil, fmt.Errorf("guest memory: copy %d bytes: %w", s.length, err)
		}
	}
	if segments, err = fileSegments(f, r.size); err != nil {
		return nil, err
	}
	return newImage(r.size, segments), f.seal()
}

// newPages makes a memory file; the caller releases it.
func newPages() (*memFile, error) {
	fd, err := memfd("moovm-pages", false)
	if err != nil {
		return nil, fmt.Errorf("guest memory: memfd_create: %w", err)
	}
	f := &memFile{fd: fd}
	f.refs.Store(1)
	return f, nil
}

// seal makes a memory file immutable. It fails while anybody can write to a
// mapping of it.
func (f *memFile) seal() error {
	if err := sealMemfd(f.fd); err != nil {
		return fmt.Errorf("guest memory: seal a memory file: %w", err)
	}
	return nil
}

// copyOut writes the memory of a segment into the segment's file.
func (r *ram) copyOut(s segment) error {
	for i, reg := range r.regions {
		from, to := max(s.off, r.offsets[i]), min(s.end(), r.offsets[i]+int64(len(reg.Bytes)))
		for at := from; at < to; {
			n, err := unix.Pwrite(s.file.fd, reg.Bytes[at-r.offsets[i]:to-r.offsets[i]], s.pos+at-s.off)
			if err != nil {
				return err
			}
			at += int64(n)
		}
	}
	return nil
}

// coalesce joins runs across small gaps, and ever larger ones until there are
// no more than limit.
func coalesce(runs []segment, limit int) []segment {
	for gap := int64(0); ; gap = max(2*gap, 8*pageSize) {
		out := runs[:1:1]
		for _, s := range runs[1:] {
			if l := &out[len(out)-1]; s.off-l.end() <= gap {
				l.length = s.end() - l.off
			} else {
				out = append(out, s)
			}
		}
		if len(out) <= limit {
			return out
		}
		runs = out
	}
}
