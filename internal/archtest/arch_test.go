// Package archtest holds the tests of the house: which room may import which,
// and where unsafe may stand.
package archtest

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/moovm/moovm/"

// arrows says which of our packages a room's code may import. A room is a
// folder with all below it; the longest entry that fits decides.
var arrows = map[string][]string{
	"cowdisk":               {},
	"virtio":                {"internal/ratelog"},
	"virtio/pci":            {"virtio", "internal/ratelog"},
	"virtio/mmio":           {"virtio", "internal/ratelog"},
	"virtio/vhostuser":      {"virtio", "internal/unixsock", "internal/ratelog"},
	"ctl":                   {"internal/unixsock"},
	"lineage":               {"cowdisk"},
	"delta":                 {"cowdisk"},
	"qcow2":                 {},
	"virtio/virtiotest":     {"virtio", "virtio/pci", "virtio/mmio", "virtio/vhostuser"},
	"virtioblk":             {"virtio"},
	"virtiorng":             {"virtio"},
	"virtionet":             {"virtio"},
	"virtiovsock":           {"virtio", "internal/ratelog"},
	"usernet":               {"virtionet", "internal/ratelog"},
	"virtio9p":              {"virtio", "internal/ratelog"},
	"virtio9p/virtio9ptest": {"virtio", "virtio/virtiotest", "virtio9p"},
	"internal/kvm":          {"internal/host"},
	"internal/host":         {},
	"internal/reexec":       {},
	"internal/ptytest":      {},
	"internal/confine":      {"internal/kvm"},
	"vmm":                   {"virtio", "virtio/pci", "virtio/mmio", "internal/kvm"},
	"internal/agent":        {"internal/bytejson"},
	"internal/bytejson":     {},
	"internal/unpack":       {},
	"internal/blkid":        {},
	"internal/ext4":         {},
	"oci":                   {"internal/ext4", "internal/unpack"},
	"internal/pipe":         {},
	"kernel":                {"internal/unpack", "internal/host"},
	"kernel/debian":         {},
	"kmod":                  {"kernel", "internal/unpack"},
	"guest":                 {"internal/bytejson", "virtionet", "virtiovsock", "vmm", "virtio", "virtioblk", "virtio9p", "cowdisk", "guest/control", "initramfs", "guest/imagefs", "guest/sharefs", "internal/blkid", "internal/pipe", "internal/ratelog", "kernel", "kmod", "internal/printable"},
	"guest/imagefs":         {"cowdisk", "internal/bytejson"},
	"guest/control":         {"internal/bytejson", "internal/printable"},
	"guest/guestinit":       {"internal/printable", "guest/control", "internal/agent", "internal/blkid", "internal/pipe", "kmod", "internal/bytejson"},
	"initramfs":             {"guest/control", "kmod"},
	"guest/sharefs":         {},
	"guest/guesttest":       {"guest", "guest/control", "guest/guestinit", "initramfs", "kernel", "kmod", "guest/imagefs", "guest/sharefs", "cowdisk", "virtioblk", "vmm", "internal/agent", "internal/closing", "internal/confine", "internal/host", "internal/reexec", "internal/sandbox", "internal/bytejson", "internal/printable"},
	"internal/sandbox":      {"guest", "guest/control", "guest/guestinit", "initramfs", "kernel", "kmod", "internal/agent", "internal/filefs", "internal/reexec", "virtio/vhostuser", "internal/bytejson", "internal/printable"},
	"internal/archtest":     {},
	"internal/filefs":       {"virtio"},
	"internal/printable":    {},
	"internal/ratelog":      {},
	"internal/unixsock":     {},
	"internal/closing":      {},
	"internal/hangfs":       {},
	"internal/e2e":          {},
	// The program may use every public room.
	"cmd/moovm": {"internal/bytejson", "internal/printable", "usernet", "virtionet", "virtiovsock", "kernel/debian", "ctl", "delta", "lineage", "guest", "guest/control", "guest/guestinit", "initramfs", "kernel", "kmod", "guest/imagefs", "guest/sharefs", "guest/guesttest", "cowdisk", "vmm", "virtio9p", "virtioblk", "virtio/vhostuser", "internal/agent", "internal/sandbox", "internal/confine", "internal/host", "internal/reexec", "internal/unixsock", "internal/closing", "internal/printable", "oci"},
	// Examples show the public rooms, to whoever embeds them.
	"examples": {"usernet", "cowdisk", "virtio", "virtio/mmio", "virtioblk", "virtio9p", "guest", "guest/control", "guest/guestinit", "initramfs", "guest/guesttest", "guest/imagefs", "kernel", "kmod", "vmm"},
}

// sources calls f for every Go file of the module that is not a test.
func sources(t *testing.T, f func(path, dir string)) {
	t.Helper()
	root := filepath.Join("..", "..")
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatal(err)
	}
	seen := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if d.IsDir() && rel != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "bin" || d.Name() == "testdata") {
			return fs.SkipDir
		}
		if !d.IsDir() && strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
			seen++
			f(path, filepath.ToSlash(filepath.Dir(rel)))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen < 20 {
		t.Fatalf("found only %d Go files: looking in the wrong place", seen)
	}
}

// room is the longest entry of arrows that dir lies in.
func room(dir string) (string, bool) {
	for d := dir; d != "."; d = filepath.ToSlash(filepath.Dir(d)) {
		if _, ok := arrows[d]; ok {
			return d, true
		}
	}
	return "", false
}

func TestArrows(t *testing.T) {
	fset := token.NewFileSet()
	sources(t, func(path, dir string) {
		from, ok := room(dir)
		if !ok {
			t.Errorf("%s: the folder %s is no room of the house; give it a place in arrows", path, dir)
			return
		}
		file, err := parser.ParseFile(fset, path, nil, parser.ImportsOnly)
		if err != nil {
			t.Error(err)
			return
		}
		for _, imp := range file.Imports {
			target, _ := strconv.Unquote(imp.Path.Value)
			target, ours := strings.CutPrefix(target, module)
			if !ours {
				continue
			}
			to, ok := room(target)
			if !ok || to != from && !slices.Contains(arrows[from], to) {
				t.Errorf("%s imports %s: no arrow leads from %s there", path, target, from)
			}
		}
	})
}

// TestUnsafe keeps unsafe in files that say so by their name.
func TestUnsafe(t *testing.T) {
	fset := token.NewFileSet()
	sources(t, func(path, _ string) {
		file, err := parser.ParseFile(fset, path, nil, parser.ImportsOnly)
		if err != nil {
			t.Error(err)
			return
		}
		for _, imp := range file.Imports {
			if imp.Path.Value == `"unsafe"` && !strings.Contains(filepath.Base(path), "_unsafe") {
				t.Errorf("%s imports unsafe; that belongs into a file named *_unsafe.go", path)
			}
		}
	})
}
