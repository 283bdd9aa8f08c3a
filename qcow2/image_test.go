package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func mustNew(t testing.TB, file []byte, o Options) *Image {
	t.Helper()
	m, err := New(bytes.NewReader(file), int64(len(file)), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func mustRead(t testing.TB, m *Image) []byte {
	t.Helper()
	b := make([]byte, m.Size())
	if n, err := m.ReadAt(b, 0); n != len(b) || err != nil {
		t.Fatalf("read %d of %d bytes: %v", n, len(b), err)
	}
	return b
}

// TestModel: any image reads as its plan says, at any place, with caches too small for it.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := plan{version: rapid.IntRange(2, 3).Draw(t, "version"), bits: uint(rapid.IntRange(9, 15).Draw(t, "bits")), backing: "b"}
		if p.version == 3 {
			p.zstd = rapid.Bool().Draw(t, "zstd")
			p.ext = p.bits >= minExtCluster && rapid.Bool().Draw(t, "extended")
		}
		p.cells = rapid.SliceOfN(rapid.Custom(func(t *rapid.T) cell {
			c := cell{kind: Kind(rapid.IntRange(0, 2).Draw(t, "kind")), packed: rapid.IntRange(0, 3).Draw(t, "packed") == 0}
			if p.version == 2 && c.kind == Zero {
				c.kind = Absent
			}
			c.alloc = rapid.Uint32().Draw(t, "allocated")
			c.zero = rapid.Uint32().Draw(t, "zero") &^ c.alloc
			return c
		}), 1, 200>>(p.bits/2)).Draw(t, "clusters")
		p.size = int64(len(p.cells))<<p.bits - int64(rapid.IntRange(0, 511).Draw(t, "cut"))
		file, want := p.build()
		m, err := New(bytes.NewReader(file), int64(len(file)), Options{Backing: backingFile{}, TableMemory: 1, ClusterMemory: 1})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		for range 10 {
			off := rapid.Int64Range(0, p.size).Draw(t, "offset")
			n := rapid.Int64Range(0, min(p.size, 70000)).Draw(t, "length")
			got := make([]byte, n)
			k, err := m.ReadAt(got, off)
			short := n > p.size-off
			if int64(k) != min(n, p.size-off) || short != (err == io.EOF) || err != nil && !short {
				t.Fatalf("ReadAt(%d bytes, %d) of %d = %d, %v", n, off, p.size, k, err)
			}
			if !bytes.Equal(got[:k], want[off:off+int64(k)]) {
				t.Fatalf("%d bytes at %d are not what the plan says", n, off)
			}
		}
		checkExtents(t, m, p)
	})
}

// checkExtents compares Extents with the plan, byte for byte.
func checkExtents(t *rapid.T, m *Image, p plan) {
	next, last := int64(0), Kind(99)
	err := m.Extents(context.Background(), 0, p.size, func(e Extent) error {
		if e.Start != next || e.Length <= 0 || e.Kind == last {
			t.Fatalf("extent %v after %v up to %d", e, last, next)
		}
		next, last = e.Start+e.Length, e.Kind
		for off := e.Start; off < next; off += 256 {
			c := p.cells[off>>p.bits]
			want := c.kind
			if p.ext && !c.packed {
				s := off & (1<<p.bits - 1) * subclusters >> p.bits
				want = Kind(c.zero>>s&1) + Kind(c.alloc>>s&1)*2
			}
			if c.packed {
				want = Data
			}
			if e.Kind != want {
				t.Fatalf("byte %d is %v, the plan says %v", off, e.Kind, want)
			}
		}
		return nil
	})
	if err != nil || next != p.size {
		t.Fatalf("extents end at %d of %d: %v", next, p.size, err)
	}
}

// TestConcurrent reads the same clusters from many goroutines, with caches too small, and closes the image in the middle.
func TestConcurrent(t *testing.T) {
	for _, zstd := range []bool{false, true} {
		p := mixed(3, 12, zstd, false, 100)
		file, want := p.build()
		m := mustNew(t, file, Options{Backing: backingFile{}, TableMemory: 1, ClusterMemory: 1 << 14})
		var wg sync.WaitGroup
		var closing atomic.Bool
		for g := range 8 {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(1, uint64(g)))
				b := make([]byte, 20000)
				for i := range 200 {
					off := rng.Int64N(p.size - int64(len(b)))
					_, err := m.ReadAt(b, off)
					if errors.Is(err, ErrClosed) && closing.Load() {
						return
					}
					if err != nil || !bytes.Equal(b, want[off:off+int64(len(b))]) {
						t.Errorf("at %d: %v", off, err)
						return
					}
					if g == 0 && i == 150 {
						closing.Store(true)
						m.Close()
					}
				}
			})
		}
		wg.Wait()
		if _, err := m.ReadAt(make([]byte, 1), 0); !errors.Is(err, ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
		if err := m.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
	}
}

// TestAllocs: reads of plain clusters, zeros and cached compressed ones allocate nothing.
func TestAllocs(t *testing.T) {
	for _, c := range []cell{{kind: Data}, {kind: Zero}, {kind: Absent}, {packed: true}} {
		p := plan{version: 3, bits: 16, size: 4 << 16, cells: []cell{c, c, c, c}}
		file, _ := p.build()
		m := mustNew(t, file, Options{Backing: backingFile{}})
		b := make([]byte, 4096)
		n := testing.AllocsPerRun(100, func() {
			if _, err := m.ReadAt(b, 70000); err != nil {
				t.Fatal(err)
			}
		})
		if n != 0 {
			t.Errorf("%+v: %v allocations a read", c, n)
		}
	}
}

func TestReadAtEdges(t *testing.T) {
	p := mixed(3, 9, false, false, 4)
	file, _ := p.build()
	m := mustNew(t, file, Options{Backing: backingFile{}})
	if m.Size() != p.size || m.Header().Backing != "base.img" || m.Header().ClusterSize != 512 {
		t.Errorf("header: %+v", m.Header())
	}
	if _, err := m.ReadAt(make([]byte, 1), -1); !errors.Is(err, ErrRange) {
		t.Errorf("negative offset: %v", err)
	}
	for _, off := range []int64{p.size, p.size + 1, 1<<63 - 1} {
		if n, err := m.ReadAt(make([]byte, 1), off); n != 0 || err != io.EOF {
			t.Errorf("at %d: %d, %v", off, n, err)
		}
		if n, err := m.ReadAt(nil, off); n != 0 || err != nil {
			t.Errorf("nothing at %d: %d, %v", off, n, err)
		}
	}
	nop := func(Extent) error { return nil }
	for _, r := range [][2]int64{{-1, 1}, {0, -1}, {0, p.size + 1}, {p.size + 1, 0}, {1, 1<<63 - 1}} {
		if err := m.Extents(t.Context(), r[0], r[1], nop); !errors.Is(err, ErrRange) {
			t.Errorf("extents of %v: %v", r, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.Extents(ctx, 0, p.size, nop); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	stop := errors.New("stop")
	if err := m.Extents(t.Context(), 0, p.size, func(Extent) error { return stop }); err != stop {
		t.Errorf("stopped: %v", err)
	}
}

// failing fails reads at or beyond an offset.
type failing struct {
	io.ReaderAt
	from int64
}

var errDisk = errors.New("disk on fire")

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off >= f.from {
		return 0, errDisk
	}
	return f.ReaderAt.ReadAt(p, off)
}

// TestReadErrors: an error of the file arrives, wherever it comes from, with the count of the good bytes before it.
func TestReadErrors(t *testing.T) {
	p := plan{version: 3, bits: 9, size: 4 * 512, cells: []cell{{kind: Data}, {packed: true}, {kind: Absent}, {kind: Data}}}
	file, _ := p.build()
	for from := int64(0); from < int64(len(file)); from += 512 {
		m, err := New(failing{bytes.NewReader(file), from}, int64(len(file)), Options{Name: "x.qcow2"})
		if err == nil {
			var n int
			n, err = m.ReadAt(make([]byte, p.size), 0)
			if n%512 != 0 {
				t.Errorf("broken from %d: %d good bytes", from, n)
			}
			m.Close()
		}
		if !errors.Is(err, errDisk) || !errors.Is(err, ErrRead) || !strings.Contains(err.Error(), "x.qcow2: ") {
			t.Errorf("broken from %d: %v", from, err)
		}
	}
	m := mustNew(t, file, Options{Backing: failing{bytes.NewReader(nil), 0}})
	if n, err := m.ReadAt(make([]byte, p.size), 0); n != 1024 || !errors.Is(err, errDisk) || !strings.Contains(err.Error(), "backing file") {
		t.Errorf("backing: %d, %v", n, err)
	}
	// A backing file that ends shows zeros there.
	m = mustNew(t, file, Options{Backing: strings.NewReader(strings.Repeat("x", 1030))})
	b := mustRead(t, m)[1024:1536]
	if string(b[:6]) != "xxxxxx" || !bytes.Equal(b[6:], make([]byte, 506)) {
		t.Errorf("a short backing file: %q", b)
	}
}

// TestRefused: each field out of bounds, with its kind of error, in a sentence that names file, field and remedy.
func TestRefused(t *testing.T) {
	be := binary.BigEndian
	u32 := func(off int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { be.PutUint32(b[off:], v); return b }
	}
	u64 := func(off int, v uint64) func([]byte) []byte {
		return func(b []byte) []byte { be.PutUint64(b[off:], v); return b }
	}
	const l1, l2 = 512, 1024 // of an image with clusters of 512 bytes
	for _, c := range []struct {
		name  string
		mod   func([]byte) []byte
		kind  error
		field string
	}{
		{"empty", func(b []byte) []byte { return nil }, ErrNotQCOW2, "magic"},
		{"other", func(b []byte) []byte { b[0]++; return b }, ErrNotQCOW2, "magic"},
		{"qcow", u32(4, 1), ErrVersion, "version"},
		{"later", u32(4, 4), ErrVersion, "version"},
		{"cut header", func(b []byte) []byte { return b[:80] }, ErrTruncated, "header"},
		{"tiny clusters", u32(20, 8), ErrHeader, "cluster_bits"},
		{"huge clusters", u32(20, 22), ErrHeader, "cluster_bits"},
		{"absurd clusters", u32(20, 1<<31), ErrHeader, "cluster_bits"},
		{"huge disk", u64(24, 1<<63), ErrHeader, "size"},
		{"large disk", u64(24, 1<<62), ErrHeader, "l1_size"},
		{"aes", u32(32, 1), ErrEncrypted, "crypt_method"},
		{"luks", u32(32, 2), ErrEncrypted, "crypt_method"},
		{"long L1", u32(36, 1<<23), ErrHeader, "l1_size"},
		{"short L1", u32(36, 0), ErrHeader, "l1_size"},
		{"crooked L1", u64(40, 513), ErrHeader, "l1_table_offset"},
		{"negative L1", u64(40, 1<<63), ErrHeader, "l1_table_offset"},
		{"no L1", u64(40, 0), ErrHeader, "l1_table_offset"},
		{"far L1", u64(40, 1<<40), ErrTruncated, "L1 table"},
		{"farthest L1", u64(40, 1<<63-512), ErrTruncated, "L1 table"},
		{"dirty", u64(72, featDirty), ErrDirty, "incompatible_features"},
		{"corrupt", u64(72, featCorrupt), ErrMarked, "incompatible_features"},
		{"external", u64(72, featExternal), ErrExternalData, "incompatible_features"},
		{"unknown", u64(72, 1<<5), ErrFeature, "incompatible_features"},
		{"highest", u64(72, 1<<63), ErrFeature, "incompatible_features"},
		{"subclusters", u64(72, featExtendedL2), ErrHeader, "cluster_bits"},
		{"zlib said twice", u64(72, featCompression), ErrHeader, "compression_type"},
		{"zstd not said", func(b []byte) []byte { b[104] = 1; return b }, ErrHeader, "compression_type"},
		{"other compression", func(b []byte) []byte { b[104] = 2; b[79] = featCompression; return b }, ErrFeature, "compression_type"},
		{"short header", u32(100, 96), ErrHeader, "header_length"},
		{"crooked header", u32(100, 105), ErrHeader, "header_length"},
		{"long header", u32(100, 520), ErrHeader, "header_length"},
		{"backing", func(b []byte) []byte { be.PutUint32(b[16:], 1); return u64(8, 200)(b) }, ErrBacking, "backing file"},
		{"long backing", func(b []byte) []byte { be.PutUint32(b[16:], 1024); return u64(8, 200)(b) }, ErrHeader, "backing_file_offset"},
		{"far backing", func(b []byte) []byte { be.PutUint32(b[16:], 1); return u64(8, 1<<63)(b) }, ErrHeader, "backing_file_offset"},
		{"cut backing", func(b []byte) []byte { be.PutUint32(b[16:], 2); return u64(8, 511)(b) }, ErrHeader, "backing_file_offset"},
		{"backing in header", func(b []byte) []byte { be.PutUint32(b[16:], 2); return u64(8, 100)(b) }, ErrHeader, "backing_file_offset"},
		{"long extension", func(b []byte) []byte { be.PutUint32(b[112:], 7); return u32(116, 1000)(b) }, ErrHeader, "header extension"},
		{"longest extension", func(b []byte) []byte { be.PutUint32(b[112:], 7); return u32(116, 1<<32-1)(b) }, ErrHeader, "header extension"},
		{"L1 reserved", u64(l1, 1<<60|l2), ErrCorrupt, "L1 table"},
		{"L1 low", u64(l1, l2|1), ErrCorrupt, "L1 table"},
		{"far L2", u64(l1, 1<<40), ErrTruncated, "L2 table"},
		{"farthest L2", u64(l1, 1<<56-512), ErrTruncated, "L2 table"},
		{"L2 reserved", u64(l2, 1<<57|l2), ErrCorrupt, "L2 table"},
		{"L2 low", u64(l2, l2|2), ErrCorrupt, "L2 table"},
		{"data in the header", u64(l2, flagCopied), ErrCorrupt, "L2 table"},
		{"far data", u64(l2, 1<<40), ErrTruncated, "data cluster"},
		{"far compressed", u64(l2, flagCompressed|1<<40), ErrTruncated, "compressed cluster"},
		{"not compressed", u64(l2, flagCompressed|l2), ErrCompressed, "compressed cluster"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := plan{version: 3, bits: 9, size: 1000, cells: []cell{{kind: Data}, {kind: Data}}}
			file, _ := p.build()
			file = c.mod(file)
			m, err := New(bytes.NewReader(file), int64(len(file)), Options{Name: "x.qcow2"})
			if err == nil {
				var n int
				n, err = m.ReadAt(make([]byte, p.size), 0)
				if n != 0 {
					t.Errorf("%d bytes were read", n)
				}
				m.Close()
			}
			var e *Error
			if !errors.Is(err, c.kind) || !errors.As(err, &e) || e.Field != c.field || e.Name != "x.qcow2" {
				t.Fatalf("%v (%+v)", err, e)
			}
			if e.Remedy == "" && c.kind != ErrNotQCOW2 {
				t.Errorf("no remedy: %v", err)
			}
		})
	}
}

func TestRefusedV2AndExtended(t *testing.T) {
	read := func(p plan, at int, e uint64) error {
		file, _ := p.build()
		binary.BigEndian.PutUint64(file[at:], e)
		m := mustNew(t, file, Options{})
		_, err := m.ReadAt(make([]byte, 1), 0)
		return err
	}
	if err := read(plan{version: 2, bits: 9, size: 512, cells: []cell{{}}}, 1024, flagZero); !errors.Is(err, ErrCorrupt) {
		t.Errorf("zero cluster of version 2: %v", err)
	}
	ext := plan{version: 3, bits: 14, ext: true, size: 512, cells: []cell{{alloc: 1}}}
	if err := read(ext, 2<<14+8, 1<<32|1); !errors.Is(err, ErrCorrupt) {
		t.Errorf("subcluster both zero and data: %v", err)
	}
	if err := read(ext, 2<<14, 0); !errors.Is(err, ErrCorrupt) {
		t.Errorf("data without a place: %v", err)
	}
	if err := read(ext, 2<<14, flagZero|3<<14); !errors.Is(err, ErrCorrupt) {
		t.Errorf("the zero flag beside subclusters: %v", err)
	}
}

// TestFeatureNames: what an image calls its unknown features is told.
func TestFeatureNames(t *testing.T) {
	p := plan{version: 3, bits: 9, size: 512, cells: []cell{{}}}
	file, _ := p.build()
	be := binary.BigEndian
	be.PutUint64(file[72:], 1<<40|1<<6)
	be.PutUint32(file[112:], extFeatureNames)
	be.PutUint32(file[116:], 48)
	file[121] = 40
	copy(file[122:], "quantum")
	_, err := New(bytes.NewReader(file), int64(len(file)), Options{})
	if !errors.Is(err, ErrFeature) || !strings.Contains(err.Error(), `bit 6, bit 40 "quantum"`) {
		t.Error(err)
	}
}

// TestLastCluster: QEMU writes no more of the last cluster than the disk needs.
func TestLastCluster(t *testing.T) {
	p := plan{version: 3, bits: 12, size: 4096, cells: []cell{{kind: Data}}}
	file, want := p.build()
	m := mustNew(t, file[:len(file)-1000], Options{})
	clear(want[3096:])
	if !bytes.Equal(mustRead(t, m), want) {
		t.Error("what the file has not of its last cluster is not zeros")
	}
}

func TestOpen(t *testing.T) {
	p := mixed(3, 12, true, false, 20)
	file, want := p.build()
	path := filepath.Join(t.TempDir(), "a.qcow2")
	if _, err := Open(path, Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, Options{}); !errors.Is(err, ErrBacking) || !strings.Contains(err.Error(), path+": ") {
		t.Error(err)
	}
	m, err := Open(path, Options{Backing: backingFile{}})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(mustRead(t, m), want) {
		t.Error("contents differ")
	}
	if m.Close() != nil || m.Close() != nil {
		t.Error("Close fails")
	}
}

// giant is a file of 1<<62 bytes: a header, and the same bytes all over.
type giant struct {
	head  []byte
	page  []byte // what all of the rest repeats; begins at a multiple of 8
	reads int64
	bytes int64
}

func (g *giant) ReadAt(p []byte, off int64) (int, error) {
	g.reads++
	g.bytes += int64(len(p))
	n := 0
	if off < int64(len(g.head)) {
		n = copy(p, g.head[off:]) // a multiple of 8
	}
	for n < len(p) {
		n += copy(p[n:], g.page[(off+int64(n))%8:])
	}
	return len(p), nil
}

// TestHostile: an image that claims to be as large as images can be is opened and read with bounded memory and reads.
func TestHostile(t *testing.T) {
	for _, bits := range []uint{9, 16, 21} {
		for _, entry := range []uint64{0, 1 << 21, 1<<21 | flagCopied, 1<<56 - 1<<21, ^uint64(0)} {
			t.Run(fmt.Sprintf("%d %#x", bits, entry), func(t *testing.T) {
				p := plan{version: 3, bits: bits, cells: []cell{{}}}
				cs := int64(1) << bits
				p.size = min(maxL1Bytes/8*cs/8*cs, 1<<62)
				head, _ := plan{version: 3, bits: bits, cells: []cell{{}}}.build()
				head = head[:cs]
				binary.BigEndian.PutUint64(head[24:], uint64(p.size))
				binary.BigEndian.PutUint32(head[36:], maxL1Bytes/8)
				g := &giant{head: head, page: bytes.Repeat(binary.BigEndian.AppendUint64(nil, entry), 1<<10)}
				m, err := New(g, 1<<62, Options{})
				if err != nil {
					t.Fatal(err)
				}
				defer m.Close()
				if g.bytes > maxL1Bytes+3<<20 {
					t.Errorf("Open read %d bytes", g.bytes)
				}
				g.reads, g.bytes = 0, 0
				b := make([]byte, 4096)
				for i := range int64(1000) {
					_, err := m.ReadAt(b, p.size/1000*i)
					if err != nil && !errors.Is(err, ErrCorrupt) {
						t.Fatal(err)
					}
				}
				if limit := int64(1000 * (4096/512 + 1) * 2); g.reads > limit || g.bytes > limit*4096 {
					t.Errorf("%d reads, %d bytes", g.reads, g.bytes)
				}
				held := int64(len(m.tables.slots))*m.sliceLen + int64(len(m.clusters.slots))*cs
				if held > 4<<20+16<<20 {
					t.Errorf("caches may grow to %d bytes", held)
				}
			})
		}
	}
}

// FuzzOpen: no file makes the reader panic, read without end or keep more than its bounds; what it reads twice is the same.
func FuzzOpen(f *testing.F) {
	for _, p := range []plan{
		mixed(2, 9, false, false, 20), mixed(3, 9, true, false, 20), mixed(3, 12, false, false, 5),
		mixed(3, 14, true, true, 2), mixed(3, 14, false, true, 2),
	} {
		file, _ := p.build()
		f.Add(file)
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		if len(file) > 1<<20 {
			return
		}
		m, err := New(bytes.NewReader(file), int64(len(file)), Options{Backing: backingFile{}, ClusterMemory: 1, TableMemory: 1})
		if err != nil {
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("%T: %v", err, err)
			}
			return
		}
		defer m.Close()
		if int64(len(m.l1))*8 > int64(len(file)) {
			t.Fatalf("%d L1 entries of %d bytes", len(m.l1), len(file))
		}
		a, b := make([]byte, 1<<16), make([]byte, 1<<16)
		for _, off := range []int64{0, m.Size() / 2, max(m.Size()-1000, 0)} {
			n, err := m.ReadAt(a, off)
			k, err2 := m.ReadAt(b, off)
			if n != k || (err == nil) != (err2 == nil) || !bytes.Equal(a[:n], b[:n]) {
				t.Fatalf("at %d: %d, %v and then %d, %v", off, n, err, k, err2)
			}
			if err != nil && err != io.EOF && !errors.As(err, new(*Error)) {
				t.Fatalf("%T: %v", err, err)
			}
		}
		count, next := 0, int64(0)
		stop := errors.New("enough")
		err = m.Extents(t.Context(), 0, min(m.Size(), 1<<24), func(e Extent) error {
			if e.Start != next || e.Length <= 0 {
				t.Fatalf("extent %v after %d", e, next)
			}
			next = e.Start + e.Length
			if count++; count > 10000 {
				return stop
			}
			return nil
		})
		if err != nil && err != stop && !errors.As(err, new(*Error)) {
			t.Fatalf("%T: %v", err, err)
		}
	})
}
