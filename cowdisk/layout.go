package cowdisk

import (
	"bytes"
	"encoding/binary"
)

// sectorSize is the unit of the bitmap. Every layout stores it; no program ever wrote another value.
const sectorSize = 512

// unitSize is the allocation unit: one bitmap byte. UML's ubd driver misreads a page in which overlay and backing sectors mix, so a first
// write to part of a unit copies the rest of it up.
const (
	unitSize    = 4096
	unitSectors = unitSize / sectorSize
)

// maxDiskSize, 8 PiB, keeps every offset inside an int64 and the table of bitmap pages, 8 bytes per 8 GiB, below 8 MiB whatever a header
// claims.
const maxDiskSize = 8 << 50

const (
	magic           = 0x4f4f4f4d // "OOOM", big-endian
	maxHeaderBytes  = 4136
	defaultAlign    = 4096
	maxAlign        = 1 << 20
	standaloneV3    = "/dev/null" // v3 must not have an empty path (it would look like v3-broken); an empty file reads as zeros
	noField         = -1
	sizeRecordMagic = "moovmBSZ"
)

// layout is one row of the table of on-disk headers: where each field lies.
type layout struct {
	version    uint32
	pathOff    int
	pathLen    int
	mtimeOff   int
	sizeOff    int
	sectorOff  int
	alignOff   int // noField before v3
	formatOff  int // noField before v3
	header     int // bytes
	pads       [][2]int
	hostEndian bool // v1: written in the byte order of the machine
	readOnly   bool
	uml        bool // UML's bitmap length and its rule that the base's size is the disk's
}

// layouts is indexed by Variant.
var layouts = [numVariants]layout{
	QEMUV2:        {version: 2, pathOff: 8, pathLen: 1024, mtimeOff: 1032, sizeOff: 1040, sectorOff: 1048, alignOff: noField, formatOff: noField, header: 1056, pads: [][2]int{{1036, 1040}, {1052, 1056}}},
	QEMUV2i386:    {version: 2, pathOff: 8, pathLen: 1024, mtimeOff: 1032, sizeOff: 1036, sectorOff: 1044, alignOff: noField, formatOff: noField, header: 1048},
	UMLV1:         {version: 1, pathOff: 8, pathLen: 256, mtimeOff: 264, sizeOff: 268, sectorOff: 276, alignOff: noField, formatOff: noField, header: 280, hostEndian: true, uml: true},
	UMLV2:         {version: 2, pathOff: 8, pathLen: 4096, mtimeOff: 4104, sizeOff: 4108, sectorOff: 4116, alignOff: noField, formatOff: noField, header: 4120, uml: true},
	UMLV3:         {version: 3, pathOff: 32, pathLen: 4096, mtimeOff: 8, sizeOff: 12, sectorOff: 20, alignOff: 24, formatOff: 28, header: 4128, uml: true},
	UMLV3Broken:   {version: 3, pathOff: 36, pathLen: 4096, mtimeOff: 8, sizeOff: 16, sectorOff: 24, alignOff: 28, formatOff: 32, header: 4136, pads: [][2]int{{12, 16}}, uml: true},
	UMLV1Unpacked: {version: 1, pathOff: 8, pathLen: 256, mtimeOff: 264, sizeOff: 272, sectorOff: 280, alignOff: noField, formatOff: noField, header: 288, pads: [][2]int{{268, 272}, {284, 288}}, hostEndian: true, readOnly: true, uml: true},
	UMLV2Unpacked: {version: 2, pathOff: 8, pathLen: 4096, mtimeOff: 4104, sizeOff: 4112, sectorOff: 4120, alignOff: noField, formatOff: noField, header: 4128, pads: [][2]int{{4108, 4112}, {4124, 4128}}, readOnly: true, uml: true},
}

// Header is what an image's header says.
type Header struct {
	Variant      Variant
	LittleEndian bool   // v1 only
	Backing      string // as stored; "" = standalone
	MTime        uint32 // of the backing file, seconds; 0 = unknown
	Size         int64  // bytes, as stored (possibly no multiple of 512)
	SectorSize   int
	Alignment    int64 // v3; 0 otherwise
	// BackingSize is the backing file's size, recorded (HasBackingSize) when it is not Size: in the last 16 bytes of the path's field,
	// which every other program ignores.
	BackingSize    int64
	HasBackingSize bool
	// BackingFormat says how the backing file is meant; FormatUnknown in images that other programs made. It lies right behind the path's
	// NUL, which every other program ignores, and where a path that another program writes over this one leaves no mark of ours.
	BackingFormat Format
}

func (h *Header) order() binary.ByteOrder {
	if h.LittleEndian {
		return binary.LittleEndian
	}
	return binary.BigEndian
}

// Sectors is the number of sectors of the disk; a size that is no multiple of 512 is rounded up so that the tail is never lost.
func (h *Header) Sectors() int64 { return (h.Size + sectorSize - 1) / sectorSize }

// DiskSize is the size in bytes that a guest sees: Size rounded up to whole sectors.
func (h *Header) DiskSize() int64 { return h.Sectors() * sectorSize }

// BitmapOffset is where the bitmap begins in the file.
func (h *Header) BitmapOffset() int64 {
	l := &layouts[h.Variant]
	if l.alignOff == noField {
		return int64(l.header)
	}
	return roundUp(int64(l.header), h.Alignment)
}

// BitmapBytes is the length of the bitmap.
func (h *Header) BitmapBytes() int64 {
	switch h.Variant {
	case QEMUV2, QEMUV2i386:
		return (h.Size/sectorSize + 7) / 8
	case UMLV3, UMLV3Broken:
		return (h.Sectors() + 7) / 8
	default: // the v1 and v2 rounding bug: up to 7 last sectors have no bit
		return (h.Size + sectorSize - 1) / (8 * sectorSize)
	}
}

// DataOffset is where sector 0 lies.
func (h *Header) DataOffset() int64 {
	end := h.BitmapOffset() + h.BitmapBytes()
	if layouts[h.Variant].alignOff != noField {
		return roundUp(end, h.Alignment)
	}
	return roundUp(end, sectorSize)
}

// freshBytes is how long a file is when it is made: what the layout's own programs do.
func (h *Header) freshBytes() int64 {
	if layouts[h.Variant].uml {
		return h.DataOffset() + h.Size
	}
	return h.BitmapOffset() + h.BitmapBytes()
}

func roundUp(n, a int64) int64 { return (n + a - 1) / a * a }

// encode writes the fields into b, which holds either zeros or the previous header; bytes that are no field, and those after the path's
// NUL, stay as they are.
func (h *Header) encode(b []byte) {
	l := &layouts[h.Variant]
	o := h.order()
	o.PutUint32(b[0:], magic)
	o.PutUint32(b[4:], l.version)
	o.PutUint32(b[l.mtimeOff:], h.MTime)
	o.PutUint64(b[l.sizeOff:], uint64(h.Size))
	o.PutUint32(b[l.sectorOff:], uint32(h.SectorSize))
	if l.alignOff != noField {
		o.PutUint32(b[l.alignOff:], uint32(h.Alignment))
		o.PutUint32(b[l.formatOff:], 0)
	}
	path := b[l.pathOff : l.pathOff+l.pathLen]
	old := cString(path)
	oldMark := formatMark(path, len(old))
	if old != h.Backing || oldMark != h.BackingFormat || b[l.pathOff] == 0 {
		end := min(len(old)+1+len(formatMarks[oldMark]), l.pathLen)
		n := copy(path, h.Backing+"\x00"+formatMarks[h.BackingFormat])
		clear(path[n:max(n, end)])
	}
	rec := path[l.pathLen-16:]
	if h.HasBackingSize {
		copy(rec, sizeRecordMagic)
		binary.BigEndian.PutUint64(rec[8:], uint64(h.BackingSize))
	} else if string(rec[:8]) == sizeRecordMagic {
		clear(rec)
	}
}

// formatMarks are what follows the path's NUL, by format.
var formatMarks = [...]string{FormatUnknown: "", FormatRaw: "moovmRAW", FormatCOW: "moovmCOW"}

// formatMark finds the mark behind a path of n bytes in its field.
func formatMark(path []byte, n int) Format {
	if n == 0 || n >= len(path) {
		return FormatUnknown
	}
	for f := FormatRaw; int(f) < len(formatMarks); f++ {
		if bytes.HasPrefix(path[n+1:], []byte(formatMarks[f])) {
			return f
		}
	}
	return FormatUnknown
}

// maxPath is the longest backing path the header can hold.
func (h *Header) maxPath() int {
	n := layouts[h.Variant].pathLen - 1 - len(formatMarks[h.BackingFormat])
	if h.HasBackingSize {
		n -= 16
	}
	return n
}

func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// decode reads b as layout v. It reports false when the fields cannot be those of that layout.
func decode(b []byte, v Variant, little bool) (Header, bool) {
	l := &layouts[v]
	if len(b) < l.header {
		return Header{}, false
	}
	h := Header{Variant: v, LittleEndian: little}
	o := h.order()
	size := o.Uint64(b[l.sizeOff:])
	ss := o.Uint32(b[l.sectorOff:])
	if ss != sectorSize || size < sectorSize || size > maxDiskSize {
		return Header{}, false
	}
	h.Size, h.SectorSize = int64(size), int(ss)
	h.MTime = o.Uint32(b[l.mtimeOff:])
	if l.alignOff != noField {
		a := o.Uint32(b[l.alignOff:])
		if a == 0 || a > maxAlign || a&(a-1) != 0 || o.Uint32(b[l.formatOff:]) != 0 {
			return Header{}, false
		}
		h.Alignment = int64(a)
	}
	path := b[l.pathOff : l.pathOff+l.pathLen]
	h.Backing = cString(path)
	if !standalone(h.Backing) {
		h.BackingFormat = formatMark(path, len(h.Backing))
	}
	if rec := path[l.pathLen-16:]; string(rec[:8]) == sizeRecordMagic && len(h.Backing) < l.pathLen-16 {
		if n := binary.BigEndian.Uint64(rec[8:]); n <= maxDiskSize {
			h.BackingSize, h.HasBackingSize = int64(n), true
		}
	}
	return h, true
}

// padsZero reports whether the bytes that compilers put between the fields are zero, as every writer left them.
func padsZero(b []byte, v Variant) bool {
	for _, p := range layouts[v].pads {
		for _, c := range b[p[0]:p[1]] {
			if c != 0 {
				return false
			}
		}
	}
	return true
}
