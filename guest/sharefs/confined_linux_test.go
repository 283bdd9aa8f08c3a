//go:build amd64

package sharefs_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hugelgupf/p9/p9"
	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/guest/sharefs"
	"github.com/moovm/moovm/internal/confine"
)

const confinedEnv = "SHAREFS_TEST_CONFINED"

// A confined process serves a writable share as before: mode, size and times
// go by descriptor. A process cannot be let go again, so it is one of its own.
func TestConfined(t *testing.T) {
	if dir := os.Getenv(confinedEnv); dir != "" {
		confined(t, dir)
		return
	}
	dir := t.TempDir()
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "writeonly"), []byte("text"), 0o200), os.Symlink("writeonly", filepath.Join(dir, "link"))); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestConfined$", "-test.v")
	cmd.Env = append(os.Environ(), confinedEnv+"="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if strings.Contains(string(out), "--- SKIP") {
		t.Skip("needs a kernel with seccomp filters (CONFIG_SECCOMP_FILTER) and Landlock (CONFIG_SECURITY_LANDLOCK)")
	}
	for name, want := range map[string]os.FileMode{"writeonly": 0o640, "new": 0o666, "folder": os.ModeDir | 0o777, "fifo": os.ModeNamedPipe | 0o666} {
		if st, err := os.Lstat(filepath.Join(dir, name)); err != nil || st.Mode() != want {
			t.Errorf("%s: %v, %v, want %v", name, st.Mode(), err, want)
		}
	}
	if st, err := os.Stat(filepath.Join(dir, "writeonly")); err != nil || st.Size() != 2 || st.ModTime().Unix() != 1000 {
		t.Errorf("%+v, %v", st, err)
	}
}

func confined(t *testing.T, dir string) {
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	s := share(t, dir, sharefs.Options{Writable: true})
	r, err := confine.Apply(confine.Needs{Write: []string{dir}})
	if errors.Is(err, confine.ErrUnsupported) || err == nil && (r.Landlock == 0 || !r.Seccomp) {
		t.Skip("nothing to confine with")
	}
	if err != nil {
		t.Fatal(err)
	}
	root, err := s.Attach()
	if err != nil {
		t.Fatal(err)
	}
	set := func(name string, valid p9.SetAttrMask, attr p9.SetAttr) error {
		t.Helper()
		_, f, err := root.Walk([]string{name})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		return f.SetAttr(valid, attr)
	}
	times := p9.SetAttr{ATimeSeconds: 1000, MTimeSeconds: 1000}
	when := p9.SetAttrMask{ATime: true, MTime: true, ATimeNotSystemTime: true, MTimeNotSystemTime: true}
	for what, err := range map[string]error{
		"size": set("writeonly", p9.SetAttrMask{Size: true}, p9.SetAttr{Size: 2}),
		"mode": set("writeonly", p9.SetAttrMask{Permissions: true}, p9.SetAttr{Permissions: 0o640}),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := set("writeonly", when, times); err != nil {
		t.Errorf("times: %v", err)
	}
	if err := set("link", when, times); err != unix.ENOSYS {
		t.Errorf("the times of a link: %v, want ENOSYS", err)
	}
	f, _, _, err := root.Create("new", p9.ReadWrite, 0o666, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	_, err = root.Mkdir("folder", 0o777, 0, 0)
	_, err2 := root.Mknod("fifo", p9.FileMode(unix.S_IFIFO|0o666), 0, 0, 0, 0)
	if err = errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	if _, _, err := root.Open(p9.ReadOnly); err != nil {
		t.Fatal(err)
	}
	if entries, err := root.Readdir(0, 1<<16); err != nil || len(entries) != 5 {
		t.Errorf("%v, %v", entries, err)
	}
	root.Close()
}
