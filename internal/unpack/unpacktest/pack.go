// Package unpacktest packs data for tests of what unpacks it.
package unpacktest

import (
	"bytes"
	"compress/gzip"
	"io"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// Pack compresses data with each packer there is a writer for.
func Pack(t testing.TB, data []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	run := func(name string, open func(w io.Writer) (io.WriteCloser, error)) {
		var b bytes.Buffer
		w, err := open(&b)
		if err == nil {
			_, err = w.Write(data)
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		out[name] = b.Bytes()
	}
	run("gzip", func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil })
	run("xz", func(w io.Writer) (io.WriteCloser, error) {
		return xz.WriterConfig{CheckSum: xz.CRC32, BlockSize: 100 << 10}.NewWriter(w) // several blocks
	})
	run("zstd", func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) })
	run("lzma", func(w io.Writer) (io.WriteCloser, error) {
		return lzma.WriterConfig{EOSMarker: true}.NewWriter(w)
	})
	run("lz4", func(w io.Writer) (io.WriteCloser, error) {
		z := lz4.NewWriter(w)
		return z, z.Apply(lz4.LegacyOption(true))
	})
	return out
}
