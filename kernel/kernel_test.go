package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/internal/unpack/unpacktest"
	"github.com/moovm/moovm/kernel/kerneltest"
)

func TestLoadBzImage(t *testing.T) {
	want := kerneltest.ELF()
	for name, payload := range unpacktest.Pack(t, want) {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "vmlinuz")
			writeFile(t, path, kerneltest.BzImage(payload, len(want)))
			k, err := KernelLoader{}.Load(path)
			if err != nil {
				t.Fatal(err)
			}
			defer k.Close()
			got, err := k.Image()
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("the image differs (%d bytes, want %d), %v", len(got), len(want), err)
			}
			if k.Release != kerneltest.Release || k.Format != "bzImage ("+name+")" || k.ELFPath() != "" || k.Size() != int64(len(want)) {
				t.Errorf("got release %q, format %q", k.Release, k.Format)
			}
			for _, cut := range []int{5, len(payload) / 2, len(payload) - 1} {
				if (name == "xz" || name == "lz4") && cut == len(payload)-1 {
					continue // xz: the footer is not looked at; lz4 has no check sum
				}
				if _, err := ParseKernel("cut", kerneltest.BzImage(payload[:cut], len(want))); !errors.Is(err, ErrNotKernel) {
					t.Errorf("payload cut at %d: %v", cut, err)
				}
			}
		})
	}
}

func TestLoadELF(t *testing.T) {
	dir := t.TempDir()
	image := kerneltest.ELF()
	path := filepath.Join(dir, "vmlinux")
	writeFile(t, path, image)
	k, err := LoadKernel(path)
	if err != nil {
		t.Fatal(err)
	}
	if k.Release != kerneltest.Release || k.Format != "ELF" || k.ELFPath() != path {
		t.Errorf("got %+v", k)
	}
	var b bytes.Buffer
	if n, err := k.WriteTo(&b); err != nil || n != int64(len(image)) || !bytes.Equal(b.Bytes(), image) {
		t.Errorf("WriteTo: %d bytes, %v", n, err)
	}
	for range 2 {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	}
	k, err = ParseKernel("vmlinux.gz", unpacktest.Pack(t, image)["gzip"])
	if err != nil || k.Format != "ELF, gzip" || k.Release != kerneltest.Release {
		t.Errorf("packed ELF: %+v, %v", k, err)
	}
}

func TestNotAKernel(t *testing.T) {
	at := func(off int, magic string) []byte {
		b := make([]byte, 4096)
		copy(b[off:], magic)
		return b
	}
	change := func(b []byte, f func(b []byte)) []byte {
		b = bytes.Clone(b)
		f(b)
		return b
	}
	bz := kerneltest.BzImage(kerneltest.ELF(), len(kerneltest.ELF()))
	k := kerneltest.ELF()
	le := binary.LittleEndian
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"empty":        {nil, "is empty"},
		"text":         {[]byte("hello\n"), "is not a Linux kernel"},
		"zeros":        {make([]byte, 10000), "is not a Linux kernel"},
		"arm64":        {at(56, "ARM\x64"), "is an ARM64 kernel"},
		"packed arm64": {unpacktest.Pack(t, at(56, "ARM\x64"))["gzip"], "is an ARM64 kernel"},
		"arm":          {at(0x24, "\x18\x28\x6f\x01"), "is a 32-bit ARM kernel"},
		"riscv":        {at(56, "RSC\x05"), "is a RISC-V kernel"},
		"zboot":        {at(0, "MZ\x00\x00zimg"), "EFI zboot"},
		"efi":          {at(0, "MZ"), "EFI program"},
		"initrd":       {at(0, "070701"), "cpio archive"},
		"deb":          {at(0, "!<arch>\n"), "Debian package"},
		"bad gzip":     {at(0, "\x1f\x8b\x08"), "is a damaged gzip file"},
		"twice packed": {unpacktest.Pack(t, unpacktest.Pack(t, k)["gzip"])["gzip"], "is not a Linux kernel"},

		"old protocol":    {change(bz, func(b []byte) { le.PutUint16(b[bzVersion:], 0x0204) }), "speaks boot protocol 2.04"},
		"truncated":       {bz[:len(bz)/2], "is truncated"},
		"only header":     {bz[:0x206], "ends inside its boot header"},
		"short header":    {bz[:0x230], "ends inside its boot header"},
		"no payload":      {change(bz, func(b []byte) { le.PutUint32(b[bzPayloadLength:], 0) }), "is truncated"},
		"payload offset":  {change(bz, func(b []byte) { le.PutUint32(b[bzPayloadOffset:], 0xffffffff) }), "is truncated"},
		"unknown payload": {kerneltest.BzImage([]byte("something else"), 14), "unknown format"},
		"lzo":             {kerneltest.BzImage([]byte("\x89LZO\x00\x0d\x0a\x1a\x0a..."), 14), "lzo is not supported"},

		"arm64 elf":    {change(k, func(b []byte) { b[18] = byte(elf.EM_AARCH64) }), "ELF file for AARCH64"},
		"i386 elf":     {change(k, func(b []byte) { b[18] = byte(elf.EM_386) }), "32-bit x86"},
		"big endian":   {change(k, func(b []byte) { b[elf.EI_DATA] = 2 }), "big-endian"},
		"class":        {change(k, func(b []byte) { b[elf.EI_CLASS] = 1 }), "not a 64-bit"},
		"object":       {change(k, func(b []byte) { b[16] = byte(elf.ET_REL) }), "object or module"},
		"program":      {change(k, func(b []byte) { b[64] = byte(elf.PT_INTERP) }), "ordinary program"},
		"no segments":  {change(k, func(b []byte) { b[64] = byte(elf.PT_NOTE) }), "no ELF segments"},
		"phoff":        {change(k, func(b []byte) { le.PutUint64(b[32:], 1<<63) }), "truncated"},
		"phnum":        {change(k, func(b []byte) { le.PutUint16(b[56:], 0xffff) }), "program headers"},
		"segment":      {change(k, func(b []byte) { le.PutUint64(b[64+8:], 1<<62) }), "truncated"},
		"cut elf":      {k[:len(k)/2], "truncated"},
		"header only":  {k[:40], "ELF header"},
		"magic only":   {k[:4], "ELF image"},
		"segment size": {change(k, func(b []byte) { le.PutUint64(b[64+32:], 1<<63); le.PutUint64(b[64+40:], 1<<63) }), "truncated"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "kernel")
			writeFile(t, path, c.data)
			_, err := KernelLoader{}.Load(path)
			var ke *KernelError
			if !errors.As(err, &ke) || !errors.Is(err, ErrNotKernel) || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			if !strings.HasPrefix(err.Error(), "kernel "+path+": ") || strings.Contains(err.Error(), "\n") {
				t.Errorf("not one sentence that names the file: %v", err)
			}
		})
	}
	if _, err := LoadKernel(t.TempDir()); err == nil || !strings.Contains(err.Error(), "is a folder") {
		t.Errorf("folder: %v", err)
	}
	if _, err := LoadKernel(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) || !errors.Is(err, ErrNotKernel) {
		t.Errorf("missing: %v", err)
	}
}

func TestKernelCache(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "vmlinuz")
	want := kerneltest.ELF()
	writeFile(t, path, kerneltest.BzImage(unpacktest.Pack(t, want)["xz"], len(want)))
	l := KernelLoader{CacheDir: filepath.Join(dir, "cache")}
	load := func() *Kernel {
		t.Helper()
		k, err := l.Load(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { k.Close() })
		if got, err := k.Image(); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("the image differs, %v", err)
		}
		if k.Path != path || k.Release != kerneltest.Release || k.Format != "bzImage (xz)" {
			t.Errorf("got %+v", k)
		}
		return k
	}
	first := load()
	if first.ELFPath() == "" {
		t.Fatal("not cached")
	}
	// The second comes from the cache: put something else there to see it.
	other := bytes.Clone(want)
	other[len(other)-1] = 'x'
	writeFile(t, first.ELFPath(), other)
	k, err := l.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := k.Image(); !bytes.Equal(got, other) {
		t.Error("the cache was not used")
	}
	k.Close()
	// A damaged entry is replaced.
	writeFile(t, first.ELFPath(), want[:1000])
	load()
	// A file that changed is not the same kernel.
	if err := os.Chtimes(path, time.Now(), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if second := load(); second.ELFPath() == first.ELFPath() {
		t.Error("a changed file has the same entry")
	}
	// A cache that cannot be is none.
	l.CacheDir = filepath.Join(path, "below a file")
	if k := load(); k.ELFPath() != "" {
		t.Error("cached nowhere")
	}
}

func TestKernelCachePrune(t *testing.T) {
	dir := t.TempDir()
	old := time.Now().Add(-48 * time.Hour)
	for i := range 10 {
		name := filepath.Join(dir, string(rune('a'+i))+".vmlinux")
		writeFile(t, name, nil)
		if err := os.Chtimes(name, old, old.Add(time.Duration(i)*time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	stale := filepath.Join(dir, "unpacking-1")
	writeFile(t, stale, nil)
	if err := os.Chtimes(stale, old, old); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "unpacking-2"), nil)
	KernelLoader{CacheDir: dir}.prune()
	var names []string
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); got != "e.vmlinux f.vmlinux g.vmlinux h.vmlinux i.vmlinux j.vmlinux unpacking-2" {
		t.Errorf("left: %s", got)
	}
}

// The real thing, where there is one.
func TestRealKernel(t *testing.T) {
	k, err := LoadKernel(kerneltest.Path(t))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	base := filepath.Base(k.Path)
	if want, ok := strings.CutPrefix(base, "vmlinuz-"); ok && k.Release != want {
		t.Errorf("%s says it is %q", base, k.Release)
	}
	if got := findRelease(k); got != k.Release {
		t.Errorf("the banner says %q, the header %q", got, k.Release)
	}
}

func FuzzParseKernel(f *testing.F) {
	want := kerneltest.ELF()[:2000]
	for _, p := range unpacktest.Pack(f, want) {
		f.Add(kerneltest.BzImage(p, len(want)))
		f.Add(p)
	}
	f.Add(kerneltest.ELF()[:200])
	f.Fuzz(func(t *testing.T, data []byte) {
		k, err := ParseKernel("fuzz", data)
		if err != nil {
			if !errors.Is(err, ErrNotKernel) {
				t.Errorf("not ErrNotKernel: %v", err)
			}
			return
		}
		if k.Size() == 0 {
			t.Error("an empty kernel")
		}
	})
}

func writeFile(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}
