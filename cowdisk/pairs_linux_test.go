package cowdisk

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// betweenFS is the host's file system with a hook that runs between any two things that a tool does to it, also between the open of a
// file and its lock. Nothing is synced: nobody loses power here.
type betweenFS struct {
	HostFS
	hook func()
}

func newBetweenFS(hook func()) betweenFS {
	return betweenFS{HostFS{opened: func(string) { hook() }}, hook}
}

type betweenFile struct {
	NewFile
	fs   betweenFS
	path string
}

func (b betweenFS) Open(p string, m OpenMode) (File, error) {
	b.hook()
	f, err := b.HostFS.Open(p, m)
	if err != nil {
		return nil, err
	}
	return betweenFile{onlyFile{f}, b, p}, nil
}

func (b betweenFS) OpenBeneath(root, rel string, m OpenMode) (File, error) {
	b.hook()
	f, err := b.HostFS.OpenBeneath(root, rel, m)
	if err != nil {
		return nil, err
	}
	return betweenFile{onlyFile{f}, b, filepath.Join(root, rel)}, nil
}

func (b betweenFS) Create(p string) (NewFile, error) {
	b.hook()
	f, err := b.HostFS.Create(p)
	if err != nil {
		return nil, err
	}
	return betweenFile{f, b, p}, nil
}

func (f betweenFile) WriteAt(p []byte, off int64) (int, error) {
	f.fs.hook()
	return f.NewFile.WriteAt(p, off)
}
func (f betweenFile) WritevAt(p [][]byte, off int64) (int, error) {
	f.fs.hook()
	return f.NewFile.WritevAt(p, off)
}
func (f betweenFile) Truncate(n int64) error       { f.fs.hook(); return f.NewFile.Truncate(n) }
func (f betweenFile) PunchHole(off, n int64) error { f.fs.hook(); return f.NewFile.PunchHole(off, n) }
func (f betweenFile) Stat() (FileInfo, error)      { f.fs.hook(); return f.NewFile.Stat() }
func (f betweenFile) Sync() error                  { f.fs.hook(); return nil }
func (f betweenFile) SyncAll() error               { f.fs.hook(); return nil }
func (f betweenFile) Close() error                 { f.fs.hook(); return f.NewFile.Close() }
func (f betweenFile) Publish(replace, _ bool) error {
	f.fs.hook()
	return f.NewFile.Publish(replace, false)
}

// Touch does not wait for a later second.
func (f betweenFile) Touch() error {
	f.fs.hook()
	st, err := f.NewFile.Stat()
	if err != nil {
		return err
	}
	return os.Chtimes(f.path, time.Time{}, st.ModTime.Add(time.Second))
}

const pairDisk = 16 * 4096

// pairTool is a tool at work in a folder with base.img, other.img, mid.cow (on base.img) and top.cow (on mid.cow).
type pairTool struct {
	name string
	run  func(dir string, o Options) error
}

var pairWrite = bytes.Repeat([]byte("written "), 64)

func pairTools(t *testing.T) []pairTool {
	tool := func(name string, f func(image string, o ToolOptions) error, images ...string) (tools []pairTool) {
		for _, i := range images {
			tools = append(tools, pairTool{name + " " + i, func(dir string, o Options) error {
				o.AllowStaleBacking = true // what one tool did to a base is no reason for the other to stop
				return f(filepath.Join(dir, i), ToolOptions{Options: o})
			}})
		}
		return tools
	}
	ctx := t.Context()
	var all []pairTool
	for _, tools := range [][]pairTool{
		tool("commit", func(p string, o ToolOptions) error { return Commit(ctx, p, o) }, "top.cow", "mid.cow"),
		tool("rebase", func(p string, o ToolOptions) error { return Rebase(ctx, p, "other.img", o) }, "top.cow", "mid.cow"),
		tool("resize", func(p string, o ToolOptions) error { return Resize(ctx, p, pairDisk*2, false, o) }, "top.cow", "mid.cow"),
		tool("flatten", func(p string, o ToolOptions) error {
			o.Format = FormatCOW
			return Flatten(ctx, p, p+".flat", VariantUnknown, o)
		}, "top.cow"),
		tool("repair", func(p string, o ToolOptions) error { _, err := Check(ctx, p, true, o); return err }, "top.cow", "mid.cow"),
		tool("create", func(p string, o ToolOptions) error {
			return Create(p+".new", CreateOptions{Backing: p, BackingFormat: FormatCOW, AllowStaleBacking: true, FS: o.FS})
		}, "top.cow", "mid.cow"),
		tool("run", func(p string, o ToolOptions) error {
			d, err := Open(p, o.Options)
			if err != nil {
				return err
			}
			_, err = d.WriteAt(pairWrite, 4096)
			return errors.Join(err, d.Close())
		}, "top.cow"),
	} {
		all = append(all, tools...)
	}
	return all
}

// pairFiles makes the images; mid is shorter than top, so that commit makes it longer. It returns the contents of top and mid.
func pairFiles(t *testing.T, dir string) (top, mid []byte) {
	t.Helper()
	base := randomBytes(pairDisk, 1)
	writeFile(t, filepath.Join(dir, "base.img"), base)
	writeFile(t, filepath.Join(dir, "other.img"), randomBytes(pairDisk, 2))
	past := time.Now().Add(-time.Hour)
	for i, c := range []struct {
		name, backing string
		size          int64
	}{{"mid.cow", "base.img", pairDisk / 2}, {"top.cow", "mid.cow", pairDisk}} {
		path := filepath.Join(dir, c.name)
		mustCreate(t, path, CreateOptions{Backing: c.backing, BackingFormat: []Format{FormatRaw, FormatCOW}[i], Size: c.size, Variant: []Variant{QEMUV2, UMLV3}[i]})
		d := mustOpen(t, path, Options{FS: newBetweenFS(func() {})})
		for unit := i; unit < int(c.size)/4096; unit += 3 {
			if _, err := d.WriteAt(randomBytes(4096, uint64(100*i+unit)), int64(unit)*4096); err != nil {
				t.Fatal(err)
			}
		}
		top, mid = contents(t, d), top
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		os.Chtimes(path, past, past)
	}
	return top, mid
}

// pairVerify looks at what two tools, of which those named in done succeeded, have left.
func pairVerify(dir string, top, mid []byte, done []string) error {
	read := func(name string) ([]byte, error) {
		return readAll(filepath.Join(dir, name), Options{AllowStaleBacking: true})
	}
	has := func(name string) bool {
		for _, d := range done {
			if d == name {
				return true
			}
		}
		return false
	}
	after := bytes.Clone(top)
	copy(after[4096:], pairWrite)
	got, err := read("top.cow")
	if err != nil {
		return err
	}
	want := top
	if has("run top.cow") {
		want = after
	}
	if len(got) < len(want) || !bytes.Equal(got[:len(want)], want) || !isZero(got[len(want):]) {
		return errors.New("the contents of top.cow differ")
	}
	if has("resize top.cow") && len(got) != 2*pairDisk {
		return errors.New("the new size of top.cow is gone")
	}
	got, err = read("mid.cow")
	if err != nil {
		return err
	}
	ok := bytes.Equal(got[:len(mid)], mid)
	if has("commit top.cow") {
		committed := len(got) >= len(top) && (bytes.Equal(got[:len(top)], top) || bytes.Equal(got[:len(top)], after))
		ok = committed || ok && has("rebase top.cow") // into other.img, if rebase came first
	}
	if !ok {
		return errors.New("the contents of mid.cow differ")
	}
	if has("resize mid.cow") && len(got) != 2*pairDisk {
		return errors.New("the new size of mid.cow is gone")
	}
	if has("flatten top.cow") {
		if got, err = read("top.cow.flat"); err != nil || !bytes.Equal(got[:len(top)], top) && !bytes.Equal(got[:len(top)], after) {
			return fmt.Errorf("what flatten wrote differs: %v", err)
		}
	}
	for _, n := range []string{"top.cow", "mid.cow"} {
		if r, err := Check(neverDone, filepath.Join(dir, n), false, ToolOptions{Options: Options{AllowStaleBacking: true}}); err != nil || !r.Clean() {
			return fmt.Errorf("check of %s: %+v %v", n, r, err)
		}
	}
	left, _ := filepath.Glob(filepath.Join(dir, "*"+tempSuffix))
	if left != nil {
		return fmt.Errorf("left behind: %v", left)
	}
	return nil
}

// pairOnce lets b come in before the call-th thing that a does, and says whether there was one.
func pairOnce(t *testing.T, a, b pairTool, call int) bool {
	dir := t.TempDir()
	defer os.RemoveAll(dir)
	top, mid := pairFiles(t, dir)
	calls, came := 0, false
	var done []string
	finish := func(name string, err error) {
		switch {
		case err == nil:
			done = append(done, name)
		case !errors.Is(err, ErrLocked) && !errors.Is(err, ErrExists) && !errors.Is(err, ErrStaleBacking):
			t.Errorf("%s, %s at call %d: %s: %v", a.name, b.name, call, name, err)
		}
	}
	o := Options{FS: newBetweenFS(func() {
		if calls++; calls == call {
			came = true
			finish(b.name, b.run(dir, Options{FS: newBetweenFS(func() {})}))
		}
	})}
	finish(a.name, a.run(dir, o))
	if err := pairVerify(dir, top, mid, done); err != nil {
		t.Errorf("%s, %s at call %d, of which %q succeeded: %v", a.name, b.name, call, done, err)
	}
	if came && len(done) == 0 {
		t.Errorf("%s, %s at call %d: neither succeeded", a.name, b.name, call)
	}
	return came
}

// Two tools on the same files: whatever the moment at which the other one comes in, what succeeds has happened, what is refused has not,
// and no contents change.
func TestToolPairs(t *testing.T) {
	step := 7 // another first call for each pair, so that each call of each tool comes up
	if os.Getenv("MOOVM_TEST_LONG") != "" {
		step = 1
	}
	tools := pairTools(t)
	for i, a := range tools {
		t.Run(strings.ReplaceAll(a.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			for j, b := range tools {
				for call := 1 + (i+j)%step; pairOnce(t, a, b, call) && !t.Failed(); call += step {
				}
			}
		})
	}
}

// The other tool comes in between the open of the base and its lock: at every such moment, also in the short run.
func TestReplacedBeforeLock(t *testing.T) {
	for _, a := range pairTools(t) {
		for _, b := range pairTools(t) {
			if !strings.HasPrefix(b.name, "resize") {
				continue
			}
			for at := 1; ; at++ {
				dir := t.TempDir()
				top, mid := pairFiles(t, dir)
				opens := 0
				var done []string
				fs := betweenFS{hook: func() {}}
				fs.HostFS.opened = func(string) {
					if opens++; opens == at && b.run(dir, Options{FS: newBetweenFS(func() {})}) == nil {
						done = append(done, b.name)
					}
				}
				if a.run(dir, Options{FS: fs}) == nil {
					done = append(done, a.name)
				}
				if err := pairVerify(dir, top, mid, done); err != nil {
					t.Errorf("%s, %s at open %d, of which %q succeeded: %v", a.name, b.name, at, done, err)
				}
				os.RemoveAll(dir)
				if opens < at {
					break
				}
			}
		}
	}
}
