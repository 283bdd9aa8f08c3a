// Package kernel loads kernels: a distribution's vmlinuz (bzImage with a gzip,
// xz, lz4, zstd, bzip2 or lzma payload) or an ELF vmlinux becomes the ELF image
// that a machine boots, with its release name. Files are not trusted: damage
// costs an error that matches [ErrNotKernel].
package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/moovm/moovm/internal/unpack"
)

// maxKernelFile and maxKernelImage bound what is read and what it may unpack
// to, in bytes. A vmlinux with debug information is about 400 MiB.
const (
	maxKernelFile  = 1 << 30
	maxKernelImage = 1 << 30
)

// ErrNotKernel is in every error about a file that no x86-64 Linux kernel can
// be loaded from.
var ErrNotKernel = errors.New("not a usable kernel")

// A KernelError says why a file cannot be booted. It matches ErrNotKernel.
type KernelError struct {
	Path    string // the file
	Problem string // what it is, or what is wrong with it
	Err     error  // the cause, if there is one
}

func (e *KernelError) Error() string {
	s := "kernel " + e.Path + ": " + e.Problem
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap gives errors.Is both ErrNotKernel and the cause.
func (e *KernelError) Unwrap() []error { return []error{ErrNotKernel, e.Err} }

// A Kernel is an x86-64 Linux kernel as the uncompressed ELF image that a
// machine loads. It is safe for concurrent use until Close.
type Kernel struct {
	// Path is the file it came from.
	Path string
	// Release is the kernel's version as uname -r prints it, such as
	// "6.1.0-18-amd64"; empty when the image does not say.
	Release string
	// Format is how the image was packed: "bzImage (xz)", "ELF", …
	Format string

	r      io.ReaderAt
	size   int64
	file   *os.File // nil when the image is in memory
	elf    string   // path of a file that holds the image
	cached bool
}

// ReadAt reads the ELF image.
func (k *Kernel) ReadAt(p []byte, off int64) (int, error) { return k.r.ReadAt(p, off) }

// Size is the length of the ELF image in bytes.
func (k *Kernel) Size() int64 { return k.size }

// ELFPath is a file that holds the ELF image: the kernel itself, or its copy in
// the cache; empty when the image is in memory only.
func (k *Kernel) ELFPath() string { return k.elf }

// Image returns the whole ELF image.
func (k *Kernel) Image() ([]byte, error) {
	b := make([]byte, k.size)
	_, err := k.ReadAt(b, 0)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return b, err
}

// WriteTo writes the ELF image to w.
func (k *Kernel) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, io.NewSectionReader(k.r, 0, k.size))
}

// Close releases the file behind the image. It may be called again.
func (k *Kernel) Close() error {
	if k.file == nil {
		return nil
	}
	f := k.file
	k.file = nil
	return f.Close()
}

// LoadKernel opens a kernel: a bzImage as distributions install it
// (/boot/vmlinuz-…), an ELF vmlinux, or either of them compressed. Unpacked
// images are kept in the user's cache folder, because unpacking xz takes
// seconds. Errors about the file's contents are a *KernelError.
func LoadKernel(path string) (*Kernel, error) {
	return KernelLoader{CacheDir: DefaultKernelCache()}.Load(path)
}

// A KernelLoader loads kernels. The zero value unpacks in memory.
type KernelLoader struct {
	// CacheDir keeps unpacked images; empty = no cache. A folder that cannot
	// be written is not an error.
	CacheDir string
}

// Load is LoadKernel with the loader's cache.
func (l KernelLoader) Load(path string) (*Kernel, error) {
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, &KernelError{path, "there is no such file; name a vmlinuz or vmlinux, for example one from /boot", err}
		}
		return nil, &KernelError{path, "cannot be opened", err}
	}
	k, err := l.load(f, path)
	if err != nil || k.file != f {
		f.Close()
	}
	return k, err
}

func (l KernelLoader) load(f *os.File, path string) (*Kernel, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, &KernelError{path, "cannot be examined", err}
	}
	switch {
	case st.IsDir():
		return nil, &KernelError{path, "is a folder; name the kernel file in it", nil}
	case !st.Mode().IsRegular():
		return nil, &KernelError{path, "is not a regular file", nil}
	case st.Size() == 0:
		return nil, &KernelError{path, "is empty", nil}
	case st.Size() > maxKernelFile:
		return nil, &KernelError{path, fmt.Sprintf("has %d bytes, too many for a kernel", st.Size()), nil}
	}
	head := make([]byte, min(st.Size(), 64<<10))
	if _, err := f.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, &KernelError{path, "cannot be read", err}
	}
	if bytes.HasPrefix(head, []byte(elf.ELFMAG)) {
		k := &Kernel{Path: path, Format: "ELF", r: f, size: st.Size(), file: f, elf: path}
		if err := k.check(); err != nil {
			return nil, err
		}
		k.Release = findRelease(k)
		return k, nil
	}
	key := kernelCacheKey(head, st)
	if k := l.cached(key, path); k != nil {
		return k, nil
	}
	data := make([]byte, st.Size())
	if _, err := io.ReadFull(io.NewSectionReader(f, 0, st.Size()), data); err != nil {
		return nil, &KernelError{path, "cannot be read", err}
	}
	k, err := ParseKernel(path, data)
	if err != nil {
		return nil, err
	}
	return l.store(key, k), nil
}

// ParseKernel loads a kernel from the bytes of its file; path is used in
// errors and as Kernel.Path.
func ParseKernel(path string, data []byte) (*Kernel, error) {
	return parseKernel(path, data, 0)
}

func parseKernel(path string, data []byte, depth int) (*Kernel, error) {
	if len(data) == 0 {
		return nil, &KernelError{path, "is empty", nil}
	}
	k := &Kernel{Path: path}
	image := data
	switch c, packed := unpack.Find(data); {
	case bytes.HasPrefix(data, []byte(elf.ELFMAG)):
		k.Format = "ELF"
	case len(data) >= 0x206 && string(data[0x202:0x206]) == "HdrS":
		var err error
		if image, k.Format, k.Release, err = unpackBzImage(path, data); err != nil {
			return nil, err
		}
	case foreignKernel(data) != "":
		return nil, &KernelError{path, foreignKernel(data), nil}
	case packed && depth == 0:
		inner, err := c.Unpack(data, maxKernelImage)
		if err != nil {
			return nil, &KernelError{path, "is a damaged " + c.Name + " file", err}
		}
		k, err := parseKernel(path, inner, depth+1)
		if err != nil {
			return nil, err
		}
		k.Format += ", " + c.Name
		return k, nil
	default:
		return nil, &KernelError{path, "is not a Linux kernel (neither a bzImage nor an ELF vmlinux)", nil}
	}
	k.r, k.size = bytes.NewReader(image), int64(len(image))
	if err := k.check(); err != nil {
		return nil, err
	}
	if k.Release == "" {
		k.Release = findRelease(k)
	}
	return k, nil
}

// foreignKernel recognises files that are kernels, but not for this machine,
// by the magic numbers of their boot protocols.
func foreignKernel(b []byte) string {
	at := func(off int, magic string) bool {
		return len(b) >= off+len(magic) && string(b[off:off+len(magic)]) == magic
	}
	const remedy = "; moovm boots x86-64 kernels"
	switch {
	case at(56, "ARM\x64"): // Documentation/arch/arm64/booting.rst
		return "is an ARM64 kernel" + remedy
	case at(0x24, "\x18\x28\x6f\x01"): // Documentation/arch/arm/booting.rst
		return "is a 32-bit ARM kernel" + remedy
	case at(56, "RSC\x05"), at(48, "RISCV"):
		return "is a RISC-V kernel" + remedy
	case at(0, "MZ") && at(4, "zimg"): // drivers/firmware/efi/libstub/zboot.lds
		return "is an EFI zboot kernel of another architecture" + remedy
	case at(0, "\x27\x05\x19\x56"):
		return "is a U-Boot image" + remedy + " in bzImage or ELF format"
	case at(0, "MZ"):
		return "is an EFI program without a Linux boot header; extract the kernel from a unified image with objcopy --dump-section .linux=vmlinuz"
	case at(0, "0707"):
		return "is a cpio archive: an initrd rather than a kernel?"
	case at(0, "!<arch>\n"):
		return "is a Debian package or library; unpack it with dpkg -x and name boot/vmlinuz-… in it"
	}
	return ""
}

// Offsets in the boot header of a bzImage (Documentation/arch/x86/boot.rst).
const (
	bzSetupSects    = 0x1f1 // uint8
	bzVersion       = 0x206 // uint16
	bzKernelVersion = 0x20e // uint16, + 0x200
	bzPayloadOffset = 0x248 // uint32, from the protected-mode code
	bzPayloadLength = 0x24c // uint32
	bzHeaderEnd     = 0x250
)

// unpackBzImage takes the ELF image out of a bzImage.
func unpackBzImage(path string, b []byte) (image []byte, format, release string, err error) {
	le := binary.LittleEndian
	if version := le.Uint16(b[min(bzVersion, len(b)-2):]); version < 0x0208 {
		return nil, "", "", &KernelError{path, fmt.Sprintf("speaks boot protocol %d.%02d; 2.08 (Linux 2.6.24) or newer is needed",
			version>>8, version&0xff), nil}
	}
	if len(b) < bzHeaderEnd {
		return nil, "", "", &KernelError{path, "ends inside its boot header", nil}
	}
	setup := int(b[bzSetupSects])
	if setup == 0 {
		setup = 4 // as the protocol says
	}
	start := uint64(setup+1)*512 + uint64(le.Uint32(b[bzPayloadOffset:]))
	length := uint64(le.Uint32(b[bzPayloadLength:]))
	if length < 4 || start+length > uint64(len(b)) {
		return nil, "", "", &KernelError{path, fmt.Sprintf("is truncated: its payload should end at byte %d, the file has %d",
			start+length, len(b)), nil}
	}
	payload := b[start : start+length]
	release = bzRelease(b)
	if bytes.HasPrefix(payload, []byte(elf.ELFMAG)) {
		return payload, "bzImage", release, nil
	}
	c, ok := unpack.Find(payload)
	if !ok {
		return nil, "", "", &KernelError{path, fmt.Sprintf("has a payload in an unknown format (it starts with % x)",
			payload[:min(6, len(payload))]), nil}
	}
	if image, err = c.Unpack(payload, maxKernelImage); err != nil {
		return nil, "", "", &KernelError{path, "has a damaged " + c.Name + " payload", err}
	}
	// The last four bytes of a payload, in any format, are its unpacked size
	// (arch/x86/boot/compressed/mkpiggy.c relies on it).
	if size := le.Uint32(payload[max(0, len(payload)-4):]); uint32(len(image)) != size {
		return nil, "", "", &KernelError{path, fmt.Sprintf("has a damaged %s payload: it unpacks to %d bytes instead of %d",
			c.Name, len(image), size), nil}
	}
	return image, "bzImage (" + c.Name + ")", release, nil
}

// bzRelease is the first word of the version string a bzImage carries.
func bzRelease(b []byte) string {
	off := int(binary.LittleEndian.Uint16(b[bzKernelVersion:]))
	if off == 0 || off+0x200 >= len(b) {
		return ""
	}
	s := b[off+0x200:]
	return releaseWord(s[:min(len(s), 256)])
}

// releaseWord is the word at the start of b when it looks like a release.
func releaseWord(b []byte) string {
	end := bytes.IndexAny(b, " \x00\n")
	if end <= 0 || b[0] < '0' || b[0] > '9' {
		return ""
	}
	for _, c := range b[:end] {
		if c <= ' ' || c > '~' || c == '/' || c == '%' {
			return ""
		}
	}
	return string(b[:end])
}

// findRelease looks for the banner ("Linux version 6.1.0 (…") in an ELF image.
func findRelease(k *Kernel) string {
	const banner = "Linux version "
	const overlap = 256
	buf := make([]byte, 1<<20)
	for off := int64(0); off < k.size; off += int64(len(buf) - overlap) {
		n, err := k.ReadAt(buf, off)
		if n == 0 && err != nil {
			return ""
		}
		b := buf[:n]
		for {
			i := bytes.Index(b, []byte(banner))
			if i < 0 {
				break
			}
			b = b[i+len(banner):]
			if r := releaseWord(b[:min(len(b), overlap-len(banner))]); r != "" {
				return r
			}
		}
	}
	return ""
}

// check makes sure that the image is an x86-64 ELF executable whose segments
// lie within it, so that a machine can trust the program headers' sizes.
func (k *Kernel) check() error {
	bad := func(problem string) error { return &KernelError{k.Path, problem, nil} }
	var h elf.Header64
	b := make([]byte, 64)
	n, err := k.ReadAt(b, 0)
	if n < 20 || !bytes.HasPrefix(b, []byte(elf.ELFMAG)) {
		if err != nil && !errors.Is(err, io.EOF) {
			return &KernelError{k.Path, "cannot be read", err}
		}
		return bad("does not contain an ELF image: damaged, or not for x86-64")
	}
	if elf.Data(b[elf.EI_DATA]) != elf.ELFDATA2LSB {
		return bad("is a big-endian ELF file; moovm boots x86-64 kernels")
	}
	if machine := elf.Machine(binary.LittleEndian.Uint16(b[18:])); machine != elf.EM_X86_64 {
		if machine == elf.EM_386 {
			return bad("is a 32-bit x86 kernel; moovm boots x86-64 kernels")
		}
		return bad(fmt.Sprintf("is an ELF file for %s; moovm boots x86-64 kernels",
			strings.TrimPrefix(machine.String(), "EM_")))
	}
	if elf.Class(b[elf.EI_CLASS]) != elf.ELFCLASS64 {
		return bad("is not a 64-bit ELF file")
	}
	if _, err := binary.Decode(b, binary.LittleEndian, &h); err != nil || n < len(b) {
		return bad("ends inside its ELF header")
	}
	if t := elf.Type(h.Type); t != elf.ET_EXEC && t != elf.ET_DYN {
		return bad("is an ELF object or module, not a kernel")
	}
	const phSize = 56
	if h.Phentsize != phSize || h.Phnum == 0 || h.Phnum > 128 {
		return bad("has no usable ELF program headers")
	}
	ph := make([]byte, int(h.Phnum)*phSize)
	if h.Phoff > uint64(k.size) || uint64(len(ph)) > uint64(k.size)-h.Phoff {
		return bad("is truncated: its ELF program headers lie beyond its end")
	}
	if _, err := k.ReadAt(ph, int64(h.Phoff)); err != nil && !errors.Is(err, io.EOF) {
		return &KernelError{k.Path, "cannot be read", err}
	}
	loads := 0
	for ; len(ph) > 0; ph = ph[phSize:] {
		var p elf.Prog64
		if _, err := binary.Decode(ph, binary.LittleEndian, &p); err != nil {
			return bad("has no usable ELF program headers")
		}
		switch elf.ProgType(p.Type) {
		case elf.PT_INTERP:
			return bad("is an ordinary program, not a kernel")
		case elf.PT_LOAD:
			loads++
			if p.Filesz > p.Memsz || p.Off > uint64(k.size) || p.Filesz > uint64(k.size)-p.Off {
				return bad("is truncated: an ELF segment lies beyond its end")
			}
		}
	}
	if loads == 0 {
		return bad("has no ELF segments to load")
	}
	return nil
}
