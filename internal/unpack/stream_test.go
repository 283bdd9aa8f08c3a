package unpack_test

import (
	"bytes"
	stdgzip "compress/gzip"
	"errors"
	"io"
	"math/rand"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/moovm/moovm/internal/unpack"
)

// packs are ways to pack for Stream.
func packs(t testing.TB) map[string]func(io.Writer) io.WriteCloser {
	return map[string]func(io.Writer) io.WriteCloser{
		"gzip": func(w io.Writer) io.WriteCloser { return stdgzip.NewWriter(w) },
		"zstd": func(w io.Writer) io.WriteCloser {
			z, err := zstd.NewWriter(w)
			if err != nil {
				t.Fatal(err)
			}
			return z
		},
		"xz": func(w io.Writer) io.WriteCloser {
			z, err := xz.WriterConfig{BlockSize: 100_000}.NewWriter(w)
			if err != nil {
				t.Fatal(err)
			}
			return z
		},
	}
}

func TestStream(t *testing.T) {
	data := make([]byte, 300_000)
	rand.New(rand.NewSource(1)).Read(data[:150_000])
	for name, pack := range packs(t) {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			for _, part := range [][]byte{data[:200_001], data[200_001:]} { // two pieces, one behind the other
				w := pack(&b)
				if _, err := w.Write(part); err != nil {
					t.Fatal(err)
				}
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
			}
			for _, r := range []io.Reader{bytes.NewReader(b.Bytes()), iotest.OneByteReader(bytes.NewReader(b.Bytes())), iotest.DataErrReader(bytes.NewReader(b.Bytes()))} {
				out, format, err := unpack.Stream(r)
				if err != nil || format != name {
					t.Fatalf("%q, %v", format, err)
				}
				got, err := io.ReadAll(out)
				if err != nil || !bytes.Equal(got, data) {
					t.Fatalf("%d bytes of %d, %v", len(got), len(data), err)
				}
				_ = out.Close()
			}
			for _, n := range []int{1, 7, 13, 1000, 100_001} { // bytes that are missing
				out, _, err := unpack.Stream(bytes.NewReader(b.Bytes()[:b.Len()-n]))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadAll(out); err == nil {
					t.Errorf("without the last %d bytes it ended well", n)
				}
			}
			broken := errors.New("broken")
			out, _, err := unpack.Stream(io.MultiReader(bytes.NewReader(b.Bytes()[:1000]), iotest.ErrReader(broken)))
			if err == nil {
				_, err = io.ReadAll(out)
			}
			if !errors.Is(err, broken) {
				t.Errorf("the reader's own error is lost: %v", err)
			}
		})
	}
	for _, plain := range []string{"", "x", "plain text that is longer than any magic number"} {
		out, format, err := unpack.Stream(bytes.NewReader([]byte(plain)))
		if err != nil || format != "" {
			t.Fatalf("%q, %v", format, err)
		}
		if got, err := io.ReadAll(out); string(got) != plain {
			t.Errorf("%q, %v; want %q", got, err, plain)
		}
	}
}

func FuzzStream(f *testing.F) {
	for _, pack := range packs(f) {
		var b bytes.Buffer
		w := pack(&b)
		_, _ = w.Write([]byte("some data, some data, some data"))
		_ = w.Close()
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		out, _, err := unpack.Stream(bytes.NewReader(b))
		if err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, io.LimitReader(out, 1<<20))
		_ = out.Close()
	})
}
