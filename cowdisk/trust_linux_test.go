package cowdisk

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// watchFS writes down every place that it is asked about.
type watchFS struct {
	HostFS
	asked *[]string
}

func (w watchFS) saw(path string) { *w.asked = append(*w.asked, path) }

func (w watchFS) Open(p string, m OpenMode) (File, error) {
	w.saw(p)
	return w.HostFS.Open(p, m)
}

func (w watchFS) OpenBeneath(root, rel string, m OpenMode) (File, error) {
	w.saw(filepath.Join(root, rel))
	return w.HostFS.OpenBeneath(root, rel, m)
}

func (w watchFS) LookBeneath(root, rel string) (string, bool, error) {
	w.saw(filepath.Join(root, rel))
	return w.HostFS.LookBeneath(root, rel)
}

func (w watchFS) Resolve(p string) (string, error) {
	w.saw(p)
	return w.HostFS.Resolve(p)
}

// putImage makes an image whose header says backing, whatever that is.
func putImage(t *testing.T, path, backing string, format Format) {
	t.Helper()
	f, err := HostFS{}.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := Header{Variant: QEMUV2, Size: 2 << 20, SectorSize: 512, Backing: backing, BackingFormat: format}
	if _, err := newImage(f, path, path, h, nil, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Publish(false, false); err != nil {
		t.Fatal(err)
	}
}

// trustTree has images/, which a hostile image lies in, and secret/ beside it.
func trustTree(t *testing.T) (dir string) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"images/sub", "secret/deep", "trusted"} {
		if err := os.MkdirAll(dir+"/"+d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"images/base.img", "images/sub/base.img", "secret/base.img", "trusted/base.img"} {
		if err := os.WriteFile(dir+"/"+f, make([]byte, 2<<20), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{
		"images/out":        "../secret",
		"images/abs":        dir + "/secret/base.img",
		"images/in":         "sub",
		"images/back":       dir + "/images/base.img",
		"images/to-trusted": dir + "/trusted/base.img",
		"images/self":       "self",
		"secret/back":       dir + "/images",
		"alias":             "images",
	} {
		if err := os.Symlink(target, dir+"/"+name); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// What an image names is not looked at before the rule about folders allows it: looking may mount something, or tell what exists.
func TestUntrustedPathIsNotLookedAt(t *testing.T) {
	dir := trustTree(t)
	for i, backing := range []string{
		"../secret/base.img", "../secret/absent", "../secret/back/base.img", dir + "/secret/base.img", dir + "/secret/back/base.img",
		dir + "/secret/../images/base.img", "out/base.img", "out/absent", "abs", "out/back/base.img", "sub/../../secret/deep/x", "/secret/x/y",
		"in/../out/../images/base.img", "..", "/",
	} {
		path := dir + "/images/h" + string(rune('a'+i)) + ".cow"
		putImage(t, path, backing, FormatRaw)
		var asked []string
		fs := watchFS{asked: &asked}
		tools := ToolOptions{Options: Options{FS: fs}}
		for what, try := range map[string]func() error{
			"open": func() error { _, err := Open(path, Options{FS: fs}); return err },
			"inspect": func() error {
				d, trouble, err := Inspect(path, Options{FS: fs})
				if err != nil {
					return err
				}
				return errors.Join(trouble, d.Close())
			},
			"missing": func() error { _, err := Open(path, Options{FS: fs, AllowMissingBacking: true}); return err },
			"commit":  func() error { return Commit(t.Context(), path, tools) },
			"create": func() error {
				return Create(dir+"/images/new.cow", CreateOptions{FS: fs, Backing: path, BackingFormat: FormatCOW})
			},
			"check": func() error {
				r, err := Check(t.Context(), path, false, tools)
				if err != nil {
					return err
				}
				for _, p := range r.Problems {
					err = errors.Join(err, p.Err)
				}
				return err
			},
		} {
			if err := try(); !errors.Is(err, ErrBackingOutside) {
				t.Errorf("%s, %s: %v", backing, what, err)
			}
		}
		if i := slices.IndexFunc(asked, func(p string) bool {
			return p != "." && p != dir && p != "/" && !strings.HasPrefix(p, dir+"/images") && !strings.HasPrefix(dir, p)
		}); i >= 0 {
			t.Errorf("%s: looked at %s", backing, asked[i])
		}
	}
}

// What may be named leads where the kernel goes with it, and is found whatever way the user named the image.
func TestTrustedPaths(t *testing.T) {
	dir := trustTree(t)
	t.Chdir(dir)
	for i, c := range []struct {
		image, backing string
		roots          []string
		want           string // below dir; "" = refused
		kind           error
	}{
		{"images/", "base.img", nil, "images/base.img", nil},
		{"images/", "sub/../base.img", nil, "images/base.img", nil},
		{"images/", "in/base.img", nil, "images/sub/base.img", nil},
		{"images/", "in/../base.img", nil, "images/base.img", nil},
		{"images/", "../images/base.img", nil, "images/base.img", nil},
		{"images/", "back", nil, "images/base.img", nil},
		{"images/", dir + "/images/base.img", nil, "images/base.img", nil},
		{"images/", "to-trusted", nil, "", ErrBackingOutside},
		{"images/", "to-trusted", []string{dir + "/trusted"}, "trusted/base.img", nil},
		{"images/", "../trusted/base.img", []string{dir + "/trusted"}, "trusted/base.img", nil},
		{"images/", "../trusted/base.img", []string{"trusted"}, "trusted/base.img", nil},
		{"images/", "../secret/base.img", []string{dir + "/trusted"}, "", ErrBackingOutside},
		{"images/", "../secret/base.img", []string{"/"}, "secret/base.img", nil},
		// By way of a symlink elsewhere only if the user took it, too.
		{"images/", dir + "/alias/base.img", nil, "", ErrBackingOutside},
		{"alias/", dir + "/alias/base.img", nil, "images/base.img", nil},
		{dir + "/alias/", dir + "/alias/sub/base.img", nil, "images/sub/base.img", nil},
		{"images/", dir + "/alias/base.img", []string{dir + "/alias"}, "images/base.img", nil},
		{"secret/../alias/", dir + "/secret/base.img", nil, "", ErrBackingOutside},
		{"images/", "absent", nil, "", ErrBackingMissing},
		{"images/", "absent/../base.img", nil, "", ErrBackingMissing},
		{"images/", "base.img/../base.img", nil, "", nil},
		{"images/", "self", nil, "", nil},
	} {
		name := "t" + string(rune('a'+i)) + ".cow"
		putImage(t, dir+"/images/"+name, c.backing, FormatRaw)
		d, err := Open(c.image+name, Options{BackingRoots: c.roots})
		if c.want == "" {
			if err == nil || c.kind != nil && !errors.Is(err, c.kind) {
				t.Errorf("%s of %s: %v, want %v", c.backing, c.image, err, c.kind)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s of %s: %v", c.backing, c.image, err)
			continue
		}
		if got := d.Info().FullBackingFilename; got != dir+"/"+c.want {
			t.Errorf("%s of %s: %s, want %s", c.backing, c.image, got, c.want)
		}
		d.Close()
	}
}

// An overlay that was made with the path of its base by way of a symlink opens by whatever path.
func TestCreateByWayOfSymlink(t *testing.T) {
	dir := trustTree(t)
	t.Chdir(dir + "/images")
	if err := Create("o.cow", CreateOptions{Backing: dir + "/alias/base.img"}); err != nil {
		t.Fatal(err)
	}
	if h := headerOf(t, "o.cow"); h.Backing != dir+"/images/base.img" {
		t.Errorf("stored %s", h.Backing)
	}
	mustOpen(t, "o.cow", Options{}).Close()
	if err := Create("l.cow", CreateOptions{Backing: dir + "/images/back"}); err != nil {
		t.Fatal(err)
	}
	if h := headerOf(t, "l.cow"); h.Backing != dir+"/images/back" {
		t.Errorf("stored %s, not the user's words", h.Backing)
	}
	mustOpen(t, "l.cow", Options{}).Close()
}
