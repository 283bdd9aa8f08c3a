package sharefs_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/hugelgupf/p9/p9"
	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/guest/sharefs"
	"github.com/moovm/moovm/virtio9p/virtio9ptest/wire"
)

// The kernel's own magic links, of a shared /proc/self, lead nowhere: not to
// the host's root, not to open files, not to the program.
func TestMagicLinks(t *testing.T) {
	secret, err := os.Open("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	root := attach(t, "/proc/self", sharefs.Options{})
	for _, path := range []string{"root/etc", "cwd/share_linux_test.go", "root/../etc", "task/../root/etc"} {
		if _, f, err := root.Walk(strings.Split(path, "/")); err == nil {
			f.Close()
			t.Errorf("%s was reached", path)
		}
	}
	for _, path := range []string{"root", "cwd", "exe", fmt.Sprint("fd/", secret.Fd())} {
		f := walk(t, root, path)
		if a := stat(t, f); !a.Mode.IsSymlink() {
			t.Errorf("%s: mode %v, not a link", path, a.Mode)
		}
		if _, _, err := f.Open(p9.ReadOnly); err == nil {
			t.Errorf("%s was opened", path)
		}
		if _, c, err := f.Walk([]string{"etc"}); err == nil {
			c.Close()
			t.Errorf("%s/etc was reached", path)
		}
	}
}

// Hard links are made of files of the share, to names in it, and of nothing else.
func TestHardLinks(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	write(t, dir+"/f", "inside")
	write(t, other+"/secret", "outside")
	if err := os.Mkdir(dir+"/d", 0o755); err != nil {
		t.Fatal(err)
	}
	a, b := share(t, dir, rw), share(t, other, rw)
	root, err := a.Attach()
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	foreign, err := b.Attach()
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	want(t, "a file of another share", root.Link(walk(t, foreign, "secret"), "stolen"), unix.EXDEV)
	want(t, "into another share", root.RenameAt("f", foreign, "f"), unix.EXDEV)
	want(t, "a folder", root.Link(walk(t, root, "d"), "d2"), unix.EPERM)
	for _, n := range []string{"..", "../x", "", ".", "/etc/x", "a\x00b"} {
		want(t, "the name "+n, root.Link(walk(t, root, "f"), n), unix.EINVAL)
	}
	gone := walk(t, root, "f")
	want(t, "unlink", root.UnlinkAt("f", 0), nil)
	want(t, "a file that is gone", root.Link(gone, "back"), unix.ENOENT)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("%v, %v", entries, err)
	}
}

// What a guest creates, changes and removes while the host swaps a folder of
// the share for a link to the outside, happens in the share or not at all.
func TestWriteRaces(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	write(t, outside+"/f", "outside")
	if err := errors.Join(os.Mkdir(dir+"/real", 0o755), os.Symlink(outside, dir+"/link"),
		os.Symlink(outside+"/f", dir+"/flink")); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/real/f", "inside")
	write(t, dir+"/plain", "inside")
	before, err := os.Stat(outside + "/f")
	if err != nil {
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
			for _, pair := range [][2]string{{"real", "link"}, {"plain", "flink"}} {
				unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, pair[0]), unix.AT_FDCWD, filepath.Join(dir, pair[1]), unix.RENAME_EXCHANGE)
			}
		}
	})
	root := attach(t, dir, rw)
	done := make(map[string]int)
	count := func(what string, err error) {
		if err == nil {
			done[what]++
		}
	}
	whats := []string{"create", "mkdir", "unlink", "rmdir", "chmod", "truncate", "create over"}
	for i := range 5000 {
		if i >= 200 && !slices.ContainsFunc(whats, func(w string) bool { return done[w] == 0 }) {
			break
		}
		_, d, err := root.Walk([]string{"real"})
		if err != nil {
			continue
		}
		_, _, _, err = d.Create("new", p9.ReadWrite|unix.O_CREAT|unix.O_TRUNC, 0o666, 0, 0)
		count("create", err)
		d.Close()
		if _, d, err = root.Walk([]string{"real"}); err == nil {
			_, err := d.Mkdir("dir", 0o755, 0, 0)
			count("mkdir", err)
			count("unlink", d.UnlinkAt("new", 0))
			count("rmdir", d.UnlinkAt("dir", unix.AT_REMOVEDIR))
			d.Close()
		}
		if _, f, err := root.Walk([]string{"plain"}); err == nil {
			count("chmod", f.SetAttr(p9.SetAttrMask{Permissions: true}, p9.SetAttr{Permissions: 0o600}))
			count("truncate", f.SetAttr(p9.SetAttrMask{Size: true}, p9.SetAttr{Size: 3}))
			f.Close()
		}
		if _, d, err := root.Walk(nil); err == nil {
			_, _, _, err := d.Create("plain", p9.ReadWrite|unix.O_CREAT|unix.O_TRUNC, 0o666, 0, 0)
			count("create over", err)
			d.Close()
		}
	}
	close(stop)
	wg.Wait()
	for _, what := range whats {
		if done[what] == 0 {
			t.Errorf("%s was never won by the share", what)
		}
	}
	entries, err := os.ReadDir(outside)
	if err != nil || len(entries) != 1 {
		t.Errorf("outside: %v, %v", entries, err)
	}
	after, err := os.Stat(outside + "/f")
	if err != nil || after.Size() != before.Size() || after.Mode() != before.Mode() || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("outside changed: %v, then %v, %v", before, after, err)
	}
}

// A file that is swapped for something that must not be opened, between the
// walk and the open, is still the file that was walked to.
func TestSwapBeforeOpen(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", "inside")
	root := attach(t, dir, rw)
	f := walk(t, root, "f")
	if err := errors.Join(os.Remove(dir+"/f"), unix.Mkfifo(dir+"/f", 0o666)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Open(p9.ReadOnly); err != nil { // does not wait for a writer, for one thing
		t.Fatal(err)
	}
	b := make([]byte, 10)
	if n, _ := f.ReadAt(b, 0); string(b[:n]) != "inside" {
		t.Errorf("read %q", b[:n])
	}
	_, _, err := walk(t, root, "f").Open(p9.ReadOnly)
	want(t, "the FIFO", err, unix.ENXIO)
}

// Whatever a guest asks for, its files belong to the user who runs the
// program and have no special bits.
func TestOwnership(t *testing.T) {
	dir := t.TempDir()
	root := attach(t, dir, rw)
	d := walk(t, root, "")
	if _, _, _, err := d.Create("f", p9.ReadWrite, 0o7755, 4711, 4712); err != nil {
		t.Fatal(err)
	}
	if _, err := root.Mkdir("d", 0o7755, 4711, 4712); err != nil {
		t.Fatal(err)
	}
	if _, err := root.Mknod("p", p9.ModeNamedPipe|0o6644, 0, 0, 4711, 4712); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]uint32{"f": unix.S_IFREG | 0o1755, "d": unix.S_IFDIR | 0o1755, "p": unix.S_IFIFO | 0o644} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		if st.Uid != uint32(os.Geteuid()) || st.Gid == 4712 || st.Mode != mode {
			t.Errorf("%s: user %d, group %d, mode %o, want %o", name, st.Uid, st.Gid, st.Mode, mode)
		}
		if a := stat(t, walk(t, root, name)); a.UID != 0 || a.GID != 0 {
			t.Errorf("%s: the guest sees user %d, group %d", name, a.UID, a.GID)
		}
	}
}

// A reset in the middle of requests, again and again: every descriptor and
// every goroutine is given back.
func TestResetUnderLoad(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", strings.Repeat("x", 1<<20))
	before := fds(t)
	t.Run("", func(t *testing.T) {
		d := start(t, share(t, dir, rw))
		for round := range 10 {
			d.Do(wire.Version(65536), 100)
			d.Do(wire.Attach(1, 0), 100)
			for fid := uint32(1); fid <= 4; fid++ {
				d.Do(wire.Walk(1, 0, fid, "f"), 100)
				d.Do(wire.Open(1, fid, 2), 100)
			}
			for tag := range uint16(40) {
				msg := wire.Read(tag, 1+uint32(tag%4), 0, 60000)
				switch {
				case tag%5 == 4:
					msg = wire.Walk(tag, 0, 100+uint32(tag), "f")
				case tag%2 == 1:
					msg = wire.Write(tag, 1+uint32(tag%4), uint64(round)*1000, make([]byte, 60000))
				}
				if err := d.Send(msg, 60011, func([]byte) {}); err != nil {
					t.Fatal(err)
				}
			}
			d.Restart()
			if n := fds(t) - before; n > 6 { // the share's folder, the device's events
				t.Errorf("round %d: %d descriptors are still open", round, n)
			}
		}
	})
	if n := fds(t); n != before {
		t.Errorf("%d descriptors before, %d after", before, n)
	}
}
