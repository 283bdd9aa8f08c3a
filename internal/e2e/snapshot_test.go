package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// treeSum is the sum of what a folder holds.
func treeSum(t *testing.T, dir string) string {
	t.Helper()
	sum := sha256.New()
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(names) == 0 {
		t.Fatalf("%s: %v, %v", dir, names, err)
	}
	for _, n := range names {
		f, err := os.Open(n)
		if err != nil {
			t.Fatal(err)
		}
		size, err := io.Copy(sum, f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(sum, "%s %d\n", n, size)
	}
	return fmt.Sprintf("%x", sum.Sum(nil))
}

// TestSnapshotCommand: a guest that was set up is kept, and two that go on from
// it at once have its memory and its disk, each its own, and other random
// numbers; nothing of the snapshot changes.
func TestSnapshotCommand(t *testing.T) {
	needKVM(t)
	image, err := localBase()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	snap := filepath.Join(dir, "snap")
	flags := []string{"--kernel", kernel, "--accel", "kvm", "--base", image, "--memory", "128M"}
	r := moovm(t, dir, append(append([]string{"snapshot", "-o", snap}, flags...), "--", "sh", "-ec",
		"mkdir /run/set; mount -t tmpfs none /run/set; echo memory >/run/set/up; echo disk >/root/file; echo set up")...)
	r.wantStatus(t, 0)
	r.wantStdout(t, "set up")
	r = moovm(t, dir, "info", snap)
	r.wantStatus(t, 0)
	r.wantStdout(t, "128 MiB", image)
	before := treeSum(t, snap)

	script := "cat /run/set/up /root/file; cat >/root/file; cat /root/file /proc/sys/kernel/random/uuid; sync; exit 7"
	var uuids [2]string
	var wg sync.WaitGroup
	for i := range uuids {
		wg.Go(func() {
			cmd := command(t.Context(), dir, "run", "--restore", snap, "--accel", "kvm", "--backing-root", filepath.Dir(image), "--timeout", "4m", "--", "sh", "-c", script)
			cmd.Stdin = strings.NewReader(fmt.Sprintf("mine %d\n", i))
			var stderr strings.Builder
			cmd.Stderr = &stderr
			start := time.Now()
			out, err := cmd.Output()
			t.Logf("restore %d: %v", i, time.Since(start).Round(time.Millisecond))
			want := fmt.Sprintf("memory\ndisk\nmine %d\n", i)
			uuid, ok := strings.CutPrefix(string(out), want)
			if !ok || cmd.ProcessState.ExitCode() != 7 {
				t.Errorf("restore %d: %q, %v, want %q and status 7\n%s", i, out, err, want, stderr.String())
			}
			uuids[i] = uuid
		})
	}
	wg.Wait()
	if uuids[0] == uuids[1] || len(uuids[0]) != 37 {
		t.Errorf("the UUIDs of two guests are %q", uuids)
	}
	if treeSum(t, snap) != before {
		t.Error("the snapshot is not what it was")
	}
	r = moovm(t, dir, "run", "--restore", snap, "--accel", "kvm", "--", "true")
	r.wantStatus(t, 125)
	r.wantStderr(t, "lies outside the allowed folders")
	// A set-up that fails leaves nothing.
	other := filepath.Join(dir, "other")
	r = moovm(t, dir, append(append([]string{"snapshot", "-o", other}, flags...), "--", "sh", "-c", "exit 3")...)
	r.wantStatus(t, 3)
	if left, _ := filepath.Glob(other + "*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
