// Package unpack unpacks what kernels and modules are packed with, in memory
// and within a limit. The data is not trusted: memory grows with what arrives,
// never with what a header promises.
package unpack

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz/lzma"
)

// ErrTooLarge ends the unpacking of data that grows beyond what was allowed.
var ErrTooLarge = errors.New("unpacks to more than is allowed")

// maxDictionary is the largest xz, lzma or zstd window that is accepted. Linux
// itself uses 32 MiB (xz) and 128 MiB (zstd --ultra -22).
const maxDictionary = 128 << 20

// A Format is one way to pack a kernel or a module.
type Format struct {
	Name   string // such as "xz"
	magic  string
	unpack func(src []byte, limit int64) ([]byte, error)
}

// Unpack unpacks src, which Find recognised. More than limit bytes are
// ErrTooLarge. What follows the packed data is ignored, as it is the loader's.
func (f Format) Unpack(src []byte, limit int64) ([]byte, error) { return f.unpack(src, limit) }

// compressions holds what the kernel's build system may have used, except lzo.
// The lzma magic is that of its properties byte and a dictionary of 64 KiB or
// more, because the format has none.
func compressions() []Format {
	return []Format{
		{"gzip", "\x1f\x8b", unpackGzip},
		{"xz", xzMagic, unpackXZ},
		{"zstd", "\x28\xb5\x2f\xfd", unpackZstd},
		{"lz4", lz4Magic, unpackLZ4},
		{"bzip2", "BZh", unpackBzip2},
		{"lzma", "\x5d\x00\x00", unpackLZMA},
		{"lzo", "\x89LZO\x00\x0d\x0a\x1a\x0a", func([]byte, int64) ([]byte, error) {
			return nil, errors.New("lzo is not supported")
		}},
	}
}

// Find recognises how src is packed.
func Find(src []byte) (Format, bool) {
	for _, c := range compressions() {
		if bytes.HasPrefix(src, []byte(c.magic)) {
			return c, true
		}
	}
	return Format{}, false
}

// ReadLimited reads r to its end, at most limit bytes. Memory grows with what
// arrives, never with what a header promises.
func ReadLimited(r io.Reader, limit int64) ([]byte, error) {
	var b bytes.Buffer
	n, err := b.ReadFrom(io.LimitReader(r, limit+1))
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	if n > limit {
		return nil, ErrTooLarge
	}
	return b.Bytes(), nil
}

func unpackGzip(src []byte, limit int64) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(src))
	if err != nil {
		return nil, err
	}
	r.Multistream(false) // whatever follows is the loader's, not the kernel's
	return ReadLimited(r, limit)
}

func unpackBzip2(src []byte, limit int64) ([]byte, error) {
	// A kernel has its unpacked size appended, which is not bzip2: stop at the
	// end of the stream by keeping what was unpacked when the reader trips.
	r := bzip2.NewReader(bytes.NewReader(src))
	var b bytes.Buffer
	n, err := b.ReadFrom(io.LimitReader(r, limit+1))
	if n > limit {
		return nil, ErrTooLarge
	}
	var bad bzip2.StructuralError
	if err != nil && (n == 0 || !errors.As(err, &bad)) {
		return nil, err
	}
	return b.Bytes(), nil
}

func unpackZstd(src []byte, limit int64) ([]byte, error) {
	r, err := zstd.NewReader(bytes.NewReader(src), zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderMaxWindow(maxDictionary), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	// The unpacked size that the kernel's build appends is no frame: it ends
	// the stream with ErrMagicMismatch after everything was delivered.
	var b bytes.Buffer
	n, err := b.ReadFrom(io.LimitReader(r, limit+1))
	if n > limit {
		return nil, ErrTooLarge
	}
	if err != nil && (n == 0 || !errors.Is(err, zstd.ErrMagicMismatch)) {
		return nil, err
	}
	return b.Bytes(), nil
}

func unpackLZMA(src []byte, limit int64) ([]byte, error) {
	if len(src) < lzma.HeaderLen {
		return nil, io.ErrUnexpectedEOF
	}
	r, err := lzma.ReaderConfig{DictCap: maxDictionary}.NewReader(bufio.NewReader(bytes.NewReader(src)))
	if err != nil {
		return nil, err
	}
	return ReadLimited(r, limit)
}

// The LZ4 legacy frame, as `lz4 -l` writes it: magic, then blocks of at most
// 8 MiB, each behind its packed size (Documentation: lz4_Frame_format.md).
const (
	lz4Magic      = "\x02\x21\x4c\x18"
	lz4BlockLimit = 8 << 20
)

func unpackLZ4(src []byte, limit int64) ([]byte, error) {
	var out []byte
	block := make([]byte, lz4BlockLimit)
	src = src[len(lz4Magic):]
	for len(src) >= 4 {
		size := binary.LittleEndian.Uint32(src)
		if string(src[:4]) == lz4Magic { // frames may be chained
			src = src[4:]
			continue
		}
		if size == 0 {
			break
		}
		if len(src) == 4 {
			break // the unpacked size, appended by the kernel's build
		}
		if uint64(size) > uint64(len(src)-4) {
			if out != nil && len(src) < 512 {
				break // padding
			}
			return nil, fmt.Errorf("lz4 block of %d bytes, %d are left: %w", size, len(src)-4, io.ErrUnexpectedEOF)
		}
		n, err := lz4.UncompressBlock(src[4:4+size], block)
		if err != nil {
			return nil, fmt.Errorf("lz4 block: %w", err)
		}
		if int64(len(out)+n) > limit {
			return nil, ErrTooLarge
		}
		out = append(out, block[:n]...)
		src = src[4+size:]
	}
	if out == nil {
		return nil, io.ErrUnexpectedEOF
	}
	return out, nil
}
