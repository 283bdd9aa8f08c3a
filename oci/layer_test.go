package oci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/moovm/moovm/internal/ext4"
	"github.com/moovm/moovm/internal/ext4/ext4test"
	"github.com/moovm/moovm/oci/ocitest"
)

// memory is a sparse disk.
type memory struct{ blocks map[int64][]byte }

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		at := off + int64(n)
		b := m.blocks[at/4096]
		if b == nil {
			b = make([]byte, 4096)
			m.blocks[at/4096] = b
		}
		n += copy(b[at%4096:], p[n:])
	}
	return len(p), nil
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		at := off + int64(n)
		b := m.blocks[at/4096]
		if b == nil {
			b = make([]byte, 4096)
		}
		n += copy(p[n:], b[at%4096:])
	}
	return len(p), nil
}

// stack puts layers upon each other in memory.
func stack(l Limits, layers ...[]byte) (map[string]*ext4test.File, string, error) {
	disk := &memory{map[int64][]byte{}}
	files, path, err := stackOn(disk, l, layers...)
	return files, path, err
}

func stackOn(disk interface {
	io.WriterAt
	io.ReaderAt
}, l Limits, layers ...[]byte) (map[string]*ext4test.File, string, error) {
	l.setDefaults()
	w, err := ext4.New(disk, ext4.Options{Size: 32 << 20, MaxInodes: l.Files + 1})
	if err != nil {
		return nil, "", err
	}
	u := newUnpacker(w, l, ocitest.Time())
	for _, b := range layers {
		if path, err := u.layer(context.Background(), bytes.NewReader(b), func() {}); err != nil {
			return nil, path, err
		}
	}
	if _, err := w.Finish(); err != nil {
		return nil, "", err
	}
	files, err := ext4test.Read(disk)
	return files, "", err
}

// TestRefused has what hostile layers try.
func TestRefused(t *testing.T) {
	file := ocitest.File
	typed := func(kind byte, name string) ocitest.Entry {
		return ocitest.Entry{Header: tar.Header{Typeflag: kind, Name: name}}
	}
	owner := file("f", "")
	owner.Uid = -1
	large := file("f", "")
	large.PAXRecords = map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 5000)}
	for name, c := range map[string]struct {
		entries []ocitest.Entry
		want    error
	}{
		"out by its name":        {[]ocitest.Entry{file("../f", "")}, ErrUnsafe},
		"out in the middle":      {[]ocitest.Entry{file("a/../../f", "")}, ErrUnsafe},
		"out by a whiteout":      {[]ocitest.Entry{file("a/.wh...", "")}, ErrUnsafe},
		"a whiteout of itself":   {[]ocitest.Entry{file("a/.wh..", "")}, ErrUnsafe},
		"a whiteout of nothing":  {[]ocitest.Entry{file("a/.wh.", "")}, ErrUnsafe},
		"below a whiteout":       {[]ocitest.Entry{file(".wh.a/b", "")}, ErrUnsafe},
		"a long name":            {[]ocitest.Entry{file(strings.Repeat("a", 256), "")}, ErrUnsafe},
		"a long path":            {[]ocitest.Entry{file(strings.Repeat("a/", 2100)+"f", "")}, ErrUnsafe},
		"a link out":             {[]ocitest.Entry{ocitest.Link("l", "../../etc/passwd")}, ErrUnsafe},
		"a link to nothing":      {[]ocitest.Entry{ocitest.Link("l", "etc/passwd")}, ErrEntry},
		"a link to a folder":     {[]ocitest.Entry{ocitest.Dir("d"), ocitest.Link("l", "d")}, ErrEntry},
		"a link to the root":     {[]ocitest.Entry{ocitest.Link("l", "/")}, ErrEntry},
		"a link over its target": {[]ocitest.Entry{file("d/f", ""), ocitest.Link("d", "d/f")}, ErrEntry},
		"a loop":                 {[]ocitest.Entry{ocitest.Symlink("a", "b"), ocitest.Symlink("b", "a"), file("a/f", "")}, ErrUnsafe},
		"links without end":      {[]ocitest.Entry{ocitest.Symlink("a", "a/a/a/a"), file("a/f", "")}, ErrUnsafe},
		"below a file":           {[]ocitest.Entry{file("a", ""), file("a/f", "")}, ErrEntry},
		"an unknown type":        {[]ocitest.Entry{typed('Z', "z")}, ErrEntry},
		"the root as a file":     {[]ocitest.Entry{file(".", "")}, ErrEntry},
		"an owner below zero":    {[]ocitest.Entry{owner}, ErrEntry},
		"a large attribute":      {[]ocitest.Entry{large}, ext4.ErrXattr},
		"no target":              {[]ocitest.Entry{ocitest.Symlink("s", "")}, ext4.ErrSymlink},
		"a long target":          {[]ocitest.Entry{ocitest.Symlink("s", strings.Repeat("x", 4096))}, ext4.ErrSymlink},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := stack(Limits{}, ocitest.Tar(t, c.entries...)); !errors.Is(err, c.want) {
				t.Errorf("%v; want %v", err, c.want)
			}
		})
	}
}

// TestInside has links that lead out of every root, as they do in real images:
// they stay inside.
func TestInside(t *testing.T) {
	files, _, err := stack(Limits{}, ocitest.Tar(t,
		ocitest.Symlink("up", "../../../../../etc"), ocitest.Symlink("abs", "/etc"), ocitest.Symlink("passwd", "/etc/passwd"),
		ocitest.File("up/a", "a"), ocitest.File("abs/b", "b"), ocitest.File("/abs/./c", "c"), ocitest.File("passwd", "mine")))
	if err != nil {
		t.Fatal(err)
	}
	got := slices.Sorted(maps.Keys(files))
	if want := []string{"/", "/abs", "/etc", "/etc/a", "/etc/b", "/etc/c", "/passwd", "/up"}; !slices.Equal(got, want) {
		t.Errorf("%q; want %q", got, want)
	}
	if b, err := files["/passwd"].Contents(); string(b) != "mine" {
		t.Errorf("a file in place of a link: %q, %v", b, err)
	}
}

// exabyte is a header of 512 bytes that promises a file of an exabyte, all of
// it a hole, in the old form of GNU tar.
func exabyte() []byte {
	b := make([]byte, 512)
	copy(b, "huge")
	copy(b[100:], "0000644\x00")
	copy(b[108:], "0000000\x00")
	copy(b[116:], "0000000\x00")
	copy(b[124:], "00000000000\x00")
	copy(b[136:], "00000000000\x00")
	b[156] = 'S'
	copy(b[257:], "ustar  \x00")
	b[483] = 0x80 // the real size, as a binary number
	binary.BigEndian.PutUint64(b[487:], 1<<60)
	copy(b[148:], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return append(b, make([]byte, 1024)...)
}

func TestBounds(t *testing.T) {
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	if _, err := z.Write(make([]byte, 100<<20)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	var many []ocitest.Entry
	for i := range 1000 {
		many = append(many, ocitest.File(fmt.Sprint(i), "x"))
	}
	one := ocitest.Tar(t, ocitest.File("f", strings.Repeat("x", 1000)))
	deep := []ocitest.Entry{ocitest.File(strings.Repeat("a/", 1500)+"f", ""), ocitest.Symlink("s", strings.Repeat("a/", 1500)), ocitest.File("s/"+strings.Repeat("b/", 1500)+"f", "")}
	for name, c := range map[string]struct {
		l      Limits
		layers [][]byte
		want   error
	}{
		"a sparse exabyte":         {Limits{}, [][]byte{exabyte()}, ErrTooLarge},
		"a zip bomb":               {Limits{Bytes: 1 << 20}, [][]byte{bomb.Bytes()}, ErrTooLarge},
		"more bytes than allowed":  {Limits{Bytes: 20_000}, [][]byte{one, ocitest.Tar(t, ocitest.File("f", strings.Repeat("x", 19_001)))}, ErrTooLarge},
		"more files than allowed":  {Limits{Files: 999}, [][]byte{ocitest.Tar(t, many...)}, ErrTooLarge},
		"more names than allowed":  {Limits{Metadata: 1000}, [][]byte{ocitest.Tar(t, many...)}, ErrTooLarge},
		"more folders than files":  {Limits{Files: 1000}, [][]byte{ocitest.Tar(t, deep...)}, ErrTooLarge},
		"folders in folders":       {Limits{}, [][]byte{ocitest.Tar(t, deep...)}, ErrUnsafe},
		"more than the disk takes": {Limits{}, [][]byte{ocitest.Tar(t, ocitest.File("f", strings.Repeat("x", 33<<20)))}, ext4.ErrFull},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := stack(c.l, c.layers...); !errors.Is(err, c.want) {
				t.Errorf("%v; want %v", err, c.want)
			}
		})
	}
	t.Run("cut off", func(t *testing.T) {
		for _, n := range []int{1, 100, 512, 513, 600, 1000, 1400} {
			if _, _, err := stack(Limits{}, one[:n]); err == nil {
				t.Errorf("after %d bytes it ended well", n)
			}
		}
	})
}

// model is what layers make, as simply as it can be said: a map of paths. It
// knows no symbolic links.
type model map[string]modelFile

type modelFile struct {
	dir   bool
	data  string
	inode int
	layer int
}

func (m model) remove(p string) {
	for q := range m {
		if q == p || strings.HasPrefix(q, p+"/") {
			delete(m, q)
		}
	}
}

// TestModel compares layers at random with a plain map.
func TestModel(t *testing.T) {
	names := []string{"a", "b", "c"}
	rapid.Check(t, func(t *rapid.T) {
		m := model{}
		var layers [][]byte
		inode := 0
		for layer := range rapid.IntRange(1, 4).Draw(t, "layers") {
			var entries []ocitest.Entry
			for range rapid.IntRange(0, 10).Draw(t, "entries") {
				parts := rapid.SliceOfN(rapid.SampledFrom(names), 1, 3).Draw(t, "path")
				p := path.Join(parts...)
				dir, base := path.Split(p)
				blocked := false // a file on the way: refused, so not tried
				for q := path.Dir(p); q != "."; q = path.Dir(q) {
					if f, ok := m[q]; ok && !f.dir {
						blocked = true
					}
				}
				if blocked {
					continue
				}
				parents := func() {
					for q := path.Dir(p); q != "."; q = path.Dir(q) {
						if _, ok := m[q]; !ok {
							m[q] = modelFile{dir: true, layer: layer}
						}
					}
				}
				switch rapid.IntRange(0, 5).Draw(t, "kind") {
				case 0, 1:
					inode++
					data := fmt.Sprint("data ", inode)
					entries = append(entries, ocitest.File(p, data))
					parents()
					m.remove(p)
					m[p] = modelFile{data: data, inode: inode, layer: layer}
				case 2:
					entries = append(entries, ocitest.Dir(p))
					parents()
					if f, ok := m[p]; ok && !f.dir {
						m.remove(p)
					}
					m[p] = modelFile{dir: true, layer: layer}
				case 3:
					entries = append(entries, ocitest.File(dir+".wh."+base, ""))
					m.hide(p, layer)
				case 4:
					entries = append(entries, ocitest.File(p+"/.wh..wh..opq", ""))
					if f, ok := m[p]; !ok || f.dir {
						m.hideBelow(p, layer)
					} else {
						entries = entries[:len(entries)-1]
					}
				case 5:
					var targets []string
					for _, q := range slices.Sorted(maps.Keys(m)) {
						if !m[q].dir && q != p && !strings.HasPrefix(q, p+"/") {
							targets = append(targets, q)
						}
					}
					if len(targets) == 0 {
						continue
					}
					target := rapid.SampledFrom(targets).Draw(t, "target")
					entries = append(entries, ocitest.Link(p, target))
					parents()
					f := m[target]
					f.layer = layer
					m.remove(p)
					m[p] = f
				}
			}
			layers = append(layers, tarOf(entries))
		}
		files, where, err := stack(Limits{}, layers...)
		if err != nil {
			t.Fatalf("%s: %v", where, err)
		}
		compare(t, m, files)
	})
}

// hideBelow takes what layers below have in folder p; folders stay that have
// something of this one.
func (m model) hideBelow(p string, layer int) {
	var below []string
	for q := range m {
		if strings.HasPrefix(q, p+"/") {
			below = append(below, q)
		}
	}
	slices.SortFunc(below, func(a, b string) int { return strings.Count(b, "/") - strings.Count(a, "/") }) // the deepest first
	for _, q := range below {
		if m[q].layer == layer {
			continue
		}
		busy := slices.ContainsFunc(below, func(r string) bool {
			_, there := m[r]
			return there && strings.HasPrefix(r, q+"/")
		})
		if busy {
			f := m[q]
			f.layer = layer
			m[q] = f
		} else {
			delete(m, q)
		}
	}
}

// hide does that, and the same with p itself.
func (m model) hide(p string, layer int) {
	m.hideBelow(p, layer)
	f, ok := m[p]
	if !ok || f.layer == layer {
		return
	}
	for q := range m {
		if strings.HasPrefix(q, p+"/") {
			f.layer = layer
			m[p] = f
			return
		}
	}
	delete(m, p)
}

func tarOf(entries []ocitest.Entry) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(e.Data))
		}
		_ = w.WriteHeader(&h)
		_, _ = io.WriteString(w, e.Data)
	}
	_ = w.Close()
	return b.Bytes()
}

func compare(t *rapid.T, m model, files map[string]*ext4test.File) {
	inodes := map[uint32]int{}
	for p, f := range files {
		if p == "/" {
			continue
		}
		want, ok := m[p[1:]]
		if !ok {
			t.Errorf("%s should not be there", p)
			continue
		}
		if dir := f.Mode&ext4.ModeType == ext4.ModeDir; dir != want.dir {
			t.Errorf("%s: a folder: %v", p, dir)
			continue
		}
		if want.dir {
			continue
		}
		if b, err := f.Contents(); err != nil || string(b) != want.data {
			t.Errorf("%s: %q, %v; want %q", p, b, err, want.data)
		}
		if was, ok := inodes[f.Inode]; ok && was != want.inode {
			t.Errorf("%s is the same file as another", p)
		}
		inodes[f.Inode] = want.inode
	}
	for p := range m {
		if files["/"+p] == nil {
			t.Errorf("%s is missing", p)
		}
	}
}

// TestChecked has e2fsck look at what whiteouts and replaced files leave.
func TestChecked(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var lower, upper []ocitest.Entry
	for i := range 300 {
		lower = append(lower, ocitest.File(fmt.Sprintf("d%d/f%d", i%7, i), strings.Repeat("x", i*37)))
		if i%3 == 0 {
			upper = append(upper, ocitest.File(fmt.Sprintf("d%d/.wh.f%d", i%7, i), ""))
		} else if i%3 == 1 {
			upper = append(upper, ocitest.File(fmt.Sprintf("d%d/f%d", i%7, i), strings.Repeat("y", i*11)))
		}
	}
	upper = append(upper, ocitest.File("d3/.wh..wh..opq", ""), ocitest.File(".wh.d4", ""))
	if err := f.Truncate(32 << 20); err != nil {
		t.Fatal(err)
	}
	if _, _, err := stackOn(f, Limits{}, ocitest.Tar(t, lower...), ocitest.Tar(t, upper...)); err != nil {
		t.Fatal(err)
	}
	ext4test.Check(t, f.Name())
}

func FuzzLayer(f *testing.F) {
	f.Add(exabyte(), []byte{})
	f.Add(tarOf([]ocitest.Entry{ocitest.Dir("a"), ocitest.File("a/b", "b"), ocitest.Link("c", "a/b"), ocitest.Symlink("s", "a")}),
		tarOf([]ocitest.Entry{ocitest.File("s/x", "x"), ocitest.File(".wh.c", ""), ocitest.File("a/.wh..wh..opq", ""), ocitest.File("a", "now a file")}))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		_, _, err := stack(Limits{Bytes: 4 << 20, Files: 1000, Metadata: 1 << 20}, a, b)
		_ = err // any, but no panic; a file system that was finished can be read
		if err != nil && strings.Contains(err.Error(), "tree of extents") {
			t.Error(err)
		}
	})
}
