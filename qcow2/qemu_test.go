package qcow2

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// needQEMU skips where there is no qemu-img to compare with.
func needQEMU(t testing.TB) {
	t.Helper()
	for _, tool := range []string{"qemu-img", "qemu-io"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s to compare with: apt-get install qemu-utils", tool)
		}
	}
}

func sh(t testing.TB, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// sample writes a raw disk of size bytes with random, compressible and equal ranges, and holes.
func sample(t testing.TB, path string, size int64) {
	t.Helper()
	rng := rand.New(rand.NewPCG(7, uint64(size)))
	b := make([]byte, size)
	for off := int64(0); off < size; {
		n := min(rng.Int64N(200<<10)+1, size-off)
		part := b[off : off+n]
		switch rng.IntN(4) {
		case 0:
			for i := range part {
				part[i] = byte(rng.Uint32())
			}
		case 1:
			for i := range part {
				part[i] = pattern(off + int64(i))
			}
		case 2:
			for i := range part {
				part[i] = 0xa5
			}
		}
		off += n
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// compare reads the image in dir as qemu-img does, and its extents, too.
func compare(t *testing.T, dir, image string, backing *os.File) {
	t.Helper()
	sh(t, dir, "qemu-img", "convert", "-O", "raw", image, "want.raw")
	want, err := os.ReadFile(filepath.Join(dir, "want.raw"))
	if err != nil {
		t.Fatal(err)
	}
	o := Options{}
	if backing != nil {
		o.Backing = backing
	}
	m, err := Open(filepath.Join(dir, image), o)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if m.Size() != int64(len(want)) {
		t.Fatalf("%d bytes, qemu-img has %d", m.Size(), len(want))
	}
	got := mustRead(t, m)
	if !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		t.Fatalf("byte %d is %#x, qemu-img has %#x", i, got[i], want[i])
	}
	rng := rand.New(rand.NewPCG(9, 9))
	b := make([]byte, 10000)
	for range 200 {
		off := rng.Int64N(max(m.Size()-int64(len(b)), 1))
		n, _ := m.ReadAt(b, off)
		if !bytes.Equal(b[:n], want[off:off+int64(n)]) {
			t.Fatalf("at %d: a small read differs", off)
		}
	}
	if backing == nil {
		compareMap(t, m, dir, image)
	}
}

// compareMap compares Extents with qemu-img map, byte for byte.
func compareMap(t *testing.T, m *Image, dir, image string) {
	t.Helper()
	var list []struct {
		Start, Length       int64
		Present, Zero, Data bool
	}
	if err := json.Unmarshal([]byte(sh(t, dir, "qemu-img", "map", "--output=json", image)), &list); err != nil {
		t.Fatal(err)
	}
	i := 0
	err := m.Extents(t.Context(), 0, m.Size(), func(e Extent) error {
		for ; i < len(list) && list[i].Start < e.Start+e.Length; i++ {
			q := list[i]
			from, to := max(q.Start, e.Start), min(q.Start+q.Length, e.Start+e.Length)
			// What qemu-img calls absent may lie in a zero cluster without a place; data may have holes in the file.
			if e.Kind == Data && !q.Present || e.Kind != Data && !q.Zero || e.Kind == Absent && q.Data {
				return fmt.Errorf("%d-%d is %v, qemu-img map says %+v", from, to, e.Kind, q)
			}
			if q.Start+q.Length > e.Start+e.Length {
				break
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestQEMUConverted: every version and compression, the smallest, largest and commonest cluster sizes; with MOOVM_TEST_LONG all of them.
func TestQEMUConverted(t *testing.T) {
	needQEMU(t)
	type variant struct {
		options string
		packed  bool
	}
	var variants []variant
	sizes := []int{512, 16 << 10, 64 << 10, 2 << 20}
	if os.Getenv("MOOVM_TEST_LONG") != "" {
		sizes = append(sizes, 1<<10, 2<<10, 4<<10, 8<<10, 32<<10, 128<<10, 256<<10, 512<<10, 1<<20)
	}
	for _, cs := range sizes {
		o := fmt.Sprintf("cluster_size=%d,compat=", cs)
		variants = append(variants, variant{o + "0.10", false}, variant{o + "0.10", true}, variant{o + "1.1", false}, variant{o + "1.1", true},
			variant{o + "1.1,compression_type=zstd", true})
		if cs >= 16<<10 {
			variants = append(variants, variant{o + "1.1,extended_l2=on", false}, variant{o + "1.1,extended_l2=on", true},
				variant{o + "1.1,extended_l2=on,compression_type=zstd", true})
		}
	}
	src := filepath.Join(t.TempDir(), "src.raw")
	sample(t, src, 5<<20+7*512)
	for _, v := range variants {
		t.Run(fmt.Sprintf("%s,packed=%v", v.options, v.packed), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			args := []string{"qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", v.options}
			if v.packed {
				args = append(args, "-c")
			}
			sh(t, dir, append(args, src, "a.qcow2")...)
			compare(t, dir, "a.qcow2", nil)
		})
	}
}

// TestQEMUWritten: images that qemu-io wrote into in pieces.
func TestQEMUWritten(t *testing.T) {
	needQEMU(t)
	writes := func(seed uint64, size int64, zeros bool) []string {
		rng := rand.New(rand.NewPCG(seed, 1))
		args := []string{"qemu-io"}
		for i := range 40 {
			off, n := rng.Int64N(size/512)*512, (rng.Int64N(200)+1)*512
			n = min(n, size-off)
			cmd := fmt.Sprintf("write -P %d %d %d", i+1, off, n)
			if zeros {
				switch rng.IntN(5) {
				case 0:
					cmd = fmt.Sprintf("write -z %d %d", off, n)
				case 1:
					cmd = fmt.Sprintf("write -z -u %d %d", off, n)
				case 2:
					cmd = fmt.Sprintf("discard %d %d", off, n)
				}
			}
			args = append(args, "-c", cmd)
		}
		return args
	}
	const size = 6<<20 + 3*512
	for _, o := range []string{
		"compat=0.10", "compat=0.10,cluster_size=512", "compat=1.1", "compat=1.1,cluster_size=512", "compat=1.1,cluster_size=2M",
		"extended_l2=on", "extended_l2=on,cluster_size=16k", "extended_l2=on,cluster_size=2M", "compression_type=zstd",
		"preallocation=metadata", "preallocation=falloc", "preallocation=full", "preallocation=metadata,cluster_size=512",
		"preallocation=metadata,cluster_size=2M", "preallocation=metadata,extended_l2=on", "lazy_refcounts=on", "refcount_bits=1", "refcount_bits=64",
	} {
		t.Run(o, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			sh(t, dir, "qemu-img", "create", "-f", "qcow2", "-o", o, "a.qcow2", fmt.Sprint(size))
			compare(t, dir, "a.qcow2", nil)
			sh(t, dir, append(writes(1, size, true), "-f", "qcow2", "a.qcow2")...)
			compare(t, dir, "a.qcow2", nil)
		})
		if strings.Contains(o, "preallocation") && !strings.Contains(o, "extended") {
			continue // not with a backing file
		}
		t.Run("backing,"+o, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			// Shorter than the overlay: what is beyond its end is zeros.
			sample(t, filepath.Join(dir, "base.raw"), size-1<<20)
			sh(t, dir, "qemu-img", "create", "-f", "qcow2", "-o", o, "-b", "base.raw", "-F", "raw", "a.qcow2", fmt.Sprint(size))
			sh(t, dir, append(writes(2, size, true), "-f", "qcow2", "a.qcow2")...)
			if _, err := Open(filepath.Join(dir, "a.qcow2"), Options{}); !errors.Is(err, ErrBacking) || !strings.Contains(err.Error(), `"base.raw"`) {
				t.Errorf("without its backing file: %v", err)
			}
			base, err := os.Open(filepath.Join(dir, "base.raw"))
			if err != nil {
				t.Fatal(err)
			}
			defer base.Close()
			h, err := ReadHeader(mustFile(t, filepath.Join(dir, "a.qcow2")))
			if err != nil || h.Backing != "base.raw" || h.BackingFormat != "raw" || h.Size != size {
				t.Errorf("header %+v, %v", h, err)
			}
			compare(t, dir, "a.qcow2", base)
		})
	}
	t.Run("snapshots", func(t *testing.T) {
		dir := t.TempDir()
		sh(t, dir, "qemu-img", "create", "-f", "qcow2", "a.qcow2", fmt.Sprint(size))
		for i := range uint64(3) {
			sh(t, dir, append(writes(i, size, i > 0), "-f", "qcow2", "a.qcow2")...)
			sh(t, dir, "qemu-img", "snapshot", "-c", fmt.Sprint("s", i), "a.qcow2")
			compare(t, dir, "a.qcow2", nil)
		}
		if h, err := ReadHeader(mustFile(t, filepath.Join(dir, "a.qcow2"))); err != nil || h.Snapshots != 3 {
			t.Errorf("header %+v, %v", h, err)
		}
		sh(t, dir, "qemu-img", "snapshot", "-a", "s0", "a.qcow2")
		compare(t, dir, "a.qcow2", nil)
	})
	t.Run("mixed with compressed", func(t *testing.T) {
		dir := t.TempDir()
		sample(t, filepath.Join(dir, "src.raw"), size)
		sh(t, dir, "qemu-img", "convert", "-c", "-O", "qcow2", "src.raw", "a.qcow2")
		sh(t, dir, append(writes(5, size, true), "-f", "qcow2", "a.qcow2")...)
		compare(t, dir, "a.qcow2", nil)
		sh(t, dir, "qemu-img", "resize", "a.qcow2", "+1000k")
		compare(t, dir, "a.qcow2", nil)
		sh(t, dir, "qemu-img", "resize", "--shrink", "a.qcow2", "3000k")
		compare(t, dir, "a.qcow2", nil)
	})
}

func mustFile(t *testing.T, path string) (*os.File, int64, string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return f, st.Size(), path
}

// TestQEMUSizes: disks of odd sizes, from nothing on, converted and empty.
func TestQEMUSizes(t *testing.T) {
	needQEMU(t)
	for _, size := range []int64{0, 1, 511, 512, 513, 65535, 65536, 65537, 1000001} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			sh(t, dir, "qemu-img", "create", "-f", "qcow2", "a.qcow2", fmt.Sprint(size))
			compare(t, dir, "a.qcow2", nil)
			sample(t, filepath.Join(dir, "src.raw"), size)
			for _, c := range [][]string{nil, {"-c"}, {"-S", "0"}} {
				args := append([]string{"qemu-img", "convert", "-f", "raw", "-O", "qcow2"}, c...)
				sh(t, dir, append(args, "src.raw", "b.qcow2")...)
				compare(t, dir, "b.qcow2", nil)
			}
		})
	}
	t.Run("huge", func(t *testing.T) {
		dir := t.TempDir()
		sh(t, dir, "qemu-img", "create", "-f", "qcow2", "a.qcow2", "64T")
		sh(t, dir, "qemu-io", "-c", "write -P 7 60000000001k 1k", "-c", "write -P 8 0 512", "-f", "qcow2", "a.qcow2")
		m, err := Open(filepath.Join(dir, "a.qcow2"), Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		b := make([]byte, 3)
		if _, err := m.ReadAt(b, 60000000001<<10-1); err != nil || string(b) != "\x00\x07\x07" {
			t.Errorf("%q, %v", b, err)
		}
		compareMap(t, m, dir, "a.qcow2")
	})
}

// TestQEMURefused: what QEMU makes and this reader refuses; and that its remedy helps where it is qemu-img check.
func TestQEMURefused(t *testing.T) {
	needQEMU(t)
	dir := t.TempDir()
	open := func(name string, kind error) {
		t.Helper()
		m, err := Open(filepath.Join(dir, name), Options{})
		if err == nil {
			m.Close()
		}
		if !errors.Is(err, kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
	sh(t, dir, "qemu-img", "create", "-f", "qcow2", "-o", "data_file=data.raw", "external.qcow2", "1M")
	open("external.qcow2", ErrExternalData)
	sh(t, dir, "qemu-img", "create", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o", "encrypt.format=aes,encrypt.key-secret=s", "aes.qcow2", "1M")
	open("aes.qcow2", ErrEncrypted) // LUKS takes QEMU seconds to make; TestRefused has it
	sh(t, dir, "qemu-img", "create", "-f", "qcow", "old.qcow", "1M")
	open("old.qcow", ErrVersion)
	sh(t, dir, "qemu-img", "create", "-f", "qcow2", "-o", "lazy_refcounts=on", "dirty.qcow2", "1M")
	cmd := exec.Command("qemu-io", "-c", "write -P 5 0 64k", "-c", "flush", "-c", "abort", "dirty.qcow2")
	cmd.Dir = dir
	cmd.Run() // fails: it aborts
	open("dirty.qcow2", ErrDirty)
	sh(t, dir, "qemu-img", "check", "-r", "all", "dirty.qcow2")
	compare(t, dir, "dirty.qcow2", nil)

	// QEMU marks an image as corrupt when it meets a broken table while writing.
	sh(t, dir, "qemu-img", "create", "-f", "qcow2", "broken.qcow2", "1M")
	sh(t, dir, "qemu-io", "-c", "write -P 5 0 64k", "-f", "qcow2", "broken.qcow2")
	path := filepath.Join(dir, "broken.qcow2")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h, err := ReadHeader(bytes.NewReader(b), int64(len(b)), path)
	if err != nil {
		t.Fatal(err)
	}
	b[h.l1Offset+6] |= 2 // the L2 table lies 512 bytes beside its place
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.ReadAt(make([]byte, 1), 0); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a table beside its place: %v", err)
	}
	m.Close()
	exec.Command("qemu-io", "-c", "write 0 512", "-f", "qcow2", path).Run() // fails, and leaves its mark
	open("broken.qcow2", ErrMarked)
}
