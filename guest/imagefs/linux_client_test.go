//go:build linux

package imagefs_test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest/imagefs"
	"github.com/moovm/moovm/virtio9p/virtio9ptest"
)

// Standard tools on the tree, through a Linux kernel's own client.
func TestLinuxClient(t *testing.T) {
	d := chain(t, cowdisk.QEMUV2)
	mnt := virtio9ptest.Mount(t, tree(t, imagefs.Disk{Name: "vda", Serial: "s", Image: imagefs.COW(d), RevealPaths: true}))
	out, err := exec.Command("sh", "-euxc", `
		cd "$0"; copy="$1"
		ls -lR . > /dev/null
		test "$(find . -type f | wc -l)" = 57
		test "$(find . -type d | wc -l)" = 8
		cp -a . "$copy"
		diff -r . "$copy"
		tar cf - . | tar df -
		dd if=disks/vda/bitmap bs=7 2>/dev/null | cmp - disks/vda/bitmap
		test "$(stat -c %s disks/vda/header)" = 1056
		test "$(cat disks/by-serial/s/allocated)" = 0
		test "$(stat -c %a:%u disks/vda/info)" = 444:0
		df . > /dev/null
	`, mnt, filepath.Join(t.TempDir(), "copy")).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	before, err := os.Stat(mnt + "/disks/vda/allocated")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(mnt + "/disks/vda/allocated")
	if err != nil || string(b) != "8\n" {
		t.Errorf("allocated %q, %v", b, err)
	}
	after, err := os.Stat(mnt + "/disks/vda/allocated")
	if err != nil || !after.ModTime().After(before.ModTime()) {
		t.Errorf("mtime %v, then %v, %v", before.ModTime(), after.ModTime(), err)
	}
	var info cowdisk.Info
	b, err = os.ReadFile(mnt + "/disks/vda/info")
	if err == nil {
		err = json.Unmarshal(b, &info)
	}
	if want := d.Info(); err != nil || info.Filename != want.Filename || *info.FormatSpecific != *want.FormatSpecific {
		t.Errorf("info %+v, want %+v; %v", info, want, err)
	}

	for what, err := range map[string]error{
		"write":  os.WriteFile(mnt+"/disks/vda/allocated", nil, 0o644),
		"create": os.WriteFile(mnt+"/disks/new", nil, 0o644),
		"mkdir":  os.Mkdir(mnt+"/disks/new", 0o755),
		"remove": os.Remove(mnt + "/version"),
		"rename": os.Rename(mnt+"/version", mnt+"/v"),
		"chmod":  os.Chmod(mnt+"/version", 0o777),
	} {
		if !errors.Is(err, syscall.EROFS) {
			t.Errorf("%s: %v, want EROFS", what, err)
		}
	}
}
