package e2e

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// example runs a program of examples/, which scripts/e2e.sh builds beside
// moovm, in dir, and returns what it prints.
func example(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	program := filepath.Join(filepath.Dir(moovmBin), "example-"+name)
	if _, err := os.Stat(program); err != nil {
		t.Skipf("needs %s; run `make test-e2e`, which builds it", program)
	}
	modules, err := filepath.Glob(filepath.Join(filepath.Dir(kernel), "../lib/modules/*"))
	if err != nil || len(modules) != 1 {
		t.Fatalf("modules of %s: %v, %v", kernel, modules, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, append([]string{"-kernel", kernel, "-modules", modules[0]}, args...)...)
	cmd.Dir = dir
	start := time.Now()
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = errors.Join(err, ctx.Err())
	}
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
	t.Logf("%s: %v", name, time.Since(start).Round(time.Millisecond))
	return string(out)
}

// An unmodified gokvm, with our virtio-mmio block and 9P devices plugged in from
// outside, boots a stock kernel on a COW root.
func TestExampleGokvm(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	before := checksum(t, filepath.Join(dir, "base.img"))
	overlay(t, dir)
	out := example(t, dir, "gokvm", "root.cow", "sh", "-c",
		`echo root=$(findmnt -no SOURCE,FSTYPE /); echo tree=$(findmnt -no FSTYPE /run/moovm);
		cd /run/moovm/disks/vda; echo $(cat format serial); a=$(cat allocated)
		dd if=/dev/urandom of=/new bs=64k count=16 conv=fsync 2>/dev/null && md5sum /new > /sum
		[ $(cat allocated) -ge $((a + 2048)) ] && echo tree is live; sync; echo written`)
	for _, want := range []string{"root=/dev/vda ext4", "tree=9p", "cow moovm", "tree is live", "written"} {
		if !strings.Contains(out, want) {
			t.Errorf("the guest did not say %q", want)
		}
	}
	if t.Failed() {
		t.Log(out)
	}
	// Our own machine reads what gokvm's wrote.
	r := moovm(t, dir, runArgs(sh("md5sum -c /sum")...)...)
	r.wantStatus(t, 0)
	if after := checksum(t, filepath.Join(dir, "base.img")); after != before {
		t.Error("the base image changed")
	}
}

// A program asks the web server in its guest, without a port of this machine's.
func TestExampleNet(t *testing.T) {
	needKVM(t)
	out := example(t, folder(t), "net")
	if !strings.Contains(out, " in a guest answers 10.0.2.2:") {
		t.Errorf("the guest answered %q", out)
	}
}

// A disk of fifty lines is read by a guest.
func TestExampleBackend(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	overlay(t, dir)
	out := example(t, dir, "backend", "-sector", "123456789", "root.cow")
	if !strings.HasPrefix(out, "sector 123456789 ") {
		t.Errorf("the guest read %q", out)
	}
}
