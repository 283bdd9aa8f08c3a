package cowdisk

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// Nothing can stand on an image that has no name any more.
func TestSnapshotNameless(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "base"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "0.cow")
	if err := Create(path, CreateOptions{Backing: "base"}); err != nil {
		t.Fatal(err)
	}
	d, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	next := filepath.Join(dir, "1.cow")
	var e *Error
	if err := d.Snapshot(next); !errors.As(err, &e) || e.Path != path {
		t.Errorf("frozen without a name: %v", err)
	}
	if _, err := os.Stat(next); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an overlay was made all the same: %v", err)
	}
	if _, err := d.WriteAt([]byte("x"), 0); err != nil {
		t.Errorf("the disk does not go on: %v", err)
	}
}
