package sharefs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	fstest "github.com/hugelgupf/p9/fsimpl/test"
	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/guest/sharefs"
	"github.com/moovm/moovm/virtio9p"
	"github.com/moovm/moovm/virtio9p/fence"
	"github.com/moovm/moovm/virtio9p/virtio9ptest"
	"github.com/moovm/moovm/virtio9p/virtio9ptest/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func share(t testing.TB, dir string, o sharefs.Options) *sharefs.Share {
	t.Helper()
	s, err := sharefs.New(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func start(t testing.TB, a p9.Attacher) *virtio9ptest.Driver {
	t.Helper()
	d, err := virtio9p.New(virtio9p.Config{Tag: "share", Attacher: a})
	if err != nil {
		t.Fatal(err)
	}
	return virtio9ptest.Start(t, d, 65536, virtio9ptest.Splinters)
}

// attach is the root of dir as a guest sees it through the device.
func attach(t testing.TB, dir string, o sharefs.Options) p9.File {
	t.Helper()
	root, err := start(t, share(t, dir, o)).Client().Attach("")
	if err != nil {
		t.Fatal(err)
	}
	return root
}

var rw = sharefs.Options{Writable: true}

func walk(t testing.TB, f p9.File, path string) p9.File {
	t.Helper()
	var names []string
	if path != "" {
		names = strings.Split(path, "/")
	}
	_, to, err := f.Walk(names)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	t.Cleanup(func() { to.Close() })
	return to
}

func open(t testing.TB, root p9.File, path string, flags p9.OpenFlags) p9.File {
	t.Helper()
	f := walk(t, root, path)
	if _, _, err := f.Open(flags); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return f
}

func create(t testing.TB, root p9.File, dir, name string, flags p9.OpenFlags, perm p9.FileMode) p9.File {
	t.Helper()
	f := walk(t, root, dir)
	if _, _, _, err := f.Create(name, flags, perm, 0, 0); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return f
}

func stat(t testing.TB, f p9.File) p9.Attr {
	t.Helper()
	_, _, a, err := f.GetAttr(p9.AttrMaskAll)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func want(t testing.TB, what string, err, target error) {
	t.Helper()
	if !is(err, target) {
		t.Errorf("%s: %v, want %v", what, err, target)
	}
}

// is compares by number: the client's errors are of a type of its own.
func is(err error, target error) bool {
	errno, ok := target.(syscall.Errno)
	var got linux.Errno
	return errors.Is(err, target) || ok && errors.As(err, &got) && got == linux.Errno(errno)
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func fds(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestNew(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/file", "")
	if _, err := sharefs.New(dir+"/file", rw); !errors.Is(err, sharefs.ErrNotDirectory) {
		t.Errorf("a file: %v", err)
	}
	if _, err := sharefs.New(dir+"/nothing", rw); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nothing: %v", err)
	}
	s := share(t, dir, rw)
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Error(err)
	}
	if _, err := s.Attach(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestSuite(t *testing.T) {
	fstest.TestFile(t, share(t, t.TempDir(), rw))
	fstest.TestReadWriteFS(t, share(t, t.TempDir(), rw))
	dir := t.TempDir()
	write(t, dir+"/a", "contents")
	if err := errors.Join(os.Mkdir(dir+"/d", 0o755), os.Symlink("a", dir+"/l")); err != nil {
		t.Fatal(err)
	}
	for name, a := range map[string]p9.Attacher{"direct": share(t, dir, sharefs.Options{}), "device": clientAttacher{start(t, share(t, dir, sharefs.Options{})).Client()}} {
		t.Run(name, func(t *testing.T) {
			mask := p9.AttrMask{Mode: true, Size: true, UID: true}
			fstest.TestReadOnlyFS(t, a, fstest.WithDir("", "a", "d", "l"), fstest.WithDir("d"),
				fstest.WithFile("a", "contents", p9.Attr{Mode: p9.ModeRegular | 0o644, Size: 8}, mask),
				fstest.WithSymlink("l", "a", p9.Attr{Mode: p9.ModeSymlink | 0o777, Size: 1}, mask))
		})
	}
}

type clientAttacher struct{ c *p9.Client }

func (a clientAttacher) Attach() (p9.File, error) { return a.c.Attach("") }

func TestWritable(t *testing.T) {
	dir := t.TempDir()
	root := attach(t, dir, rw)

	// create, write, read, fsync
	f := create(t, root, "", "new", p9.ReadWrite, 0o666)
	data := bytes.Repeat([]byte("0123456789"), 20_000)
	if n, err := f.WriteAt(data, 0); n != len(data) || err != nil {
		t.Fatal(n, err)
	}
	want(t, "fsync", f.FSync(), nil)
	got, err := os.ReadFile(dir + "/new")
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("the host reads %d bytes, %v", len(got), err)
	}
	if a := stat(t, f); a.Mode != p9.ModeRegular|0o666 || a.Size != uint64(len(data)) || a.UID != 0 || a.NLink != 1 {
		t.Errorf("%+v", a)
	}
	_, _, _, err = walk(t, root, "").Create("new", p9.ReadWrite, 0o666, 0, 0)
	want(t, "create again", err, unix.EEXIST)
	_, _, _, err = walk(t, root, "").Create("new", p9.ReadWrite|unix.O_CREAT|unix.O_EXCL, 0o666, 0, 0)
	want(t, "create O_EXCL", err, unix.EEXIST)
	_, _, _, err = walk(t, root, "").Create("new", p9.ReadWrite|unix.O_CREAT, 0o600, 0, 0)
	want(t, "create O_CREAT", err, nil)

	// O_APPEND, O_TRUNC, truncate
	app := open(t, root, "new", p9.WriteOnly|unix.O_APPEND)
	write(t, dir+"/new", "abc")
	if _, err := app.WriteAt([]byte("def"), 0); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(dir + "/new"); string(got) != "abcdef" {
		t.Errorf("appended: %q", got)
	}
	want(t, "truncate", f.SetAttr(p9.SetAttrMask{Size: true}, p9.SetAttr{Size: 2}), nil)
	if got, _ := os.ReadFile(dir + "/new"); string(got) != "ab" {
		t.Errorf("truncated: %q", got)
	}
	open(t, root, "new", p9.ReadWrite|unix.O_TRUNC)
	if a := stat(t, f); a.Size != 0 {
		t.Errorf("O_TRUNC left %d bytes", a.Size)
	}

	// beyond 4 GiB
	if _, err := f.WriteAt([]byte("far"), 5<<30); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 3)
	if n, err := f.ReadAt(b, 5<<30); n != 3 || err != nil || string(b) != "far" {
		t.Errorf("far away: %q, %v", b[:n], err)
	}
	want(t, "truncate", f.SetAttr(p9.SetAttrMask{Size: true}, p9.SetAttr{Size: 0}), nil)

	// folders, links, renames
	if _, err := root.Mkdir("d", 0o777, 0, 0); err != nil {
		t.Fatal(err)
	}
	if a := stat(t, walk(t, root, "d")); a.Mode != p9.ModeDirectory|0o777 {
		t.Errorf("mode %v", a.Mode)
	}
	d := walk(t, root, "d")
	want(t, "link", d.Link(f, "hard"), nil)
	if a := stat(t, f); a.NLink != 2 {
		t.Errorf("%d links", a.NLink)
	}
	if _, err := d.Symlink("/etc/passwd", "soft", 0, 0); err != nil {
		t.Fatal(err)
	}
	if target, err := walk(t, root, "d/soft").Readlink(); target != "/etc/passwd" || err != nil {
		t.Errorf("link to %q, %v", target, err)
	}
	want(t, "rename", root.RenameAt("new", d, "old"), nil)
	want(t, "rename over", d.RenameAt("old", d, "hard2"), nil)
	want(t, "rename of nothing", d.RenameAt("old", d, "x"), unix.ENOENT)
	if _, err := f.WriteAt([]byte("x"), 0); err != nil { // by its descriptor, whatever its name
		t.Error(err)
	}
	want(t, "rmdir full", root.UnlinkAt("d", unix.AT_REMOVEDIR), unix.ENOTEMPTY)
	want(t, "unlink a folder", root.UnlinkAt("d", 0), unix.EISDIR)
	for _, n := range []string{"hard", "hard2", "soft"} {
		want(t, "unlink "+n, d.UnlinkAt(n, 0), nil)
	}
	if n, err := f.ReadAt(b[:1], 0); n != 1 || err != nil { // removed while open
		t.Errorf("removed: %d, %v", n, err)
	}
	want(t, "rmdir", root.UnlinkAt("d", unix.AT_REMOVEDIR), nil)
	if entries, err := os.ReadDir(dir); len(entries) != 0 || err != nil {
		t.Errorf("left: %v, %v", entries, err)
	}

	// names
	long := strings.Repeat("n", 255)
	create(t, root, "", long, p9.ReadWrite, 0o600)
	if _, err := os.Stat(filepath.Join(dir, long)); err != nil {
		t.Error(err)
	}
	_, _, _, err = walk(t, root, "").Create(long+"n", p9.ReadWrite, 0o600, 0, 0)
	want(t, "too long a name", err, unix.ENAMETOOLONG)

	// times
	when := time.Unix(1234567890, 987654321)
	g := walk(t, root, long)
	want(t, "utimes", g.SetAttr(p9.SetAttrMask{MTime: true, MTimeNotSystemTime: true}, p9.SetAttr{MTimeSeconds: 1234567890, MTimeNanoSeconds: 987654321}), nil)
	if fi, err := os.Stat(filepath.Join(dir, long)); err != nil || !fi.ModTime().Equal(when) {
		t.Errorf("mtime %v, %v", fi.ModTime(), err)
	}
	want(t, "touch", g.SetAttr(p9.SetAttrMask{MTime: true, ATime: true}, p9.SetAttr{}), nil)
	if a := stat(t, g); a.MTimeSeconds < 1700000000 {
		t.Errorf("mtime %d", a.MTimeSeconds)
	}
	if st, err := root.StatFS(); err != nil || st.NameLength == 0 || st.Blocks == 0 {
		t.Errorf("statfs %+v, %v", st, err)
	}
}

func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", "text")
	root := attach(t, dir, sharefs.Options{})
	f := walk(t, root, "f")
	_, _, err := f.Open(p9.ReadWrite)
	want(t, "open", err, unix.EROFS)
	_, _, err = f.Open(p9.ReadOnly | unix.O_TRUNC)
	want(t, "open O_TRUNC", err, unix.EROFS)
	_, _, _, err = walk(t, root, "").Create("x", p9.ReadWrite, 0o666, 0, 0)
	want(t, "create", err, unix.EROFS)
	_, err = root.Mkdir("x", 0o777, 0, 0)
	want(t, "mkdir", err, unix.EROFS)
	_, err = root.Symlink("x", "y", 0, 0)
	want(t, "symlink", err, unix.EROFS)
	_, err = root.Mknod("x", p9.ModeNamedPipe, 0, 0, 0, 0)
	want(t, "mknod", err, unix.EROFS)
	want(t, "link", root.Link(f, "x"), unix.EROFS)
	want(t, "rename", root.RenameAt("f", root, "x"), unix.EROFS)
	want(t, "unlink", root.UnlinkAt("f", 0), unix.EROFS)
	want(t, "chmod", f.SetAttr(p9.SetAttrMask{Permissions: true}, p9.SetAttr{}), unix.EROFS)
	if b, err := os.ReadFile(dir + "/f"); string(b) != "text" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

// What is outside stays outside, whatever lies in the folder.
func TestEscapes(t *testing.T) {
	outside := t.TempDir()
	write(t, outside+"/secret", "secret")
	dir := t.TempDir()
	if err := errors.Join(
		os.Symlink(outside, dir+"/absolute"),
		os.Symlink("../"+filepath.Base(outside), dir+"/relative"),
		os.Symlink(outside+"/secret", dir+"/file"),
		os.Symlink("/proc/self/root", dir+"/magic"),
		os.Symlink("/proc/self/fd", dir+"/fds"),
		os.Symlink("loop", dir+"/loop"),
		os.Mkdir(dir+"/sub", 0o755),
	); err != nil {
		t.Fatal(err)
	}
	direct, err := share(t, dir, rw).Attach()
	if err != nil {
		t.Fatal(err)
	}
	defer direct.Close()
	for name, root := range map[string]p9.File{"direct": direct, "device": attach(t, dir, rw)} {
		t.Run(name, func(t *testing.T) {
			for _, path := range []string{"..", "sub/..", "sub/../..", "absolute/secret", "relative/secret", "magic/etc", "fds/0", "loop/x", "."} {
				if _, f, err := root.Walk(strings.Split(path, "/")); err == nil {
					a := stat(t, f)
					f.Close()
					if path != "." || !a.Mode.IsDir() {
						t.Errorf("%s: reached a file of mode %v", path, a.Mode)
					}
				}
			}
			for _, path := range []string{"absolute", "relative", "file", "magic", "fds", "loop"} {
				f := walk(t, root, path)
				if a := stat(t, f); !a.Mode.IsSymlink() {
					t.Errorf("%s: mode %v", path, a.Mode)
				}
				if _, _, err := f.Open(p9.ReadOnly); err == nil {
					t.Errorf("%s was opened", path)
				}
				if err := f.SetAttr(p9.SetAttrMask{Permissions: true}, p9.SetAttr{Permissions: 0o777}); err == nil {
					t.Errorf("%s: its permissions were set", path)
				}
				if err := f.SetAttr(p9.SetAttrMask{Size: true}, p9.SetAttr{}); err == nil {
					t.Errorf("%s was truncated", path)
				}
				if _, _, _, err := walk(t, root, "").Create(path, p9.ReadWrite|unix.O_CREAT|unix.O_TRUNC, 0o666, 0, 0); err == nil {
					t.Errorf("%s: created through", path)
				}
				f.SetAttr(p9.SetAttrMask{MTime: true, MTimeNotSystemTime: true}, p9.SetAttr{})
			}
			for _, n := range []string{"../x", "a/b", "..", ".", "", "/x"} {
				if _, err := root.Mkdir(n, 0o777, 0, 0); err == nil {
					t.Errorf("mkdir %q", n)
				}
				if err := root.RenameAt("sub", root, n); err == nil {
					t.Errorf("rename to %q", n)
				}
				if err := root.UnlinkAt(n, unix.AT_REMOVEDIR); err == nil {
					t.Errorf("unlink %q", n)
				}
			}
			// A hard link of a symbolic link is one of the link.
			link := walk(t, root, "file")
			if err := root.Link(link, "again"); err == nil {
				if a := stat(t, walk(t, root, "again")); !a.Mode.IsSymlink() {
					t.Errorf("linked to what the link leads to: %v", a.Mode)
				}
				root.UnlinkAt("again", 0)
			}
		})
	}
	if b, err := os.ReadFile(outside + "/secret"); string(b) != "secret" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if fi, err := os.Stat(outside + "/secret"); err != nil || fi.ModTime().Unix() == 0 || fi.Mode().Perm() != 0o644 {
		t.Errorf("%v, %v", fi, err)
	}
}

// A folder that is replaced by a link to the outside while it is walked
// through leads to one or the other's entry in the share, never outside.
func TestRenameRace(t *testing.T) {
	outside := t.TempDir()
	write(t, outside+"/f", "outside")
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(dir+"/real", 0o755), os.Symlink(outside, dir+"/link")); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/real/f", "inside")
	if err := os.Symlink(outside, dir+"/cur"); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			unix.Renameat2(unix.AT_FDCWD, dir+"/real", unix.AT_FDCWD, dir+"/link", unix.RENAME_EXCHANGE)
		}
	})
	defer wg.Wait()
	defer close(stop)
	root := attach(t, dir, sharefs.Options{})
	inside := 0
	for i := range 5000 {
		if i >= 1000 && inside >= 100 {
			break
		}
		_, f, err := root.Walk([]string{"real", "f"})
		if err != nil {
			continue
		}
		b := make([]byte, 10)
		if _, _, err := f.Open(p9.ReadOnly); err != nil {
			t.Fatal(err)
		}
		n, _ := f.ReadAt(b, 0)
		f.Close()
		if string(b[:n]) != "inside" {
			t.Fatalf("round %d: read %q", i, b[:n])
		}
		inside++
	}
	if inside == 0 {
		t.Error("the race was never won by the folder")
	}
}

func TestSpecialFiles(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mkfifo(dir+"/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/setuid", "")
	if err := os.Chmod(dir+"/setuid", 0o755|os.ModeSetuid|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	root := attach(t, dir, rw)
	fifo := walk(t, root, "fifo")
	for _, flags := range []p9.OpenFlags{p9.ReadOnly, p9.WriteOnly, p9.ReadWrite} {
		_, _, err := fifo.Open(flags) // returns, for one thing
		want(t, "open of a FIFO", err, unix.ENXIO)
	}
	_, _, _, err := walk(t, root, "").Create("fifo", p9.WriteOnly|unix.O_CREAT, 0o666, 0, 0)
	want(t, "create of a FIFO", err, unix.ENXIO)

	f := walk(t, root, "setuid")
	if a := stat(t, f); a.Mode != p9.ModeRegular|0o755 {
		t.Errorf("mode %o", a.Mode)
	}
	want(t, "chmod", f.SetAttr(p9.SetAttrMask{Permissions: true}, p9.SetAttr{Permissions: 0o6711}), nil)
	if fi, err := os.Stat(dir + "/setuid"); err != nil || fi.Mode() != 0o711 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	want(t, "chown to oneself", f.SetAttr(p9.SetAttrMask{UID: true, GID: true}, p9.SetAttr{UID: stat(t, f).UID, GID: stat(t, f).GID}), nil)
	want(t, "chown", f.SetAttr(p9.SetAttrMask{UID: true}, p9.SetAttr{UID: 4711}), unix.EPERM)
	want(t, "chgrp", f.SetAttr(p9.SetAttrMask{GID: true}, p9.SetAttr{GID: 4711}), unix.EPERM)

	for _, m := range []p9.FileMode{p9.ModeNamedPipe, p9.ModeSocket, p9.ModeRegular} {
		if _, err := root.Mknod("node", m|0o640, 0, 0, 0, 0); err != nil {
			t.Errorf("mknod %v: %v", m, err)
		}
		if a := stat(t, walk(t, root, "node")); a.Mode != m|0o640 {
			t.Errorf("mknod %v: mode %v", m, a.Mode)
		}
		want(t, "unlink", root.UnlinkAt("node", 0), nil)
	}
	for _, m := range []p9.FileMode{p9.ModeBlockDevice, p9.ModeCharacterDevice} {
		_, err := root.Mknod("node", m|0o666, 1, 3, 0, 0)
		want(t, "mknod of a device", err, unix.EPERM)
	}
	t.Run("device node", func(t *testing.T) {
		if err := unix.Mknod(dir+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
			t.Skipf("making a device node needs root with CAP_MKNOD: %v", err)
		}
		f := walk(t, root, "null")
		if a := stat(t, f); a.Mode != p9.ModeCharacterDevice || a.RDev != 0 {
			t.Errorf("%+v", a)
		}
		_, _, err := f.Open(p9.ReadWrite)
		want(t, "open of a device", err, unix.ENXIO)
	})
}

func TestLargeFolder(t *testing.T) {
	files := 1500
	if os.Getenv("MOOVM_TEST_LONG") != "" || os.Getenv("MOOVM_SOAK") != "" {
		files = 100_000
	}
	dir := t.TempDir()
	for i := range files {
		write(t, fmt.Sprintf("%s/%0*d", dir, 1+i%200, i), "")
	}
	root := open(t, attach(t, dir, sharefs.Options{}), "", p9.ReadOnly)
	for _, count := range []uint32{300, 60_000} {
		seen := make(map[string]bool)
		for off := uint64(0); ; {
			ds, err := root.Readdir(off, count)
			if err != nil {
				t.Fatal(err)
			}
			if len(ds) == 0 {
				break
			}
			// Take only some of what came, as a guest whose buffer is full.
			for _, d := range ds[:(len(ds)+1)/2] {
				if seen[d.Name] {
					t.Fatalf("%s comes twice", d.Name)
				}
				seen[d.Name] = true
				off = d.Offset
			}
		}
		if len(seen) != files {
			t.Errorf("%d bytes at a time: %d files of %d", count, len(seen), files)
		}
	}
}

func TestLocks(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", "")
	// By hand: the library's client forgets the fid of a Tlock.
	d := start(t, share(t, dir, rw))
	do := func(msg []byte) wire.Reply {
		t.Helper()
		r, err := wire.Parse(d.Do(msg, 200))
		if err != nil || r.Errno() != 0 {
			t.Fatalf("message %d: errno %d, %v", msg[4], r.Errno(), err)
		}
		return r
	}
	do(wire.Version(8192))
	do(wire.Attach(1, 0))
	for fid := uint32(1); fid <= 2; fid++ {
		do(wire.Walk(1, 0, fid, "f"))
		do(wire.Open(1, fid, 2))
	}
	lock := func(fid uint32, typ p9.LockType, start, n uint64, status p9.LockStatus) {
		t.Helper()
		r := do(wire.Msg(wire.Tlock, 1, fid, uint8(typ), uint32(0), start, n, uint32(42), "guest"))
		if r.Body[0] != uint8(status) {
			t.Errorf("lock: status %d, want %v", r.Body[0], status)
		}
	}
	lock(1, p9.WriteLock, 0, 0, p9.LockStatusOK)
	lock(2, p9.WriteLock, 5, 1, p9.LockStatusBlocked)
	lock(2, p9.ReadLock, 0, 0, p9.LockStatusBlocked)
	lock(1, p9.Unlock, 0, 10, p9.LockStatusOK)
	lock(2, p9.WriteLock, 5, 5, p9.LockStatusOK)
	lock(1, p9.WriteLock, 9, 1<<63, p9.LockStatusBlocked)
	do(wire.Clunk(1, 2))
	lock(1, p9.WriteLock, 9, 1<<63, p9.LockStatusOK)

	// The host is locked out as well.
	f, err := os.OpenFile(dir+"/f", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 100, Len: 1})
	if err != unix.EAGAIN {
		t.Errorf("the host's lock: %v", err)
	}
}

// byHand speaks 9P to a writable share of dir. Fid 0 is its root.
func byHand(t *testing.T, dir string) (d *virtio9ptest.Driver, do func(msg []byte) wire.Reply) {
	d = start(t, share(t, dir, rw))
	do = func(msg []byte) wire.Reply {
		t.Helper()
		r, err := wire.Parse(d.Do(msg, 400))
		if err != nil || r.Errno() != 0 {
			t.Fatalf("message %d: errno %d, %v", msg[4], r.Errno(), err)
		}
		return r
	}
	do(wire.Version(8192))
	do(wire.Attach(1, 0))
	return d, do
}

// What is open can be changed as before when its name has gone, is another
// file's, or was one of two.
func TestRemovedWhileOpen(t *testing.T) {
	for name, remove := range map[string]func(t *testing.T, dir string, do func([]byte) wire.Reply){
		"unlink": func(t *testing.T, dir string, do func([]byte) wire.Reply) {
			do(wire.Msg(wire.Tunlinkat, 1, uint32(0), "f", uint32(0)))
		},
		"old target of a rename": func(t *testing.T, dir string, do func([]byte) wire.Reply) {
			write(t, dir+"/g", "other")
			do(wire.Msg(wire.Trenameat, 1, uint32(0), "g", uint32(0), "f"))
		},
		"one of two hard links": func(t *testing.T, dir string, do func([]byte) wire.Reply) {
			if err := os.Link(dir+"/f", dir+"/g"); err != nil {
				t.Fatal(err)
			}
			do(wire.Msg(wire.Tunlinkat, 1, uint32(0), "f", uint32(0)))
		},
		"host removes": func(t *testing.T, dir string, do func([]byte) wire.Reply) {
			if err := os.Remove(dir + "/f"); err != nil {
				t.Fatal(err)
			}
		},
		"host replaces": func(t *testing.T, dir string, do func([]byte) wire.Reply) {
			write(t, dir+"/g", "other")
			if err := os.Rename(dir+"/g", dir+"/f"); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir+"/f", "text")
			_, do := byHand(t, dir)
			do(wire.Walk(1, 0, 1, "f"))
			do(wire.Open(1, 1, 2))
			remove(t, dir, do)
			setattr := func(valid, mode, uid, gid uint32, size, mtime uint64) {
				t.Helper()
				do(wire.Msg(wire.Tsetattr, 1, uint32(1), valid, mode, uid, gid, size, uint64(0), uint64(0), mtime, uint64(5)))
			}
			root := uint32(0) // whom the guest sees as owner
			setattr(1<<3, 0, 0, 0, 2, 0)
			setattr(1<<0, 0o604, 0, 0, 0, 0)
			if os.Getgid() == os.Getuid() {
				setattr(1<<1|1<<2, 0, root, root, 0, 0)
			}
			setattr(1<<5|1<<8, 0, 0, 0, 0, 1e9)
			a := do(wire.Getattr(1, 1)).Body
			mode, size, mtime := le32(a[21:]), le64(a[8+13+4+4+4+8+8:]), le64(a[8+13+4+4+4+8+8+8+8+8+16:])
			if mode&0o777 != 0o604 || size != 2 || mtime != 1e9 {
				t.Errorf("mode %o, size %d, mtime %d", mode, size, mtime)
			}
			if b := do(wire.Read(1, 1, 0, 10)).Data(); string(b) != "te" {
				t.Errorf("contents %q", b)
			}
			do(wire.Msg(wire.Tfsync, 1, uint32(1), uint32(0)))
			do(wire.Clunk(1, 1))
			if name == "host replaces" || name == "old target of a rename" { // the name is the new file
				do(wire.Walk(1, 0, 1, "f"))
				do(wire.Open(1, 1, 0))
				if b := do(wire.Read(1, 1, 0, 10)).Data(); string(b) != "other" {
					t.Errorf("the name has %q", b)
				}
			}
		})
	}
}

func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }
func le64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }

// A rename of one link of a file to another does nothing, also to who has the
// file: it can be opened.
func TestRenameSameFile(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", "text")
	if err := os.Link(dir+"/f", dir+"/g"); err != nil {
		t.Fatal(err)
	}
	_, do := byHand(t, dir)
	do(wire.Walk(1, 0, 1, "f"))
	do(wire.Walk(1, 0, 2, "g"))
	do(wire.Msg(wire.Trenameat, 1, uint32(0), "f", uint32(0), "g"))
	for fid := uint32(1); fid <= 2; fid++ {
		do(wire.Open(1, fid, 2))
		if b := do(wire.Read(1, fid, 0, 10)).Data(); string(b) != "text" {
			t.Errorf("contents %q", b)
		}
	}
	for _, name := range []string{"f", "g"} {
		if _, err := os.Stat(dir + "/" + name); err != nil {
			t.Error(err)
		}
	}
}

// Locks of a read-only share are the guest's own: the host's programs are not
// kept out, and a request has one answer, whatever its kind.
func TestReadOnlyLocks(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", "text")
	f, err := os.OpenFile(dir+"/f", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	root, err := share(t, dir, sharefs.Options{}).Attach()
	if err != nil {
		t.Fatal(err)
	}
	g := open(t, root, "f", p9.ReadOnly)
	for _, typ := range []p9.LockType{p9.ReadLock, p9.WriteLock, p9.Unlock, p9.WriteLock, p9.ReadLock} {
		if status, err := g.Lock(1, typ, 0, 0, 0, "guest"); status != p9.LockStatusOK || err != nil {
			t.Errorf("lock %v: %v, %v", typ, status, err)
		}
	}
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		t.Errorf("the host's lock: %v", err)
	}
	if err := root.Close(); err != nil {
		t.Error(err)
	}
}

// Whatever changes the contents of a file takes away its set-user-ID bit.
func TestSetIDDropped(t *testing.T) {
	dir := t.TempDir()
	root := attach(t, dir, rw)
	for _, c := range []struct {
		name       string
		mode, want os.FileMode
		change     func() error
	}{
		{"write", 0o755 | os.ModeSetuid | os.ModeSetgid, 0o755, func() error {
			_, err := open(t, root, "f", p9.WriteOnly).WriteAt([]byte("x"), 0)
			return err
		}},
		{"no group execution", 0o745 | os.ModeSetuid | os.ModeSetgid, 0o745 | os.ModeSetgid, func() error {
			_, err := open(t, root, "f", p9.WriteOnly).WriteAt([]byte("x"), 0)
			return err
		}},
		{"truncate", 0o755 | os.ModeSetuid, 0o755, func() error {
			return walk(t, root, "f").SetAttr(p9.SetAttrMask{Size: true}, p9.SetAttr{Size: 1})
		}},
		{"open O_TRUNC", 0o755 | os.ModeSetuid, 0o755, func() error {
			_, _, err := walk(t, root, "f").Open(p9.WriteOnly | unix.O_TRUNC)
			return err
		}},
		{"create O_TRUNC", 0o755 | os.ModeSetuid, 0o755, func() error {
			_, _, _, err := walk(t, root, "").Create("f", p9.WriteOnly|unix.O_CREAT|unix.O_TRUNC, 0o644, 0, 0)
			return err
		}},
		{"read", 0o755 | os.ModeSetuid, 0o755 | os.ModeSetuid, func() error {
			_, err := open(t, root, "f", p9.ReadWrite).ReadAt(make([]byte, 1), 0)
			return err
		}},
	} {
		write(t, dir+"/f", "text")
		if err := os.Chmod(dir+"/f", c.mode); err != nil {
			t.Fatal(err)
		}
		if err := c.change(); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		fi, err := os.Stat(dir + "/f")
		if err != nil || fi.Mode() != c.want {
			t.Errorf("%s: mode %v, %v; want %v", c.name, fi.Mode(), err, c.want)
		}
	}
}

// Tlcreate of a name that is a FIFO does not open it: a reader of the host who
// waits at it is not woken.
func TestCreateLooksFirst(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mkfifo(dir+"/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	reader, err := unix.Open(dir+"/fifo", unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(reader)
	root := attach(t, dir, rw)
	for _, flags := range []p9.OpenFlags{p9.ReadOnly, p9.WriteOnly, p9.ReadWrite} {
		_, _, _, err := walk(t, root, "").Create("fifo", flags|unix.O_CREAT, 0o666, 0, 0)
		want(t, "create of a FIFO", err, unix.ENXIO)
	}
	// POLLHUP says that a writer has been there.
	p := []unix.PollFd{{Fd: int32(reader), Events: unix.POLLIN}}
	if _, err := unix.Poll(p, 0); err != nil || p[0].Revents != 0 {
		t.Errorf("the FIFO has been opened: events %#x, %v", p[0].Revents, err)
	}
	if err := os.Mkdir(dir+"/d", 0o755); err != nil {
		t.Fatal(err)
	}
	_, _, _, err = walk(t, root, "").Create("d", p9.ReadOnly|unix.O_CREAT, 0o666, 0, 0)
	want(t, "create of a folder", err, unix.EISDIR)
	if err := os.Symlink("nowhere", dir+"/l"); err != nil {
		t.Fatal(err)
	}
	_, _, _, err = walk(t, root, "").Create("l", p9.WriteOnly|unix.O_CREAT, 0o666, 0, 0)
	want(t, "create of a symbolic link", err, unix.ELOOP)
}

// A guest that goes away in the middle leaves no descriptor behind, and one
// that asks for too many does not take the program's.
func TestDescriptors(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", "text")
	before := fds(t)
	t.Run("", func(t *testing.T) {
		s := share(t, dir, sharefs.Options{Writable: true, MaxFiles: 50})
		d := start(t, s)
		for range 3 {
			d.Do(wire.Version(8192), 100)
			d.Do(wire.Attach(1, 0), 100)
			refused := 0
			for fid := uint32(1); fid < 100; fid++ {
				d.Do(wire.Walk(1, 0, fid, "f"), 200)
				r, err := wire.Parse(d.Do(wire.Open(1, fid, 2), 100))
				if err != nil {
					t.Fatal(err)
				}
				if r.Errno() != 0 {
					refused++
				}
			}
			if refused < 50 {
				t.Errorf("only %d of 99 files were refused", refused)
			}
			if n := fds(t) - before; n > 70 {
				t.Errorf("%d descriptors", n)
			}
			d.Restart()
		}
	})
	if n := fds(t); n != before {
		t.Errorf("%d descriptors before, %d after", before, n)
	}
}

// However many shares there are, they leave the process a part of its
// descriptors.
func TestFilesEach(t *testing.T) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	limit := int(min(lim.Cur, 1<<20))
	for _, n := range []int{-1, 0, 1, 2, 3, 7, 20} {
		each := sharefs.FilesEach(n)
		if total := each * max(n, 1); each < 1 || total > limit-limit/4 {
			t.Errorf("%d shares: %d descriptors each of %d", n, each, limit)
		}
	}
	if a, b := sharefs.FilesEach(1), sharefs.FilesEach(2); a < 2*b || a > 2*b+1 {
		t.Errorf("one share gets %d, two get %d each", a, b)
	}
}

// Many at once, in one folder: no deadlock, no race, nothing lost.
func TestConcurrent(t *testing.T) {
	dir := t.TempDir()
	root := attach(t, dir, rw)
	if _, err := root.Mkdir("d", 0o755, 0, 0); err != nil {
		t.Fatal(err)
	}
	d := walk(t, root, "d")
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Go(func() {
			for i := range 30 {
				name := fmt.Sprintf("f%d-%d", g, i)
				_, f, err := d.Walk(nil)
				if err == nil {
					_, _, _, err = f.Create(name, p9.ReadWrite, 0o644, 0, 0)
				}
				if err == nil {
					_, err = f.WriteAt([]byte(name), 0)
				}
				if err == nil {
					err = d.RenameAt(name, root, name)
				}
				if err == nil && i%2 == 0 {
					err = root.UnlinkAt(name, 0)
				}
				if err == nil {
					b := make([]byte, 20)
					var n int
					if n, err = f.ReadAt(b, 0); err == io.EOF {
						err = nil
					}
					if string(b[:n]) != name {
						t.Errorf("read %q of %s", b[:n], name)
					}
				}
				if err == nil {
					err = f.Close()
				}
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		})
	}
	wg.Wait()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 6*15+1 {
		t.Errorf("%d entries, %v", len(entries), err)
	}
}

// The way of a message through descriptors, the session and the file system.
func BenchmarkDevice(b *testing.B) {
	dir := b.TempDir()
	write(b, dir+"/f", strings.Repeat("x", 500_000))
	dev, err := virtio9p.New(virtio9p.Config{Tag: "share", Attacher: share(b, dir, rw)})
	if err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		msg    []byte
		room   int
		bytes  int64
		layout virtio9ptest.Layout
	}{
		{"getattr", wire.Getattr(1, 1), 200, 0, virtio9ptest.Whole},
		{"read", wire.Read(1, 1, 0, 500_000), 500_011, 500_000, virtio9ptest.ZeroCopy},
		{"write", wire.Write(1, 1, 0, make([]byte, 500_000)), 100, 500_000, virtio9ptest.ZeroCopyWrite},
	} {
		b.Run(c.name, func(b *testing.B) {
			d := virtio9ptest.Start(b, dev, 512_000, c.layout)
			d.Do(wire.Version(512_000), 100)
			d.Do(wire.Attach(1, 0), 100)
			d.Do(wire.Walk(1, 0, 1, "f"), 100)
			d.Do(wire.Open(1, 1, 2), 100)
			b.SetBytes(c.bytes)
			b.ReportAllocs()
			for b.Loop() {
				if r, err := wire.Parse(d.Do(c.msg, c.room)); err != nil || r.Errno() != 0 {
					b.Fatal(r.Errno(), err)
				}
			}
		})
	}
}

// What is in memory can be read at once, if the file system can tell.
func TestResident(t *testing.T) {
	const text = "0123456789"
	pieces := func() [][]byte { return [][]byte{make([]byte, 3), make([]byte, 4)} }
	memory, err := os.MkdirTemp("/dev/shm", "sharefs")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(memory)
	for _, dir := range []string{memory, t.TempDir()} {
		write(t, dir+"/f", text)
		root, err := share(t, dir, sharefs.Options{}).Attach()
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		_, file, err := root.Walk([]string{"f"})
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		f := file.(fence.ResidentFile)
		if f.ReadvResident(pieces(), 0) {
			t.Error("read before it was opened")
		}
		if _, _, err := file.Open(p9.ReadOnly); err != nil {
			t.Fatal(err)
		}
		if _, err := file.ReadAt(make([]byte, len(text)), 0); err != nil { // now it is in memory
			t.Fatal(err)
		}
		f.ReadvResident(pieces(), 0) // which way to read is found out by the first
		b := pieces()
		var st unix.Statfs_t
		switch ok := f.ReadvResident(b, 2); {
		case ok && string(b[0])+string(b[1]) != text[2:9]:
			t.Errorf("%s: %q", dir, b)
		case !ok && unix.Statfs(dir, &st) == nil && st.Type == unix.TMPFS_MAGIC:
			t.Errorf("%s: a file in memory cannot be read at once", dir)
		}
		if f.ReadvResident(pieces(), 4) {
			t.Error("more was read than there is")
		}
	}
}
