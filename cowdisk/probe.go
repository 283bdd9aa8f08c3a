package cowdisk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Probe reads the header of an image of size bytes and says which layout it is. It looks at nothing but r, so a tie that only the backing
// file can break is ErrAmbiguous here; [Open] goes on to compare the candidates with the backing file.
// Errors: ErrNotCOW, ErrVersion, ErrTruncated, ErrHeader, ErrSize, ErrAmbiguous.
func Probe(r io.ReaderAt, size int64) (Header, error) {
	c, _, err := candidates(r, size, "image")
	if err != nil {
		return Header{}, err
	}
	if len(c) > 1 {
		return Header{}, ambiguous("image", c)
	}
	return c[0], nil
}

// probe reads the header of l's file, which has size bytes, and says which layout it is and what its bytes are. Of several candidates the
// one whose backing file is as it says is taken.
func (op *opener) probe(l *layer, size int64) (Header, []byte, error) {
	c, b, err := candidates(l.file, size, l.path)
	if err != nil {
		return Header{}, nil, err
	}
	if len(c) > 1 {
		if c = op.compareBacking(c, l); len(c) > 1 {
			return Header{}, nil, ambiguous(l.path, c)
		}
	}
	return c[0], b, nil
}

// compareBacking breaks a tie between layouts: size and time of the backing file as the right header has them.
func (op *opener) compareBacking(c []Header, l *layer) []Header {
	var match []Header
	for _, h := range c {
		t := *l
		t.hdr = h
		if standalone(h.Backing) {
			continue
		}
		f, _, _, err := op.openBacking(&t, len(op.layers) == 1)
		if err != nil {
			continue
		}
		st, err := f.Stat()
		f.Close()
		if err == nil && st.mtime32() == h.MTime && (st.Size+sectorSize-1)/sectorSize == h.Sectors() {
			match = append(match, h)
		}
	}
	if len(match) > 0 {
		return match
	}
	return c
}

func ambiguous(path string, c []Header) error {
	names := make([]string, len(c))
	for i := range c {
		names[i] = c[i].Variant.String()
	}
	return &Error{Path: path, Field: "header", Kind: ErrAmbiguous, Detail: strings.Join(names, ", "), Remedy: "put its backing file back in place, whose size and time tell the layouts apart"}
}

// isCOW reports whether b, the first bytes of a file, carries the magic of a COW image.
func isCOW(b []byte) bool {
	return len(b) >= 4 && (binary.BigEndian.Uint32(b) == magic || binary.LittleEndian.Uint32(b) == magic)
}

// candidates reads the header and returns every layout it can be, at least one, and the header's bytes (up to maxHeaderBytes of them).
func candidates(r io.ReaderAt, size int64, path string) ([]Header, []byte, error) {
	b := make([]byte, min(maxHeaderBytes, max(size, 0)))
	n, err := r.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("%s: reading the header: %w", path, err)
	}
	b = b[:n]
	if !isCOW(b) {
		if err := knownForeign(b, path); err != nil {
			return nil, nil, err
		}
		return nil, nil, &Error{Path: path, Kind: ErrNotCOW, Detail: "no MOOO magic at its start", Remedy: "if it is a raw disk, open it as one or make an overlay on it with create -b"}
	}
	little := binary.LittleEndian.Uint32(b) == magic
	if len(b) < 8 {
		return nil, nil, &Error{Path: path, Field: "header", Kind: ErrTruncated, Detail: fmt.Sprintf("%d bytes", len(b)), Remedy: "restore it from a copy"}
	}
	h := Header{LittleEndian: little}
	version := h.order().Uint32(b[4:])
	if version < 1 || version > 3 || (little && version != 1) {
		return nil, nil, &Error{Path: path, Field: "version", Kind: ErrVersion, Detail: fmt.Sprintf("%d; versions 1, 2 and 3 are known", version), Remedy: "check that this is a COW image of UML or QEMU"}
	}
	var found []Header
	short := 0
	for v := QEMUV2; v < numVariants; v++ {
		l := &layouts[v]
		if l.version != version {
			continue
		}
		if len(b) < l.header {
			short = l.header
			continue
		}
		if h, ok := decode(b, v, little); ok {
			found = append(found, h)
		}
	}
	switch {
	case len(found) > 1:
		return narrow(found, b, size), b, nil
	case len(found) == 1:
		return found, b, nil
	}
	if err := explain(b, version, little, path); err != nil {
		return nil, nil, err
	}
	if short != 0 {
		if len(b) >= layouts[QEMUV2].header { // long enough for one layout, too short for another: no telling which it was
			e := sectorError(path)
			e.Err = ErrTruncated
			return nil, nil, e
		}
		return nil, nil, &Error{Path: path, Field: "header", Kind: ErrTruncated, Detail: fmt.Sprintf("%d bytes, a version %d header needs up to %d", len(b), version, short), Remedy: "restore it from a copy"}
	}
	return nil, nil, sectorError(path)
}

func sectorError(path string) *Error {
	return &Error{Path: path, Field: "sector size", Kind: ErrHeader, Detail: "not 512 in any layout of this version", Remedy: "restore it from a copy"}
}

// narrow breaks ties between layouts: pads that every writer left zero, and a bitmap that must fit into the file.
func narrow(c []Header, b []byte, size int64) []Header {
	keep := func(ok func(h *Header) bool) {
		var k []Header
		for i := range c {
			if ok(&c[i]) {
				k = append(k, c[i])
			}
		}
		if len(k) > 0 {
			c = k
		}
	}
	keep(func(h *Header) bool { return padsZero(b, h.Variant) })
	keep(func(h *Header) bool { return h.BitmapOffset()+h.BitmapBytes() <= size })
	// v3: the broken layout's format field lies where the good one's path begins, and is zero.
	keep(func(h *Header) bool {
		return layouts[h.Variant].version != 3 || (h.Variant == UMLV3Broken) == (binary.BigEndian.Uint32(b[32:]) == 0)
	})
	return c
}

// explain says why a header with good magic and version fits no layout.
func explain(b []byte, version uint32, little bool, path string) error {
	for v := QEMUV2; v < numVariants; v++ {
		l := &layouts[v]
		if l.version != version || len(b) < l.header {
			continue
		}
		h := Header{Variant: v, LittleEndian: little}
		o := h.order()
		if o.Uint32(b[l.sectorOff:]) != sectorSize {
			continue
		}
		if n := o.Uint64(b[l.sizeOff:]); n < sectorSize || n > maxDiskSize {
			return &Error{Path: path, Field: "size", Kind: ErrSize, Detail: fmt.Sprintf("%d bytes", n), Remedy: "a disk has at least one sector of 512 bytes and at most 8 PiB"}
		}
		if l.alignOff == noField {
			continue
		}
		return &Error{Path: path, Field: "alignment", Kind: ErrHeader, Detail: fmt.Sprintf("alignment %d, format %d", o.Uint32(b[l.alignOff:]), o.Uint32(b[l.formatOff:])), Remedy: "restore it from a copy"}
	}
	return nil
}
