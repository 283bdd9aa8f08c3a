package kmod

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestStaticNodes(t *testing.T) {
	dir := t.TempDir()
	if nodes, err := StaticNodes(dir); err != nil || nodes != nil {
		t.Errorf("without a file: %v, %v", nodes, err)
	}
	writeFile(t, filepath.Join(dir, "modules.devname"), []byte(`# Device nodes to trigger on-demand module loading.
fuse fuse c10:229
tun net/tun c10:200
floppy fd0 b2:0
evil ../../etc/passwd c1:3
evil /etc/passwd c1:3
evil . c1:3
x y z10:1
x y c10
x y c4096:0
x y c0:1048576
x y c-1:0
x y
last dm c4095:1048575`))
	nodes, err := StaticNodes(dir)
	want := []StaticNode{
		{Module: "fuse", Name: "fuse", Major: 10, Minor: 229}, {Module: "tun", Name: "net/tun", Major: 10, Minor: 200},
		{Module: "floppy", Name: "fd0", Block: true, Major: 2}, {Module: "last", Name: "dm", Major: 4095, Minor: 1048575},
	}
	if err != nil || !slices.Equal(nodes, want) {
		t.Errorf("%+v, %v", nodes, err)
	}
	if err := os.Remove(filepath.Join(dir, "modules.devname")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "modules.devname"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := StaticNodes(dir); err == nil || !strings.Contains(err.Error(), "modules.devname") {
		t.Errorf("a folder: %v", err)
	}
}

func FuzzStaticNodes(f *testing.F) {
	f.Add("fuse fuse c10:229\ntun net/tun c10:200\n")
	f.Add("x ../x b1:1\n# c\n\x00 \x00 c1:1")
	f.Add(strings.Repeat("a b c1:1\n", 2000))
	f.Fuzz(func(t *testing.T, text string) {
		nodes, _ := parseStaticNodes(strings.NewReader(text))
		if len(nodes) > maxStaticNodes {
			t.Fatalf("%d nodes", len(nodes))
		}
		for _, n := range nodes {
			at := filepath.Join("/dev", n.Name)
			if !strings.HasPrefix(at, "/dev/") || strings.Contains(n.Name, "\x00") || n.Major > 4095 || n.Minor > 1<<20-1 || n.Module == "" {
				t.Errorf("%+v", n)
			}
		}
	})
}

// FuzzResolve reads whatever a modules folder may hold: each module comes once,
// after what it needs, and from the folder.
func FuzzResolve(f *testing.F) {
	f.Add("kernel/a.ko: kernel/b.ko\nkernel/b.ko:\n", "alias x-* a\n", "softdep b pre: a post: a\n", "x-y")
	f.Add("a.ko: a.ko\n../../etc/c.ko:\n/abs.ko:\n", "alias [ a\nalias *a*b*c* a\nalias a a\n", "softdep a pre: a x post: y\n", "a")
	f.Add("a.ko.xz: b.ko.zst c.ko.gz\nb.ko.zst: c.ko.gz\nc.ko.gz:\n", "alias fs-q a\nalias fs-q b\n", "softdep a pre: fs-q\n", "fs-q")
	f.Fuzz(func(t *testing.T, dep, alias, softdep, name string) {
		if len(dep)+len(alias)+len(softdep) > 64<<10 {
			t.Skip("larger than it needs to be")
		}
		dir := t.TempDir()
		for file, text := range map[string]string{"modules.dep": dep, "modules.alias": alias, "modules.softdep": softdep} {
			writeFile(t, filepath.Join(dir, file), []byte(text))
		}
		m, err := newModules(dir)
		if err != nil {
			return
		}
		files, err := m.ResolveOptional(name)
		if err != nil {
			return
		}
		at := map[string]int{}
		for i, file := range files {
			if _, twice := at[file.Name]; twice {
				t.Fatalf("%s comes twice", file.Name)
			}
			at[file.Name] = i
			if rel, err := filepath.Rel(dir, file.Path); err != nil || !filepath.IsLocal(rel) {
				t.Errorf("%s is outside the folder: %s", file.Name, file.Path)
			}
		}
		for _, file := range files {
			for _, d := range m.deps[file.Name] {
				i, there := at[d]
				if !there && !m.builtin[d] {
					t.Errorf("%s needs %s, which is missing", file.Name, d)
				}
				// In a circle nobody can be first.
				if there && i > at[file.Name] && !circle(m, file.Name) {
					t.Errorf("%s comes after %s, which needs it", d, file.Name)
				}
			}
		}
	})
}

// circle says whether following what modules need, or want, leads from name
// back to it.
func circle(m *Modules, name string) bool {
	seen := map[string]bool{}
	var follow func(string) bool
	follow = func(n string) bool {
		next := slices.Clone(m.deps[n])
		for _, s := range slices.Concat(m.softdeps[n].pre, m.softdeps[n].post) {
			found, _, _ := m.lookup(s)
			next = append(next, found...)
		}
		for _, d := range next {
			if d == name {
				return true
			}
			if !seen[d] {
				seen[d] = true
				if follow(d) {
					return true
				}
			}
		}
		return false
	}
	return follow(name)
}
