package guesttest

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/internal/host"
)

// A disk on an image in another folder can be compared, flattened and mapped
// while it is open.
func TestMachineDisk(t *testing.T) {
	base := filepath.Join(t.TempDir(), "base.img")
	contents := bytes.Repeat([]byte("base"), 1<<18)
	if err := os.WriteFile(base, contents, 0o666); err != nil {
		t.Fatal(err)
	}
	s := &setup{tmp: t.TempDir()}
	defer s.Close()
	if err := s.addDisks(&Config{Base: base, Disks: []Disk{{Size: 1 << 20}}}, s.tmp); err != nil {
		t.Fatal(err)
	}
	if want := disksEnv + "=/dev/vdb"; s.guest.Command.Env[0] != want {
		t.Errorf("%q, want %q", s.guest.Command.Env, want)
	}
	root := &MachineDisk{d: s.disks[0]}
	if c, err := root.Compare(t.Context(), base); err != nil || !c.Equal {
		t.Errorf("a fresh overlay and its base: %+v, %v", c, err)
	}
	if _, err := s.guest.Disks[0].Backend.WriteAt(bytes.Repeat([]byte("x"), 4096), 8192); err != nil {
		t.Fatal(err)
	}
	if c, err := root.Compare(t.Context(), base); err != nil || c.Equal || c.Offset != 8192 {
		t.Errorf("after a write at 8192: %+v, %v", c, err)
	}
	if n := root.Allocated(); n != 4096 {
		t.Errorf("%d bytes are allocated", n)
	}
	extents, err := root.Map(t.Context())
	if err != nil || len(extents) != 3 || extents[1].Start != 8192 || extents[1].Depth != 0 || extents[0].Depth != 1 {
		t.Errorf("%+v, %v", extents, err)
	}
	out := filepath.Join(t.TempDir(), "flat")
	if err := root.Flatten(t.Context(), out); err != nil {
		t.Fatal(err)
	}
	copy(contents[8192:], bytes.Repeat([]byte("x"), 4096))
	if b, err := os.ReadFile(out); err != nil || !bytes.Equal(b, contents) {
		t.Errorf("the flattened disk is another (%v)", err)
	}
}

// An image whose own base lies in a folder that the user trusts is a base for tests, and can be looked at.
func TestTrustedFolders(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	base, mid := filepath.Join(elsewhere, "base.img"), filepath.Join(dir, "mid.cow")
	if err := os.WriteFile(base, bytes.Repeat([]byte("base"), 1<<10), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := cowdisk.Create(mid, cowdisk.CreateOptions{Backing: base}); err != nil {
		t.Fatal(err)
	}
	add := func() (*setup, error) {
		s := &setup{tmp: t.TempDir()}
		return s, s.addDisks(&Config{Base: mid}, s.tmp)
	}
	t.Setenv(host.BackingRootsEnv, "")
	s, err := add()
	s.Close()
	if !errors.Is(err, cowdisk.ErrBackingOutside) {
		t.Fatalf("a base in a folder that nobody trusts: %v", err)
	}
	t.Setenv(host.BackingRootsEnv, elsewhere)
	s, err = add()
	defer s.Close()
	if err != nil {
		t.Fatal(err)
	}
	if c, err := (&MachineDisk{d: s.disks[0]}).Compare(t.Context(), base); err != nil || !c.Equal {
		t.Errorf("%+v, %v", c, err)
	}
}

// What a guest wrote into a raw disk is not taken for an image, and said to be raw it is one: by the flag, the field, and for the base.
func TestDiskFormat(t *testing.T) {
	dir := t.TempDir()
	img, link := filepath.Join(dir, "guest,1.img"), filepath.Join(dir, "link")
	if err := cowdisk.Create(img, cowdisk.CreateOptions{Size: 1 << 20}); err != nil { // as a guest may write it
		t.Fatal(err)
	}
	if err := os.Symlink(img, link); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(img)
	if err != nil {
		t.Fatal(err)
	}
	flag := func(s string) *Config {
		d, err := ParseDisk(s, parseSize)
		if err != nil {
			t.Fatal(err)
		}
		return &Config{Disks: []Disk{d}}
	}
	doubled := strings.ReplaceAll(img, ",", ",,")
	for name, c := range map[string]struct {
		cfg  *Config
		size int64 // 0 = refused
	}{
		"unnamed":      {flag(doubled), 0},
		"unnamed base": {&Config{Base: img}, 0},
		"raw":          {flag(doubled + ",format=raw"), st.Size()},
		"raw, ro":      {flag(doubled + ",ro,format=raw"), st.Size()},
		"cow":          {flag(doubled + ",format=cow"), 1 << 20},
		"link":         {flag(link + ",format=raw"), st.Size()},
		"field":        {&Config{Disks: []Disk{{Image: img, Format: cowdisk.FormatRaw}}}, st.Size()},
		"raw base":     {&Config{Base: img + ",format=raw"}, st.Size()},
		"linked base":  {&Config{Base: link + ",format=raw"}, st.Size()},
		"cow base":     {&Config{Base: img + ",format=cow"}, 1 << 20},
	} {
		if err := c.cfg.absolute(); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		s := &setup{tmp: t.TempDir()}
		err := s.addDisks(c.cfg, s.tmp)
		switch {
		case c.size == 0 && !errors.Is(err, cowdisk.ErrFormat):
			t.Errorf("%s: %v", name, err)
		case c.size != 0 && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.size != 0 && s.disks[0].cow.Size() != (c.size+511)&^511:
			t.Errorf("%s: a disk of %d bytes, want %d", name, s.disks[0].cow.Size(), c.size)
		}
		s.Close()
	}
}
