package initramfs

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/kernel/kerneltest"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/kmod/kmodtest"
)

func TestArchive(t *testing.T) {
	root, _ := kmodtest.Tree(t, true)
	m, err := kmod.OpenModules(root, kerneltest.Release)
	if err != nil {
		t.Fatal(err)
	}
	mods, err := m.Resolve("virtio_blk", "crypto-crc32c")
	if err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(t.TempDir(), "init.sh")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	a := &Archive{
		Init:    script,
		Config:  &control.InitConfig{Command: &control.Command{Args: []string{"true"}}, Modules: []control.InitModule{{Path: "replaced"}}},
		Modules: mods,
		Files: []File{
			{Name: "/etc/deep/er/file", Data: []byte("hello")},
			{Name: "etc/deep/link", Mode: cpio.TypeSymlink | 0o777, Data: []byte("er/file")},
			{Name: "dev/vda", Mode: cpio.TypeBlock | 0o600, Major: 254, Minor: 3},
			{Name: "../outside", Data: []byte("x"), Mode: 0o600},
			{Name: "/dev", Mode: cpio.TypeDir}, // there already
		},
	}
	b, err := a.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	again, err := a.Bytes()
	if err != nil || !bytes.Equal(b, again) {
		t.Errorf("two builds differ, %v", err)
	}
	if a.Config.Modules[0].Path != "replaced" {
		t.Error("the caller's configuration was changed")
	}

	type entry struct {
		mode cpio.FileMode
		body string
	}
	got := map[string]entry{}
	inodes := map[int64]bool{}
	r := cpio.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := got[h.Name]; twice {
			t.Errorf("%s is there twice", h.Name)
		}
		if dir, _, ok := cutLast(h.Name); ok {
			if _, there := got[dir]; !there {
				t.Errorf("%s comes before its folder", h.Name)
			}
		}
		if inodes[h.Inode] {
			t.Errorf("%s shares its inode: the kernel would take it for a hard link", h.Name)
		}
		inodes[h.Inode] = true
		got[h.Name] = entry{h.Mode, string(body) + h.Linkname}
	}
	for name, want := range map[string]entry{
		"init":              {cpio.TypeReg | 0o755, "#!/bin/sh\n"},
		"etc/deep/er/file":  {cpio.TypeReg | 0o644, "hello"},
		"etc/deep/link":     {cpio.TypeSymlink | 0o777, "er/file"},
		"etc":               {cpio.TypeDir | 0o755, ""},
		"outside":           {cpio.TypeReg | 0o600, "x"},
		"tmp":               {cpio.TypeDir | 0o1777, ""},
		"dev/console":       {cpio.TypeChar | 0o600, ""},
		"dev/vda":           {cpio.TypeBlock | 0o600, ""},
		"moovm/config.json": {cpio.TypeReg | 0o600, got["moovm/config.json"].body},
	} {
		if got[name] != want {
			t.Errorf("%s: got %+v, want %+v", name, got[name], want)
		}
	}
	c, err := control.ParseInitConfig([]byte(got["moovm/config.json"].body))
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, m := range c.Modules {
		paths = append(paths, filepath.Base(m.Path))
		if e := got[strings.TrimPrefix(m.Path, "/")]; !strings.HasPrefix(e.body, "\x7fELF") {
			t.Errorf("%s is not unpacked", m.Path)
		}
	}
	if s := strings.Join(paths, " "); s != "000-virtio_ring.ko 001-virtio.ko 002-virtio_blk.ko 003-crc32c_generic.ko 004-crc32c_intel.ko" {
		t.Errorf("modules: %s", s)
	}
	if !c.Modules[3].Optional || c.Modules[2].Optional {
		t.Errorf("optional: %+v", c.Modules)
	}
	// The device numbers are fields of the header that the library skips.
	for name, want := range map[string]string{"dev/console": "0000000500000001", "dev/vda": "000000FE00000003"} {
		i := bytes.Index(b, []byte(name+"\x00"))
		if i < 110 || string(b[i-110+78:i-110+94]) != want {
			t.Errorf("%s has another number", name)
		}
	}
	if cpioTool, err := exec.LookPath("cpio"); err == nil {
		cmd := exec.Command(cpioTool, "-t", "--quiet")
		cmd.Stdin = bytes.NewReader(b)
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "moovm/config.json") {
			t.Errorf("cpio: %v\n%s", err, out)
		}
	}
}

func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

func TestArchiveErrors(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "none")
	for name, c := range map[string]struct {
		a    Archive
		want string
	}{
		"no init":   {Archive{Init: missing}, "no such file"},
		"no file":   {Archive{Files: []File{{Name: "x", HostPath: missing}}}, "no such file"},
		"a folder":  {Archive{Files: []File{{Name: "x", HostPath: dir}}}, "is not a regular file"},
		"no module": {Archive{Modules: []kmod.ModuleFile{{Name: "m", Path: missing}}}, "no such file"},
	} {
		if _, err := c.a.Bytes(); err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "initramfs: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if dynamic, err := exec.LookPath("sh"); err == nil && CheckStatic(dynamic) != nil {
		if _, err := (&Archive{Init: dynamic}).Bytes(); !errors.Is(err, ErrNotStatic) || !strings.Contains(err.Error(), "CGO_ENABLED=0") {
			t.Errorf("dynamic init: %v", err)
		}
	}
	full := errors.New("full")
	a := &Archive{Files: []File{{Name: "x", Data: make([]byte, 1<<20)}}}
	if n, err := a.WriteTo(&failingWriter{left: 5000, err: full}); !errors.Is(err, full) || n > 5000 {
		t.Errorf("%d bytes, %v", n, err)
	}
}

type failingWriter struct {
	left int
	err  error
}

func (f *failingWriter) Write(p []byte) (int, error) {
	if len(p) > f.left {
		return 0, f.err
	}
	f.left -= len(p)
	return len(p), nil
}
