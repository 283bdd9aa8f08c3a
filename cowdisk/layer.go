package cowdisk

import "fmt"

// layer is one file of a chain: an image, or the raw file or device at the bottom.
type layer struct {
	// What every request needs, in one cache line.
	file File
	bm   *bitmap // nil: raw
	data int64   // where sector 0 lies in file
	size int64   // bytes of disk

	path   string // as opened
	real   string // absolute, symlinks followed
	named  bool   // by the user, not by a header
	id     FileID
	seen   FileInfo // when it was opened
	hdr    Header   // image only
	raw    []byte   // the header's bytes, image only
	backer string   // resolved backing path; "" = none
	write  bool
}

// image makes l, whose file is open and has size bytes, the image that h describes and whose header's bytes raw begins with. When the file
// ends inside the bitmap (ErrTruncated) only the bitmap is missing from l.
func (l *layer) image(h Header, raw []byte, size, memory int64) error {
	l.hdr, l.raw = h, raw[:layouts[h.Variant].header]
	l.size, l.data = h.DiskSize(), h.DataOffset()
	if need := h.BitmapOffset() + h.BitmapBytes(); need > size {
		return &Error{Path: l.path, Field: "bitmap", Kind: ErrTruncated, Detail: fmt.Sprintf("%d bytes, header and bitmap of a %d-byte disk need %d", size, h.Size, need), Remedy: "restore it from a copy"}
	}
	l.bm = newBitmap(l.file, l.path, &l.hdr, memory)
	return nil
}

// asBacking is what the header of an overlay on l keeps of it; mtime is its file's.
func (l *layer) asBacking(mtime uint32) backingInfo {
	if l.bm == nil {
		return backingInfo{size: l.size, mtime: mtime, real: l.real, format: FormatRaw}
	}
	return backingInfo{size: l.hdr.Size, mtime: mtime, real: l.real, format: FormatCOW}
}

// newImage writes an empty image into f, which is all holes but for the header, and is the layer of it. What is in raw, nil or the header
// of the image it stands in for, stays between the fields.
func newImage(f File, path, real string, h Header, raw []byte, memory int64) (*layer, error) {
	b := make([]byte, layouts[h.Variant].header)
	copy(b, raw)
	h.encode(b)
	if err := writeFull(f, b, 0); err != nil {
		return nil, err
	}
	if err := f.Truncate(h.freshBytes()); err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	l := &layer{path: path, real: real, file: f, id: st.ID}
	return l, l.image(h, b, st.Size, memory)
}
