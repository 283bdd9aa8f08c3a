package unpack

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Stream unpacks r as it arrives, packed by gzip, zstd, xz or bzip2 in any
// number of pieces; what is packed otherwise, or not at all, it passes on.
// format is "" then. A packed stream that was cut off is an error, never an
// end. Memory is bounded, the length of what comes out is the caller's to
// bound. Closing it does not close r.
func Stream(r io.Reader) (out io.ReadCloser, format string, err error) {
	b := bufio.NewReaderSize(r, 256<<10)
	head, err := b.Peek(len(xzMagic))
	if err != nil && err != io.EOF {
		return nil, "", err
	}
	is := func(magic string) bool { return bytes.HasPrefix(head, []byte(magic)) }
	switch {
	case is("\x1f\x8b"):
		z, err := gzip.NewReader(b)
		return z, "gzip", err
	case is("\x28\xb5\x2f\xfd"), isSkippable(head):
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(2), zstd.WithDecoderMaxWindow(maxDictionary), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, "zstd", err
		}
		return z.IOReadCloser(), "zstd", nil
	case is(xzMagic):
		return io.NopCloser(&xzStream{in: &counted{r: b}}), "xz", nil
	case is("BZh"):
		return io.NopCloser(bzip2.NewReader(b)), "bzip2", nil
	}
	return io.NopCloser(b), "", nil
}

// isSkippable recognises a frame of zstd that has no data: some programs begin
// with one.
func isSkippable(head []byte) bool {
	return len(head) >= 4 && head[0]&0xf0 == 0x50 && string(head[1:4]) == "\x2a\x4d\x18"
}
