package ext4test

import (
	"os"
	"os/exec"
	"testing"
)

// Check fails the test if e2fsck finds anything wrong with the file system in
// the file at path. Without e2fsck it only logs.
func Check(t testing.TB, path string) {
	t.Helper()
	tool, err := exec.LookPath("e2fsck")
	if err != nil {
		tool = "/sbin/e2fsck"
		if _, err := os.Stat(tool); err != nil {
			t.Log("not checked: there is no e2fsck here; apt-get install e2fsprogs brings it")
			return
		}
	}
	out, err := exec.Command(tool, "-fn", path).CombinedOutput()
	if err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
}
