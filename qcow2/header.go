package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"strings"
)

// Magic is what every qcow2 (and qcow) image begins with.
const Magic = "QFI\xfb"

const (
	headerV2      = 72
	headerV3      = 104
	minCluster    = 9
	maxCluster    = 21 // QEMU's limit, too
	minExtCluster = 14
	maxL1Bytes    = 32 << 20 // QEMU's limit, too
	maxBackingLen = 1023
)

// Incompatible features (QEMU, docs/interop/qcow2.txt, bytes 72-79).
const (
	featDirty = 1 << iota
	featCorrupt
	featExternal
	featCompression
	featExtendedL2
)

// Header extensions that are looked at.
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
)

// Compression is how compressed clusters are packed.
type Compression uint8

// The compression types of the format.
const (
	Zlib Compression = 0 // raw deflate
	Zstd Compression = 1
)

// String is the name that qemu-img knows.
func (c Compression) String() string {
	switch c {
	case Zlib:
		return "zlib"
	case Zstd:
		return "zstd"
	}
	return fmt.Sprintf("compression type %d", uint8(c))
}

// Header is what an image says about itself.
type Header struct {
	Version       int    // 2 or 3
	Size          int64  // of the disk, in bytes
	ClusterSize   int64  // bytes, 512 to 2 MiB
	Backing       string // the backing file's name as the image has it, not to be trusted; "" = none
	BackingFormat string // "" = not said
	Compression   Compression
	ExtendedL2    bool // clusters are divided into 32 subclusters
	Snapshots     int  // inside the image; they are not read

	clusterBits uint
	l1Offset    int64
	l1Size      int64 // entries
	incompat    uint64
	crypt       uint32
}

// ReadHeader reads the header of the image in f, which has size bytes, without opening it: what the image says, also of one that Open
// refuses because it is encrypted, dirty, marked as corrupt, incomplete or has unknown features. name is for errors.
//
// Errors: ErrNotQCOW2, ErrVersion, ErrHeader, ErrTruncated, ErrRead.
func ReadHeader(f io.ReaderAt, size int64, name string) (Header, error) {
	h, _, err := readHeader(f, size, name)
	return h, err
}

// readHeader also returns the first cluster, as far as the file has it.
func readHeader(f io.ReaderAt, size int64, name string) (Header, []byte, error) {
	fail := func(field string, kind error, detail, remedy string) (Header, []byte, error) {
		return Header{}, nil, &Error{Name: name, Field: field, Kind: kind, Detail: detail, Remedy: remedy}
	}
	var fixed [headerV3 + 8]byte
	n := min(size, int64(len(fixed)))
	if err := readExact(f, fixed[:max(n, 0)], 0); err != nil {
		return Header{}, nil, &Error{Name: name, Field: "header", Kind: ErrRead, Err: err}
	}
	be := binary.BigEndian
	if n < 8 || string(fixed[:4]) != Magic {
		return fail("magic", ErrNotQCOW2, "", "")
	}
	h := Header{Version: int(be.Uint32(fixed[4:]))}
	length := int64(headerV2)
	switch h.Version {
	case 2:
	case 3:
		length = headerV3
	default:
		return fail("version", ErrVersion, fmt.Sprint(uint32(h.Version)), "convert it: qemu-img convert -O qcow2 OLD NEW")
	}
	if n < length {
		return fail("header", ErrTruncated, fmt.Sprintf("%d bytes, a header of version %d has %d", size, h.Version, length), "get it anew")
	}
	h.clusterBits = uint(be.Uint32(fixed[20:]))
	if h.clusterBits < minCluster || h.clusterBits > maxCluster {
		return fail("cluster_bits", ErrHeader, fmt.Sprintf("%d, must be %d to %d", h.clusterBits, minCluster, maxCluster), "get it anew")
	}
	h.ClusterSize = 1 << h.clusterBits
	disk := be.Uint64(fixed[24:])
	if disk > math.MaxInt64-uint64(h.ClusterSize) {
		return fail("size", ErrHeader, fmt.Sprint(disk), "get it anew")
	}
	h.Size, h.crypt = int64(disk), be.Uint32(fixed[32:])
	h.l1Size, h.Snapshots = int64(be.Uint32(fixed[36:])), int(be.Uint32(fixed[60:]))
	l1 := be.Uint64(fixed[40:])
	if l1 > math.MaxInt64 || int64(l1)%h.ClusterSize != 0 {
		return fail("l1_table_offset", ErrHeader, fmt.Sprintf("%d, must be a multiple of the cluster size %d", l1, h.ClusterSize), "get it anew")
	}
	h.l1Offset = int64(l1)
	if h.Version == 3 {
		h.incompat = be.Uint64(fixed[72:])
		length = int64(be.Uint32(fixed[100:]))
		if length < headerV3 || length%8 != 0 || length > min(h.ClusterSize, size) {
			return fail("header_length", ErrHeader, fmt.Sprint(length), "get it anew")
		}
		if length > headerV3 {
			h.Compression = Compression(fixed[headerV3])
		}
		h.ExtendedL2 = h.incompat&featExtendedL2 != 0
		if h.ExtendedL2 && h.clusterBits < minExtCluster {
			return fail("cluster_bits", ErrHeader, fmt.Sprintf("%d, extended L2 entries need %d", h.clusterBits, minExtCluster), "get it anew")
		}
	}
	first := make([]byte, min(h.ClusterSize, size))
	if err := readExact(f, first, 0); err != nil {
		return Header{}, nil, &Error{Name: name, Field: "header", Kind: ErrRead, Err: err}
	}
	return h, first, h.readNames(first, length, name)
}

// readNames reads what follows the header in the first cluster: the extensions from length on, and the backing file's name.
func (h *Header) readNames(first []byte, length int64, name string) error {
	be := binary.BigEndian
	end := uint64(len(first))
	if off := be.Uint64(first[8:]); off != 0 {
		n := uint64(be.Uint32(first[16:]))
		if n > maxBackingLen || off < uint64(length) || off > end || n > end-off {
			return &Error{Name: name, Field: "backing_file_offset", Kind: ErrHeader, Detail: fmt.Sprintf("%d bytes at %d", n, off), Remedy: "get it anew"}
		}
		h.Backing = string(first[off : off+n])
		end = off
	}
	return extensions(first[length:end], func(kind uint32, data []byte) {
		if kind == extBackingFormat {
			h.BackingFormat = string(data)
		}
	}, name)
}

// extensions calls f for the header extensions in b.
func extensions(b []byte, f func(kind uint32, data []byte), name string) error {
	for len(b) >= 8 {
		kind, n := binary.BigEndian.Uint32(b), uint64(binary.BigEndian.Uint32(b[4:]))
		if kind == extEnd {
			return nil
		}
		b = b[8:]
		if n > uint64(len(b)) {
			return &Error{Name: name, Field: "header extension", Kind: ErrHeader, Detail: fmt.Sprintf("type %#x of %d bytes, %d are left", kind, n, len(b)), Remedy: "get it anew"}
		}
		f(kind, b[:n])
		b = b[min((n+7)&^7, uint64(len(b))):]
	}
	return nil
}

// usable says why the disk cannot be read, if it cannot.
func (h *Header) usable(first []byte, name string, backing bool) error {
	fail := func(field string, kind error, detail, remedy string) error {
		return &Error{Name: name, Field: field, Kind: kind, Detail: detail, Remedy: remedy}
	}
	known := uint64(featDirty | featCorrupt | featExternal | featCompression | featExtendedL2)
	switch {
	case h.crypt != 0:
		return fail("crypt_method", ErrEncrypted, fmt.Sprint(h.crypt), "convert it with its key: qemu-img convert --object secret,… --image-opts … -O raw")
	case h.incompat&featExternal != 0:
		return fail("incompatible_features", ErrExternalData, "", "make it one file: qemu-img convert -O qcow2 OLD NEW")
	case h.incompat&^known != 0:
		return fail("incompatible_features", ErrFeature, h.unknown(first, known), "convert it with a program that knows it: qemu-img convert -O raw OLD NEW")
	case h.incompat&featCorrupt != 0:
		return fail("incompatible_features", ErrMarked, "", "mend it: qemu-img check -r all "+name)
	case h.incompat&featDirty != 0:
		return fail("incompatible_features", ErrDirty, "", "close the program that has it open; if none has, mend it: qemu-img check -r all "+name)
	case h.Compression > Zstd:
		return fail("compression_type", ErrFeature, h.Compression.String(), "convert it: qemu-img convert -O qcow2 OLD NEW")
	case (h.Compression != Zlib) != (h.incompat&featCompression != 0):
		return fail("compression_type", ErrHeader, h.Compression.String()+" contradicts incompatible_features", "get it anew")
	case h.Backing != "" && !backing:
		return fail("backing file", ErrBacking, fmt.Sprintf("%q, which is not followed", h.Backing), "make it one file: qemu-img convert -O qcow2 OLD NEW")
	}
	return nil
}

// unknown lists the incompatible features beyond known, by the names that the image has for them.
func (h *Header) unknown(first []byte, known uint64) string {
	names := map[int]string{}
	end := uint64(len(first))
	if off := binary.BigEndian.Uint64(first[8:]); off != 0 {
		end = off
	}
	_ = extensions(first[binary.BigEndian.Uint32(first[100:]):end], func(kind uint32, data []byte) {
		const entry = 48
		for ; kind == extFeatureNames && len(data) >= entry; data = data[entry:] {
			if data[0] == 0 {
				names[int(data[1])] = string(bytes.TrimRight(data[2:entry], "\x00"))
			}
		}
	}, "") // readNames has been through them
	var list []string
	for bit := range 64 {
		if h.incompat&^known&(1<<bit) == 0 {
			continue
		}
		s := fmt.Sprintf("bit %d", bit)
		if n := names[bit]; n != "" {
			s += fmt.Sprintf(" %q", n)
		}
		list = append(list, s)
	}
	return strings.Join(list, ", ")
}

// readExact fills p; the end of the file before that is io.ErrUnexpectedEOF.
func readExact(f io.ReaderAt, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || err == io.EOF:
		return io.ErrUnexpectedEOF
	}
	return err
}

// readZeros fills p; what lies beyond the end of the file reads as zeros.
func readZeros(f io.ReaderAt, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == io.EOF {
		clear(p[n:])
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress // against the contract of io.ReaderAt
	}
	return err
}
