package delta_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/delta"
)

const diskSize = 1<<20 + 300<<10 + 512

// images makes base.img, and a chain of overlays on it, with random contents;
// it returns the overlays' paths, the lowest first.
func images(t testing.TB, dir string, overlays int, draw func(n int) int) []string {
	t.Helper()
	content := make([]byte, diskSize)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(content[512<<10 : 1100<<10])
	if err := os.WriteFile(filepath.Join(dir, "base.img"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	below, format := "base.img", cowdisk.FormatRaw
	var out []string
	for i := range overlays {
		path := filepath.Join(dir, fmt.Sprintf("%d.cow", i))
		if err := cowdisk.Create(path, cowdisk.CreateOptions{Backing: below, BackingFormat: format}); err != nil {
			t.Fatal(err)
		}
		d, err := cowdisk.Open(path, cowdisk.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for range draw(8) {
			off := int64(draw(diskSize/512)) * 512
			p := make([]byte, min(int64(draw(200)+1)*512, diskSize-off))
			if draw(4) > 0 {
				r.Read(p)
			}
			if _, err := d.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		below, format, out = filepath.Base(path), cowdisk.FormatCOW, append(out, path)
	}
	return out
}

func contents(t testing.TB, path string) []byte {
	t.Helper()
	d, err := cowdisk.Open(path, cowdisk.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func export(t testing.TB, path string, o delta.ExportOptions) []byte {
	t.Helper()
	var b bytes.Buffer
	o.Format = cowdisk.FormatCOW
	if err := delta.Export(t.Context(), &b, path, o); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// What arrives is what was sent, on any base of the same contents, also when
// the stream is cut off anywhere and goes on from there.
func TestThereAndBack(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		draw := func(n int) int { return rapid.IntRange(0, n-1).Draw(rt, "n") }
		dir, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		chain := images(t, dir, 1+draw(3), draw)
		top := chain[len(chain)-1]
		want := contents(t, top)
		var o delta.ExportOptions
		in := delta.ImportOptions{}
		out := filepath.Join(dir, "new.cow")
		switch layer := draw(len(chain) + 1); {
		case layer == len(chain): // all of it
		case layer == 0:
			o.Since, in.Base, in.BaseFormat = filepath.Join(dir, "base.img"), "base.img", cowdisk.FormatRaw
		default: // the base, stored otherwise
			o.Since = chain[layer-1]
			if err := cowdisk.Flatten(t.Context(), chain[layer-1], filepath.Join(dir, "flat.img"), cowdisk.VariantUnknown, cowdisk.ToolOptions{Options: cowdisk.Options{Format: cowdisk.FormatCOW}}); err != nil {
				t.Fatal(err)
			}
			in.Base, in.BaseFormat = "flat.img", cowdisk.FormatRaw
		}
		stream := export(t, top, o)
		for i := 0; i < draw(4); i++ { // cut off
			part := stream[:len(stream)*draw(100)/100]
			err := delta.Import(t.Context(), bytes.NewReader(part), out, in)
			var cut *delta.CutError
			if errors.As(err, &cut) {
				if n, err := delta.Begun(out); err != nil || n != cut.Pieces {
					t.Fatalf("%d pieces and %v, want %d", n, err, cut.Pieces)
				}
				in.Resume, o.From = true, cut.Pieces
				stream = export(t, top, o)
			} else if !errors.Is(err, delta.ErrCut) {
				t.Fatalf("cut at %d of %d bytes: %v", len(part), len(stream), err)
			}
		}
		if err := delta.Import(t.Context(), bytes.NewReader(stream), out, in); err != nil {
			t.Fatal(err)
		}
		if got := contents(t, out); !bytes.Equal(got, want) {
			t.Fatal("other contents arrived")
		}
		left, err := filepath.Glob(filepath.Join(dir, "*.partial*"))
		if err != nil || len(left) > 0 {
			t.Fatalf("left behind: %v, %v", left, err)
		}
	})
}

// An overlay's stream has what the overlay holds, and not its base.
func TestOnlyWhatIsAbove(t *testing.T) {
	dir := t.TempDir()
	chain := images(t, dir, 2, rand.New(rand.NewPCG(1, 2)).IntN)
	all := export(t, chain[1], delta.ExportOptions{})
	above := export(t, chain[1], delta.ExportOptions{Since: chain[0]})
	d, err := cowdisk.Open(chain[1], cowdisk.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if held := d.Allocated() * 512; int64(len(above)) > held+held/10+4096 || len(above) > len(all) {
		t.Errorf("%d bytes for %d that the overlay holds; all are %d", len(above), held, len(all))
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	chain := images(t, dir, 2, rand.New(rand.NewPCG(1, 2)).IntN)
	stream := export(t, chain[1], delta.ExportOptions{Since: chain[0]})
	whole := export(t, chain[1], delta.ExportOptions{})
	out := filepath.Join(dir, "new.cow")
	other := filepath.Join(dir, "other.img")
	content, err := os.ReadFile(filepath.Join(dir, "base.img"))
	if err != nil {
		t.Fatal(err)
	}
	content[1<<20]++
	if err := os.WriteFile(other, content, 0o600); err != nil {
		t.Fatal(err)
	}
	cow, cow1 := cowdisk.FormatCOW, cowdisk.Options{Format: cowdisk.FormatCOW}
	for name, c := range map[string]struct {
		stream []byte
		o      delta.ImportOptions
		want   error
	}{
		"another base":          {stream, delta.ImportOptions{Base: other, BaseFormat: cowdisk.FormatRaw}, delta.ErrBase},
		"no base":               {stream, delta.ImportOptions{}, delta.ErrBase},
		"a base for nothing":    {whole, delta.ImportOptions{Base: other, BaseFormat: cowdisk.FormatRaw}, delta.ErrBase},
		"a base that is gone":   {stream, delta.ImportOptions{Base: "gone.cow", BaseFormat: cow}, fs.ErrNotExist},
		"nothing to resume":     {stream, delta.ImportOptions{Base: "0.cow", BaseFormat: cow, Resume: true}, fs.ErrNotExist},
		"nothing":               {nil, delta.ImportOptions{}, delta.ErrCut},
		"no stream":             {bytes.Repeat([]byte("hello"), 100), delta.ImportOptions{}, delta.ErrStream},
		"a stream's later part": {export(t, chain[1], delta.ExportOptions{From: 2}), delta.ImportOptions{}, delta.ErrResume},
	} {
		t.Run(name, func(t *testing.T) {
			if err := delta.Import(t.Context(), bytes.NewReader(c.stream), out, c.o); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if left, _ := filepath.Glob(out + "*"); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
	if err := delta.Export(t.Context(), &bytes.Buffer{}, chain[0], delta.ExportOptions{Options: cow1, Since: chain[1]}); !errors.Is(err, delta.ErrSince) {
		t.Errorf("since what stands above: %v", err)
	}
	if err := delta.Import(t.Context(), bytes.NewReader(whole), chain[0], delta.ImportOptions{}); !errors.Is(err, cowdisk.ErrExists) {
		t.Errorf("over another image: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := delta.Export(ctx, &bytes.Buffer{}, chain[1], delta.ExportOptions{Options: cow1}); !errors.Is(err, context.Canceled) {
		t.Errorf("an export that was ended: %v", err)
	}
}

// The rest of another image, or of a later state, is not taken for the rest.
func TestResumeAnother(t *testing.T) {
	dir := t.TempDir()
	chain := images(t, dir, 2, rand.New(rand.NewPCG(1, 2)).IntN)
	out := filepath.Join(dir, "new.cow")
	stream := export(t, chain[1], delta.ExportOptions{})
	var cut *delta.CutError
	if err := delta.Import(t.Context(), bytes.NewReader(stream[:len(stream)-100]), out, delta.ImportOptions{}); !errors.As(err, &cut) || cut.Pieces == 0 {
		t.Fatal(err)
	}
	if err := delta.Import(t.Context(), bytes.NewReader(stream), out, delta.ImportOptions{}); !errors.Is(err, cowdisk.ErrExists) || !strings.Contains(err.Error(), "resume") {
		t.Errorf("begun again over what is there: %v", err)
	}
	other := export(t, chain[0], delta.ExportOptions{From: 1})
	if err := delta.Import(t.Context(), bytes.NewReader(other), out, delta.ImportOptions{Resume: true}); !errors.Is(err, delta.ErrResume) {
		t.Errorf("another image: %v", err)
	}
	if err := delta.Import(t.Context(), bytes.NewReader(stream), out, delta.ImportOptions{Resume: true}); err != nil {
		t.Errorf("all of it once more: %v", err)
	}
	if !bytes.Equal(contents(t, out), contents(t, chain[1])) {
		t.Error("other contents arrived")
	}
}

// No byte of a stream can be changed unnoticed. (Every seventh is, but for
// MOOVM_TEST_LONG.)
func TestEveryByte(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "small.cow")
	if err := cowdisk.Create(path, cowdisk.CreateOptions{Size: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	d, err := cowdisk.Open(path, cowdisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if _, err := d.WriteAt([]byte(strings.Repeat(fmt.Sprint(i), 600)), int64(i)*8192); err != nil {
			t.Fatal(err)
		}
	}
	d.Close()
	want := contents(t, path)
	stream := export(t, path, delta.ExportOptions{})
	step := 7
	if os.Getenv("MOOVM_TEST_LONG") != "" {
		step = 1
	}
	for i := 0; i < len(stream); i += step {
		bad := bytes.Clone(stream)
		bad[i] ^= 0x41
		out := filepath.Join(dir, fmt.Sprintf("out%d.cow", i))
		if err := delta.Import(t.Context(), bytes.NewReader(bad), out, delta.ImportOptions{}); err == nil {
			// The header says where the stream is from: nothing of the disk.
			if got := contents(t, out); !bytes.Equal(got, want) {
				t.Errorf("byte %d of %d: other contents, and nobody noticed", i, len(stream))
			}
		}
		left, _ := filepath.Glob(out + "*")
		for _, f := range left {
			os.Remove(f)
		}
	}
}

func TestDigest(t *testing.T) {
	dir := t.TempDir()
	chain := images(t, dir, 2, rand.New(rand.NewPCG(1, 2)).IntN)
	flat := filepath.Join(dir, "flat.img")
	if err := cowdisk.Flatten(t.Context(), chain[1], flat, cowdisk.VariantUnknown, cowdisk.ToolOptions{Options: cowdisk.Options{Format: cowdisk.FormatCOW}}); err != nil {
		t.Fatal(err)
	}
	digest := func(path string, f cowdisk.Format) string {
		d, err := cowdisk.OpenAny(path, cowdisk.Options{ReadOnly: true, Format: f})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		s, err := delta.Digest(t.Context(), d, nil)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	a, b := digest(chain[1], cowdisk.FormatCOW), digest(flat, cowdisk.FormatRaw)
	if a != b || len(a) != 64 {
		t.Errorf("the same contents have digests %s and %s", a, b)
	}
	if c := digest(chain[0], cowdisk.FormatCOW); c == a {
		t.Error("other contents have the same digest")
	}
}

func FuzzImport(f *testing.F) {
	dir := f.TempDir()
	chain := images(f, dir, 1, rand.New(rand.NewPCG(1, 2)).IntN)
	f.Add(export(f, chain[0], delta.ExportOptions{})[:4000])
	small := filepath.Join(dir, "small.cow")
	if err := cowdisk.Create(small, cowdisk.CreateOptions{Size: 64 << 10}); err != nil {
		f.Fatal(err)
	}
	f.Add(export(f, small, delta.ExportOptions{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		out := filepath.Join(dir, "o.cow")
		err := delta.Import(t.Context(), bytes.NewReader(b), out, delta.ImportOptions{})
		if _, serr := os.Stat(out); (err == nil) != (serr == nil) {
			t.Errorf("%v, and the image: %v", err, serr)
		}
	})
}

func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	here, there := filepath.Join(dir, "here.cow"), filepath.Join(dir, "there.cow")
	if err := cowdisk.Create(here, cowdisk.CreateOptions{Size: 1 << 30}); err != nil {
		panic(err)
	}
	var stream bytes.Buffer // or ssh, or a file
	ctx := context.Background()
	fmt.Println(delta.Export(ctx, &stream, here, delta.ExportOptions{Options: cowdisk.Options{Format: cowdisk.FormatCOW}}))
	fmt.Println(delta.Import(ctx, &stream, there, delta.ImportOptions{}))
	// Output:
	// <nil>
	// <nil>
}
