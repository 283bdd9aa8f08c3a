//go:build linux

package hangfs_test

import (
	"bytes"
	"os"
	"os/exec"
	"testing"

	"github.com/moovm/moovm/internal/hangfs"
)

// The file is a file; then it hangs, and who waits for it can be killed.
func TestFile(t *testing.T) {
	f := hangfs.New(t, 1<<20)
	h, err := os.OpenFile(f.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	want := bytes.Repeat([]byte("data"), 1<<16)
	if _, err := h.WriteAt(want, 4096); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := h.ReadAt(got, 4096); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read: %v", err)
	}
	if err := h.Sync(); err != nil {
		t.Error(err)
	}
	if st, err := h.Stat(); err != nil || st.Size() != 1<<20 {
		t.Errorf("size %v, %v", st.Size(), err)
	}
	// head says that it has the first byte, and hangs at a later one.
	cmd := exec.Command("sh", "-c", `exec 3<"$1"; head -c 1 <&3 | od -An -tx1; while head -c 1000 <"$1"; do :; done`, "sh", f.Path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	first := make([]byte, 3)
	if _, err := out.Read(first); err != nil || string(first) != " 00" {
		t.Errorf("the first byte: %q, %v", first, err)
	}
	f.Waited(t)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // does not hang
}
