package guesttest

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
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
