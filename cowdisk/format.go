package cowdisk

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

// Format says how the bytes of a file are meant.
type Format int

// Formats. What a guest writes into a raw disk may look like any of them, so a file's own bytes never decide between raw and COW where
// that would let its header name other files: see the package's documentation, "Raw or COW".
const (
	FormatUnknown Format = iota // not said: only what is harmless is accepted
	FormatRaw                   // a disk without a header
	FormatCOW                   // a COW image
)

var formatNames = [...]string{"unknown", "raw", "cow"}

// String is raw, cow or unknown.
func (f Format) String() string {
	if f < 0 || int(f) >= len(formatNames) {
		return fmt.Sprintf("Format(%d)", int(f))
	}
	return formatNames[f]
}

// ParseFormat takes raw or cow.
func ParseFormat(s string) (Format, error) {
	switch s {
	case "raw":
		return FormatRaw, nil
	case "cow":
		return FormatCOW, nil
	}
	return FormatUnknown, fmt.Errorf("%w: format=%s; use format=raw or format=cow", ErrFormat, s)
}

// SplitFormat takes FILE[,format=raw|cow] apart, as command lines have it. Without it, a name that ends in .cow is the user's word that
// the file is an image: no guest can name a file.
func SplitFormat(arg string) (path string, f Format, err error) {
	if i := strings.LastIndex(arg, ",format="); i >= 0 {
		f, err = ParseFormat(arg[i+len(",format="):])
		return arg[:i], f, err
	}
	if strings.HasSuffix(arg, ".cow") {
		return arg, FormatCOW, nil
	}
	return arg, FormatUnknown, nil
}

var (
	// ErrFormat: nobody said whether the file is raw or COW, and to believe its bytes would be dangerous.
	ErrFormat = errors.New("the format must be named")
	// ErrForeign: the file is a disk image or an archive of a kind that is not read here.
	ErrForeign = fmt.Errorf("%w, nor a raw disk", ErrNotCOW)
)

// foreign are the files that people take for raw disks.
var foreign = []struct {
	off         int
	magic, name string
	convert     string
}{
	{0, "QFI\xfb", "a qcow2 image", "qemu-img convert -O raw"},
	{0, "KDMV", "a VMDK image", "qemu-img convert -O raw"},
	{0, "COWD", "a VMDK image", "qemu-img convert -O raw"},
	{0, "# Disk DescriptorFile", "the description of a VMDK image", "qemu-img convert -O raw"},
	{64, "\x7f\x10\xda\xbe", "a VDI image", "qemu-img convert -O raw"},
	{0, "conectix", "a VHD image", "qemu-img convert -O raw"},
	{0, "vhdxfile", "a VHDX image", "qemu-img convert -O raw"},
	{0, "\x1f\x8b\x08", "compressed by gzip", "gunzip"},
	{0, "\xfd7zXZ\x00", "compressed by xz", "unxz"},
	{0, "\x28\xb5\x2f\xfd", "compressed by zstd", "unzstd"},
}

// detect says what f, a file of size bytes whose format nobody named, looks like: COW, or raw, or ErrForeign.
func detect(f File, path string, size int64) (Format, error) {
	b := make([]byte, sectorSize)
	if err := readFull(f, b, 0); err != nil {
		return FormatUnknown, fmt.Errorf("%s: %w", path, err)
	}
	if isCOW(b) {
		return FormatCOW, nil
	}
	if err := knownForeign(b, path); err != nil {
		return FormatUnknown, err
	}
	if size >= 2*sectorSize { // a VHD of fixed size is a raw disk with a footer
		if err := readFull(f, b, size-sectorSize); err != nil {
			return FormatUnknown, fmt.Errorf("%s: %w", path, err)
		}
		if bytes.HasPrefix(b, []byte("conectix")) {
			return FormatUnknown, foreignError(path, "a VHD image of fixed size", "qemu-img convert -f vpc -O raw")
		}
	}
	return FormatRaw, nil
}

// knownForeign is the error for the first bytes b of a file of another kind; nil = they are of none that is known.
func knownForeign(b []byte, path string) error {
	for _, m := range foreign {
		if len(b) > m.off && bytes.HasPrefix(b[m.off:], []byte(m.magic)) {
			return foreignError(path, m.name, m.convert)
		}
	}
	return nil
}

func foreignError(path, what, convert string) error {
	return &Error{Path: path, Kind: ErrForeign, Detail: "it is " + what, Remedy: "make a raw disk of it (" + convert + "); if a guest wrote these bytes into a raw disk, say format=raw"}
}

// unnamedError refuses a file that the user named without a format and that looks like an image: it may be raw.
func unnamedError(path string) error {
	return &Error{Path: path, Kind: ErrFormat, Detail: "it begins like a COW image, which a guest may have written into a raw disk", Remedy: "say format=cow if it is an image, format=raw if it is a disk"}
}

// unmarkedError refuses a base that looks like an image below a header that does not say whether it is one.
func unmarkedError(image, base string) error {
	return &Error{Path: image, Field: "backing file", Kind: ErrFormat, Detail: "the header does not say whether " + base + " is raw or COW, and it begins like a COW image, which a guest may have written", Remedy: "record what it is: rebase -u -b with format=cow or format=raw"}
}
