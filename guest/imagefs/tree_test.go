package imagefs_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	fstest "github.com/hugelgupf/p9/fsimpl/test"
	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
	"go.uber.org/goleak"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest/imagefs"
	"github.com/moovm/moovm/virtio9p"
	"github.com/moovm/moovm/virtio9p/virtio9ptest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const diskSize = 4 << 20

// chain makes base.img ← mid.cow ← top.cow and opens the last one.
func chain(t testing.TB, top cowdisk.Variant) *cowdisk.Disk {
	t.Helper()
	dir := t.TempDir()
	base := filepath.Join(dir, "base.img")
	if err := os.WriteFile(base, bytes.Repeat([]byte("base"), diskSize/4), 0o666); err != nil {
		t.Fatal(err)
	}
	mid := filepath.Join(dir, "mid.cow")
	if err := cowdisk.Create(mid, cowdisk.CreateOptions{Backing: "base.img"}); err != nil {
		t.Fatal(err)
	}
	d, err := cowdisk.Open(mid, cowdisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(bytes.Repeat([]byte("mid!"), 1024), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.Flush(), d.Close()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "top.cow")
	if err := cowdisk.Create(path, cowdisk.CreateOptions{Backing: "mid.cow", BackingFormat: cowdisk.FormatCOW, Variant: top}); err != nil {
		t.Fatal(err)
	}
	d, err = cowdisk.Open(path, cowdisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func tree(t testing.TB, disks ...imagefs.Disk) *imagefs.Tree {
	t.Helper()
	tr, err := imagefs.New("1.2.3", disks...)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func walk(t testing.TB, a p9.Attacher, path string) p9.File {
	t.Helper()
	root, err := a.Attach()
	if err != nil {
		t.Fatal(err)
	}
	_, f, err := root.Walk(strings.Split(path, "/"))
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return f
}

func stat(t testing.TB, f p9.File) p9.Attr {
	t.Helper()
	_, _, attr, err := f.GetAttr(p9.AttrMaskAll)
	if err != nil {
		t.Fatal(err)
	}
	return attr
}

func mtime(t testing.TB, f p9.File) time.Time {
	a := stat(t, f)
	return time.Unix(int64(a.MTimeSeconds), int64(a.MTimeNanoSeconds))
}

func open(t testing.TB, a p9.Attacher, path string) p9.File {
	t.Helper()
	f := walk(t, a, path)
	if _, _, err := f.Open(p9.ReadOnly); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return f
}

func contents(t testing.TB, f p9.File) string {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<62))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func read(t testing.TB, a p9.Attacher, path string) string {
	t.Helper()
	f := open(t, a, path)
	if size := stat(t, walk(t, a, path)).Size; size != uint64(len(contents(t, f))) {
		t.Errorf("%s: stat says %d bytes, there are %d", path, size, len(contents(t, f)))
	}
	return contents(t, f)
}

func names(t testing.TB, a p9.Attacher, path string) string {
	t.Helper()
	f := open(t, a, path)
	var names []string
	for off := uint64(0); ; {
		ds, err := f.Readdir(off, 60) // a few at a time
		if err != nil {
			t.Fatal(err)
		}
		if len(ds) == 0 {
			return strings.Join(names, " ")
		}
		for _, d := range ds {
			names = append(names, d.Name)
			off = d.Offset
		}
	}
}

const files = "allocated backing_file bitmap format header info map mtime read_only sector_size serial size stats variant"

func TestTree(t *testing.T) {
	d := chain(t, cowdisk.QEMUV2)
	a := tree(t,
		imagefs.Disk{Name: "vda", Serial: "root/disk", Image: imagefs.COW(d), Stats: func() []imagefs.Counter {
			return []imagefs.Counter{{"reads", 3}, {"writes", 4}}
		}},
		imagefs.Disk{Name: "vdb", Serial: "..", ReadOnly: true, Image: imagefs.COW(d)},
		imagefs.Disk{Name: "vdc", Serial: "..", Image: imagefs.COW(d)},
		imagefs.Disk{Name: "vdd", Image: imagefs.COW(d)})
	for path, want := range map[string]string{
		"disks":             "by-serial vda vdb vdc vdd",
		"disks/by-serial":   "root_disk __ __~2",
		"disks/vda":         files + " chain",
		"disks/vda/chain":   "0 1 2",
		"disks/vda/chain/0": files,
		"disks/vda/chain/2": files,
	} {
		if got := names(t, a, path); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
	for path, want := range map[string]string{
		"version":                     "moovm 1.2.3\n",
		"disks/vda/format":            "cow\n",
		"disks/vda/variant":           "qemu-v2\n",
		"disks/vda/size":              fmt.Sprintln(diskSize),
		"disks/vda/sector_size":       "512\n",
		"disks/vda/backing_file":      "mid.cow\n",
		"disks/vda/serial":            "root/disk\n",
		"disks/vda/read_only":         "0\n",
		"disks/vdb/read_only":         "1\n",
		"disks/vda/allocated":         "0\n",
		"disks/vda/stats":             "reads 3\nwrites 4\ncopy_ups 0\n",
		"disks/vda/mtime":             fmt.Sprintln(d.Info().FormatSpecific.MTime),
		"disks/vda/header":            string(d.HeaderBytes()),
		"disks/vda/bitmap":            string(make([]byte, diskSize/512/8)),
		"disks/vda/chain/0/header":    string(d.HeaderBytes()),
		"disks/vda/chain/1/allocated": "8\n",
		"disks/vda/chain/1/read_only": "1\n",
		"disks/vda/chain/1/stats":     "",
		"disks/vda/chain/2/format":    "raw\n",
		"disks/vda/chain/2/variant":   "raw\n",
		"disks/vda/chain/2/header":    "",
		"disks/vda/chain/2/bitmap":    "",
		"disks/vda/chain/2/mtime":     "0\n",
	} {
		if got := read(t, a, path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	link, err := walk(t, a, "disks/by-serial/__~2").Readlink()
	if err != nil || link != "../vdc" {
		t.Errorf("by-serial/__~2: %q, %v", link, err)
	}
	var extents []cowdisk.Extent
	if err := json.Unmarshal([]byte(read(t, a, "disks/vda/map")), &extents); err != nil {
		t.Fatal(err)
	}
	if len(extents) != 3 || extents[1].Start != 1<<20 || extents[1].Length != 4096 || extents[1].Depth != 1 || extents[1].Filename != "mid.cow" {
		t.Errorf("map: %+v", extents)
	}
}

func TestNewErrors(t *testing.T) {
	img := imagefs.COW(chain(t, cowdisk.QEMUV2))
	for _, disks := range [][]imagefs.Disk{
		{{Name: "vda"}},
		{{Name: "", Image: img}},
		{{Name: "..", Image: img}},
		{{Name: "a/b", Image: img}},
		{{Name: "by-serial", Image: img}},
		{{Name: "vda", Image: img}, {Name: "vda", Image: img}},
	} {
		if _, err := imagefs.New("", disks...); !errors.Is(err, imagefs.ErrDisk) {
			t.Errorf("%+v: %v", disks, err)
		}
	}
}

// Every layout of the header shows itself.
func TestVariants(t *testing.T) {
	for _, v := range []cowdisk.Variant{cowdisk.QEMUV2, cowdisk.UMLV3} {
		d := chain(t, v)
		a := tree(t, imagefs.Disk{Name: "vda", Image: imagefs.COW(d), RevealPaths: true})
		if got := read(t, a, "disks/vda/variant"); got != v.String()+"\n" {
			t.Errorf("variant %q, want %v", got, v)
		}
		want, err := json.Marshal(d.Info())
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		if err := json.Compact(&got, []byte(read(t, a, "disks/vda/info"))); err != nil || got.String() != string(want) {
			t.Errorf("info %s, want %s (%v)", &got, want, err)
		}
	}
}

// Without RevealPaths nothing in the tree names a folder of the host, unless
// the image does.
func TestPathsHidden(t *testing.T) {
	d := chain(t, cowdisk.QEMUV2)
	dir := filepath.Dir(d.Path())
	for _, reveal := range []bool{false, true} {
		a := tree(t, imagefs.Disk{Name: "vda", Image: imagefs.COW(d), RevealPaths: reveal})
		found := 0
		for _, layer := range []string{"", "/chain/0", "/chain/1", "/chain/2"} {
			for _, name := range strings.Fields(files) {
				if strings.Contains(read(t, a, "disks/vda"+layer+"/"+name), dir) {
					found++
				}
			}
		}
		if (found > 0) != reveal {
			t.Errorf("RevealPaths %v: %d files name %s", reveal, found, dir)
		}
	}
}

// A read after a write shows it, sizes and times follow, and what is open
// stays as it was.
func TestLive(t *testing.T) {
	d := chain(t, cowdisk.QEMUV2)
	var writes uint64
	a := tree(t, imagefs.Disk{Name: "vda", Image: imagefs.COW(d), Stats: func() []imagefs.Counter {
		return []imagefs.Counter{{"writes", writes}}
	}})
	paths := []string{"allocated", "bitmap", "map", "info", "stats", "chain/0/allocated", "chain/0/map", "chain/0/bitmap"}
	times := make(map[string]time.Time)
	before := make(map[string]string)
	opened := make(map[string]p9.File)
	for _, p := range paths {
		times[p] = mtime(t, walk(t, a, "disks/vda/"+p))
		before[p] = read(t, a, "disks/vda/"+p)
		opened[p] = open(t, a, "disks/vda/"+p)
		if again := mtime(t, walk(t, a, "disks/vda/"+p)); !again.Equal(times[p]) {
			t.Errorf("%s: mtime moved without a reason", p)
		}
	}
	baseTime := mtime(t, walk(t, a, "disks/vda/chain/2/map"))
	if _, err := d.WriteAt(make([]byte, 512), 8*512); err != nil {
		t.Fatal(err)
	}
	writes = 1
	for _, p := range paths {
		if got := read(t, a, "disks/vda/"+p); got == before[p] {
			t.Errorf("%s did not change", p)
		}
		if !mtime(t, walk(t, a, "disks/vda/"+p)).After(times[p]) {
			t.Errorf("%s: mtime did not move", p)
		}
		if got := contents(t, opened[p]); (got == before[p]) == strings.HasSuffix(p, "bitmap") {
			t.Errorf("%s: what was opened before is %q", p, got)
		}
		if got := stat(t, opened[p]).Size; got != uint64(len(before[p])) {
			t.Errorf("%s: what was opened before has size %d", p, got)
		}
	}
	if got := read(t, a, "disks/vda/allocated"); got != "8\n" {
		t.Errorf("allocated %q", got)
	}
	if got := read(t, a, "disks/vda/bitmap"); got[1] != 0xff {
		t.Errorf("bitmap %x", got[:4])
	}
	if got := mtime(t, walk(t, a, "disks/vda/chain/2/map")); !got.Equal(baseTime) {
		t.Error("the base's map moved")
	}
}

func TestReadOnly(t *testing.T) {
	a := tree(t, imagefs.Disk{Name: "vda", Image: imagefs.COW(chain(t, cowdisk.QEMUV2))})
	through := virtio9ptest.Start(t, device(t, a), 8192, virtio9ptest.Whole).Client()
	root, err := through.Attach("")
	if err != nil {
		t.Fatal(err)
	}
	_, dir, err := root.Walk([]string{"disks", "vda"})
	if err != nil {
		t.Fatal(err)
	}
	_, info, err := dir.Walk([]string{"info"})
	if err != nil {
		t.Fatal(err)
	}
	is := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, linux.EROFS) {
			t.Errorf("%s: %v, want EROFS", what, err)
		}
	}
	_, _, err = info.Open(p9.WriteOnly)
	is("open for writing", err)
	_, _, err = info.Open(p9.ReadWrite)
	is("open for both", err)
	_, _, err = info.Open(p9.ReadOnly | 0o1000)
	is("truncate", err)
	is("chmod", info.SetAttr(p9.SetAttrMask{Permissions: true}, p9.SetAttr{Permissions: 0o777}))
	is("unlink", dir.UnlinkAt("info", 0))
	is("rename", dir.RenameAt("info", dir, "x"))
	_, err = dir.Mkdir("x", 0o755, 0, 0)
	is("mkdir", err)
	_, err = dir.Symlink("x", "y", 0, 0)
	is("symlink", err)
	_, err = dir.Mknod("x", p9.ModeNamedPipe, 0, 0, 0, 0)
	is("mknod", err)
	is("link", dir.Link(info, "x"))
	_, _, _, err = dir.Create("x", p9.ReadWrite, 0o644, 0, 0)
	is("create", err)
}

func device(t testing.TB, a p9.Attacher) *virtio9p.Device {
	t.Helper()
	d, err := virtio9p.New(virtio9p.Config{Tag: "moovm", Attacher: a})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

type clientAttacher struct{ c *p9.Client }

func (a clientAttacher) Attach() (p9.File, error) { return a.c.Attach("") }

// The p9 library's suite, directly and through the device.
func TestSuite(t *testing.T) {
	d := chain(t, cowdisk.QEMUV2)
	a := tree(t, imagefs.Disk{Name: "vda", Serial: "x", Image: imagefs.COW(d)})
	c := virtio9ptest.Start(t, device(t, a), 8192, virtio9ptest.Splinters).Client()
	for name, a := range map[string]p9.Attacher{"direct": a, "device": clientAttacher{c}} {
		t.Run(name, func(t *testing.T) {
			mask := p9.AttrMask{Mode: true, Size: true}
			fstest.TestReadOnlyFS(t, a,
				fstest.WithDir("", "version", "disks"),
				fstest.WithDir("disks", "vda", "by-serial"),
				fstest.WithDir("disks/vda", strings.Fields(files+" chain")...),
				fstest.WithFile("version", "moovm 1.2.3\n", p9.Attr{Mode: p9.ModeRegular | 0o444, Size: 12}, mask),
				fstest.WithFile("disks/vda/chain/0/header", string(d.HeaderBytes()), p9.Attr{Mode: p9.ModeRegular | 0o444, Size: 1056}, mask),
				fstest.WithSymlink("disks/by-serial/x", "../vda", p9.Attr{Mode: p9.ModeSymlink | 0o777, Size: 6}, mask))
		})
	}
}

// manyExtents is a disk whose sectors are each an extent.
type manyExtents struct {
	imagefs.Image
	n     int64
	calls int
	most  int // extents yielded by one call
}

func (m *manyExtents) Size() int64            { return m.n * 512 }
func (m *manyExtents) Chain() []imagefs.Layer { return []imagefs.Layer{m} }
func (m *manyExtents) Extents(_ context.Context, off, n int64, yield func(cowdisk.Extent) error) error {
	m.calls++
	count := 0
	for ; n > 0; off, n = off+512, n-512 {
		count++
		m.most = max(m.most, count)
		if err := yield(cowdisk.Extent{Start: off, Length: 512, Depth: int(off / 512 % 2)}); err != nil {
			return err
		}
	}
	return nil
}

// A map too long to be held in memory is made piece by piece, and is the same
// whichever way it is read.
func TestLongMap(t *testing.T) {
	d := chain(t, cowdisk.QEMUV2)
	m := &manyExtents{Image: imagefs.COW(d), n: 50_000}
	a := tree(t, imagefs.Disk{Name: "vda", Image: m})
	whole := read(t, a, "disks/vda/map")
	if len(whole) < 2<<20 {
		t.Fatalf("a map of %d bytes is too short for this test", len(whole))
	}
	var extents []cowdisk.Extent
	if err := json.Unmarshal([]byte(whole), &extents); err != nil || len(extents) != 50_000 {
		t.Fatalf("%d extents, %v", len(extents), err)
	}
	if m.most > 2000 {
		t.Errorf("%d extents were made at once", m.most)
	}
	f := open(t, a, "disks/vda/map")
	b := make([]byte, 1000)
	for _, off := range []int{len(whole) - 1000, 0, 1 << 20, 1<<20 - 1000, len(whole) / 2, 64 << 10, 63 << 10} {
		if n, err := f.ReadAt(b, int64(off)); n != 1000 || string(b) != whole[off:off+1000] {
			t.Errorf("at %d: %d bytes, %v", off, n, err)
		}
	}
	if n, err := f.ReadAt(b, int64(len(whole))); n != 0 || err != io.EOF {
		t.Errorf("at the end: %d, %v", n, err)
	}
	if n, err := f.ReadAt(b, int64(len(whole)-10)); n != 10 || err != io.EOF {
		t.Errorf("near the end: %d, %v", n, err)
	}
	m.calls = 0
	for range 10 {
		stat(t, walk(t, a, "disks/vda/map"))
	}
	if m.calls != 0 {
		t.Errorf("asking for the size made the map again (%d)", m.calls)
	}
	m.n = 0
	if got := read(t, tree(t, imagefs.Disk{Name: "vda", Image: m}), "disks/vda/map"); got != "[]\n" {
		t.Errorf("the map of an empty disk is %q", got)
	}
}

// endless is a disk whose extents are never found.
type endless struct{ imagefs.Image }

func (endless) Extents(ctx context.Context, _, _ int64, _ func(cowdisk.Extent) error) error {
	<-ctx.Done()
	return ctx.Err()
}

// A chain that claims a size nobody can walk has no map; asking for it ends.
func TestEndlessMap(t *testing.T) {
	a := tree(t, imagefs.Disk{Name: "vda", Image: endless{imagefs.COW(chain(t, cowdisk.QEMUV2))}})
	imagefs.SetMaxWalk(a, time.Millisecond)
	stat(t, walk(t, a, "disks/vda/map"))
	f := open(t, a, "disks/vda/map")
	if n, err := f.ReadAt(make([]byte, 100), 0); n != 0 || !errors.Is(err, linux.EFBIG) {
		t.Errorf("read %d bytes, %v", n, err)
	}
}

// However many times a map is opened, one text per state of the disk is held;
// many states, and many short files, hold no more than a bound.
func TestMemoryHeld(t *testing.T) {
	d := chain(t, cowdisk.QEMUV2)
	m := &manyExtents{Image: imagefs.COW(d), n: 5000}
	changes := uint64(0)
	a := tree(t, imagefs.Disk{Name: "vda", Image: m, Stats: func() []imagefs.Counter {
		return []imagefs.Counter{{Name: "writes", Value: changes}}
	}})
	heap := func() uint64 {
		var s runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&s)
		return s.HeapAlloc
	}
	before := heap()
	m.calls = 0
	var files []p9.File
	for range 1000 {
		files = append(files, open(t, a, "disks/vda/map"))
	}
	if m.calls > 100 {
		t.Errorf("the map was walked %d times for one state", m.calls)
	}
	for range 300 { // 400 KB each
		changes++
		files = append(files, open(t, a, "disks/vda/map"))
	}
	want := contents(t, files[0])
	for range 300 {
		files = append(files, open(t, a, "disks/vda/info"), open(t, a, "disks/vda/header"))
	}
	for i, f := range files[:1300] {
		if i%50 == 0 {
			if got := contents(t, f); got != want {
				t.Errorf("map %d has %d bytes, want %d", i, len(got), len(want))
			}
		}
	}
	if got := contents(t, files[len(files)-2]); got != read(t, a, "disks/vda/info") {
		t.Errorf("info is %q", got)
	}
	if held := int64(heap() - before); held > 40<<20 {
		t.Errorf("%d open files hold %d MiB", len(files), held>>20)
	}
	for _, f := range files {
		f.Close()
	}
	if held := imagefs.Held(a); held != 0 {
		t.Errorf("%d bytes are held by nobody", held)
	}
	runtime.KeepAlive(files)
}

// The bitmap and the map of a disk of 1 TiB are never built whole in memory:
// the bitmap alone has 256 MiB.
func TestHugeDisk(t *testing.T) {
	const size = 1 << 40
	path := filepath.Join(t.TempDir(), "huge.cow")
	if err := cowdisk.Create(path, cowdisk.CreateOptions{Size: size}); err != nil {
		t.Fatal(err)
	}
	d, err := cowdisk.Open(path, cowdisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	last := int64(size - 4096)
	for _, off := range []int64{0, size / 2, last} {
		if _, err := d.WriteAt(make([]byte, 4096), off); err != nil {
			t.Fatal(err)
		}
	}
	many := &manyExtents{Image: imagefs.COW(d), n: 100_000}
	a := tree(t, imagefs.Disk{Name: "vda", Image: imagefs.COW(d)}, imagefs.Disk{Name: "vdb", Image: many})
	client := clientAttacher{virtio9ptest.Start(t, device(t, a), 262144, virtio9ptest.Whole).Client()}

	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if got := stat(t, walk(t, client, "disks/vda/bitmap")).Size; got != size/512/8 {
		t.Errorf("the bitmap has %d bytes", got)
	}
	f := open(t, client, "disks/vda/bitmap")
	b := make([]byte, 1000)
	for _, c := range []struct{ off, bit int64 }{{0, 0}, {size / 2 / 4096, 0}, {last/4096 - 999, 999}} {
		if n, err := f.ReadAt(b, c.off); n != 1000 || err != nil || b[c.bit] != 0xff || bytes.Count(b, []byte{0}) != 999 {
			t.Errorf("the bitmap at %d: %d bytes, %v, %x", c.off, n, err, b[c.bit])
		}
	}
	// As of each read, not of the opening.
	if _, err := d.WriteAt(make([]byte, 4096), 4096*5); err != nil {
		t.Fatal(err)
	}
	if n, err := f.ReadAt(b, 0); n != 1000 || err != nil || b[5] != 0xff {
		t.Errorf("the bitmap after a write: %d bytes, %v, %x", n, err, b[5])
	}
	var extents []cowdisk.Extent
	if err := json.Unmarshal([]byte(read(t, client, "disks/vda/map")), &extents); err != nil || len(extents) < 7 {
		t.Errorf("%d extents, %v", len(extents), err)
	}
	for i, e := range extents {
		b, err := json.Marshal(e)
		if err != nil || !strings.Contains(read(t, client, "disks/vda/map"), string(b)) {
			t.Errorf("extent %d is not as encoding/json writes it: %s (%v)", i, b, err)
		}
	}
	// A long map, read from its end backwards and then through.
	m := open(t, client, "disks/vdb/map")
	length := int64(stat(t, m).Size)
	if length < 6<<20 {
		t.Fatalf("a map of %d bytes is too short for this test", length)
	}
	for _, off := range []int64{length - 1000, length / 2, 0} {
		if n, err := m.ReadAt(b, off); n != 1000 || err != nil {
			t.Errorf("the map at %d: %d bytes, %v", off, n, err)
		}
	}
	if many.most > 3000 {
		t.Errorf("%d extents were made at once", many.most)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if held := int64(after.HeapAlloc) - int64(before.HeapAlloc); held > 16<<20 {
		t.Errorf("%d bytes are held", held)
	}
	if once := int64(after.TotalAlloc - before.TotalAlloc); once > 128<<20 {
		t.Errorf("%d bytes were allocated for a bitmap of %d", once, size/512/8)
	}
}
