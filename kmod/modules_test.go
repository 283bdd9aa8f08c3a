package kmod

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kernel/kerneltest"
	"github.com/moovm/moovm/kmod/kmodtest"
)

func names(files []ModuleFile) string {
	var out []string
	for _, f := range files {
		n := f.Name
		if f.Optional {
			n += "?"
		}
		out = append(out, n)
	}
	return strings.Join(out, " ")
}

func TestResolve(t *testing.T) {
	for _, depmod := range []bool{true, false} {
		t.Run(map[bool]string{true: "modules.dep", false: "no modules.dep"}[depmod], func(t *testing.T) {
			root, dir := kmodtest.Tree(t, depmod)
			m, err := OpenModules(root, kerneltest.Release)
			if err != nil {
				t.Fatal(err)
			}
			if m.Dir() != dir {
				t.Errorf("opened %s", m.Dir())
			}
			for ask, want := range map[string]string{
				"virtio_ring":               "virtio_ring",
				"virtio-ring":               "virtio_ring",
				"virtio_blk":                "virtio_ring virtio virtio_blk",
				"virtio-blk virtio_pci":     "virtio_ring virtio virtio_blk virtio_pci",
				"virtio_blk virtio_blk":     "virtio_ring virtio virtio_blk",
				"virtio:d00000002v00001af4": "virtio_ring virtio virtio_blk",
				"ext4":                      "crc32c_generic? crc32c_intel? jbd2 after? mbcache ext4",
				"fs-ext4":                   "crc32c_generic? crc32c_intel? jbd2 after? mbcache ext4",
				"ext4 crc32c_generic":       "crc32c_generic crc32c_intel? jbd2 after? mbcache ext4",
				"built_in built-in fs-proc": "",
				"crypto-crc32c":             "crc32c_generic? crc32c_intel?",
				"crypto-crc32c-generic":     "crc32c_generic",
				"":                          "",
			} {
				files, err := m.Resolve(strings.Fields(ask)...)
				if err != nil || names(files) != want {
					t.Errorf("%q: got %s, want %s, %v", ask, names(files), want, err)
				}
			}
			if files, err := m.Resolve("round"); err != nil || len(files) != 2 {
				t.Errorf("circle: %s, %v", names(files), err)
			}
			for _, bad := range []string{"nonesuch", "broken", "fs-nonesuch"} {
				if _, err := m.Resolve("ext4", bad); !errors.Is(err, ErrUnknownModule) || !strings.Contains(err.Error(), dir) {
					t.Errorf("%s: %v", bad, err)
				}
			}
			for typed, meant := range map[string]string{
				"virtio_blkk": "near names: virtio_blk,", "ex4": "near names: ext4:", "built-im": "near names: built_in:",
				"virtio_": "near names: virtio, virtio_blk, virtio_pci", "jbd": "near names: jbd2:",
			} {
				if _, err := m.Resolve(typed); err == nil || !strings.Contains(err.Error(), meant) {
					t.Errorf("%s: no %q in: %v", typed, meant, err)
				}
			}
			if _, err := m.Resolve("nonesuch"); err == nil || strings.Contains(err.Error(), "near") {
				t.Error(err)
			}
			files, err := m.ResolveOptional("nonesuch", "virtio")
			if err != nil || names(files) != "virtio_ring? virtio?" {
				t.Errorf("optional: %s, %v", names(files), err)
			}
			if !m.Has("fs-ext4") || !m.Has("built_in") || m.Has("nonesuch") {
				t.Error("Has is wrong")
			}
			if m.Has("extra") {
				t.Error("the build folder was searched")
			}
		})
	}
}

func TestModuleLoad(t *testing.T) {
	root, dir := kmodtest.Tree(t, false)
	m, err := OpenModules(root, "")
	if err != nil {
		t.Fatal(err)
	}
	files, err := m.Resolve("virtio_blk", "virtio_pci")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files { // one of each packing
		b, err := f.Load()
		if err != nil || !bytes.HasPrefix(b, []byte(elf.ELFMAG)) || !bytes.Contains(b, []byte("vermagic="+kerneltest.Release)) {
			t.Errorf("%s: %d bytes, %v", f.Path, len(b), err)
		}
	}
	if _, err := (ModuleFile{Path: filepath.Join(dir, "kernel/misc/not.ko")}).Load(); err == nil || !strings.Contains(err.Error(), "not an ELF file") {
		t.Errorf("not a module: %v", err)
	}
	bad := filepath.Join(dir, "bad.ko.gz")
	writeFile(t, bad, []byte("\x1f\x8b\x08\x00garbage that is long enough"))
	if _, err := (ModuleFile{Path: bad}).Load(); !errors.Is(err, gzip.ErrHeader) && err == nil {
		t.Errorf("damaged: %v", err)
	}
}

func TestOpenModules(t *testing.T) {
	root, dir := kmodtest.Tree(t, true)
	for _, d := range []string{root, filepath.Join(root, "lib/modules"), dir} {
		for _, release := range []string{kerneltest.Release, ""} {
			if m, err := OpenModules(d, release); err != nil || m.Dir() != dir {
				t.Errorf("%s, release %q: %v", d, release, err)
			}
		}
	}
	usr := t.TempDir()
	if err := os.MkdirAll(filepath.Join(usr, "usr/lib"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(root, "lib/modules"), filepath.Join(usr, "usr/lib/modules")); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenModules(usr, kerneltest.Release); err != nil {
		t.Error(err)
	}
	for _, c := range []struct{ dir, release, want string }{
		{root, "1.2.3", "has none for kernel 1.2.3 (only " + kerneltest.Release + ")"},
		{dir, "1.2.3", "is for kernel " + kerneltest.Release + ", but the kernel is 1.2.3"},
		{filepath.Join(root, "nowhere"), kerneltest.Release, "no such file or directory"},
		{filepath.Join(dir, "modules.dep"), kerneltest.Release, "is a file"},
		{t.TempDir(), kerneltest.Release, "has none for kernel"},
		{t.TempDir(), "", "has no kernel modules in it"},
	} {
		_, err := OpenModules(c.dir, c.release)
		if !errors.Is(err, ErrNoModules) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), c.dir) {
			t.Errorf("got %v, want %s", err, c.want)
		}
	}
	writeFile(t, filepath.Join(root, "lib/modules/1.1.1/modules.order"), nil)
	if _, err := OpenModules(root, ""); err == nil || !strings.Contains(err.Error(), "several") {
		t.Errorf("two kernels: %v", err)
	}
}

func TestFindModules(t *testing.T) {
	root, dir := kmodtest.Tree(t, true)
	for _, path := range []string{"boot/vmlinuz", "vmlinuz", "lib/modules/" + kerneltest.Release + "/vmlinuz"} {
		m, err := FindModules(&kernel.Kernel{Path: filepath.Join(root, path), Release: kerneltest.Release})
		if err != nil || m.Dir() != dir {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, k := range []kernel.Kernel{{Path: filepath.Join(root, "boot/vmlinuz"), Release: "1.2.3"}, {Path: filepath.Join(root, "boot/vmlinuz")}} {
		if _, err := FindModules(&k); !errors.Is(err, ErrNoModules) {
			t.Errorf("release %q: %v", k.Release, err)
		}
	}
}

func TestMergeModules(t *testing.T) {
	f := func(name string, optional bool) ModuleFile { return ModuleFile{Name: name, Optional: optional} }
	got := MergeModules([]ModuleFile{f("a", true), f("b", false)}, []ModuleFile{f("a", false), f("c", true), f("b", true)})
	if names(got) != "a b c?" {
		t.Error(names(got))
	}
}

func TestModuleNames(t *testing.T) {
	for path, want := range map[string]string{
		"kernel/crypto/crc32c-intel.ko.xz": "crc32c_intel", "snd-hda.ko": "snd_hda", "x": "x", "a/b-c": "b_c",
	} {
		if got := ModuleName(path); got != want {
			t.Errorf("%s: %s", path, got)
		}
	}
	if got := Underscores("pci:v00[0-9]d-x"); got != "pci:v00[0-9]d_x" {
		t.Error(got)
	}
}

func FuzzModuleInfo(f *testing.F) {
	f.Add(kmodtest.Module("depends=a,b", "softdep=pre: c post: d", "alias=e"))
	f.Add(kmodtest.Module())
	f.Fuzz(func(t *testing.T, data []byte) {
		info, err := parseModuleInfo("fuzz", bytes.NewReader(data))
		if err != nil {
			return
		}
		if slices.Contains(info.depends, "") {
			t.Error("an empty dependency")
		}
	})
}

func TestRealModules(t *testing.T) {
	k, err := kernel.LoadKernel(kerneltest.Path(t))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	m, err := FindModules(k)
	if err != nil {
		t.Skip(err)
	}
	files, err := m.Resolve("virtio_pci", "virtio_blk", "ext4")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if _, err := f.Load(); err != nil {
			t.Error(err)
		}
	}
	// Without modules.dep the same modules are found, each after its needs.
	bare, err := newModules(m.Dir())
	if err != nil {
		t.Fatal(err)
	}
	bare.have.dep, bare.have.alias, bare.have.softdep = false, false, false
	again, err := bare.Resolve("virtio_pci", "virtio_blk", "ext4")
	if err != nil {
		t.Fatal(err)
	}
	if len(again) != len(files) {
		t.Errorf("with modules.dep %v\nwithout %v", files, again)
	}
}

func writeFile(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}
