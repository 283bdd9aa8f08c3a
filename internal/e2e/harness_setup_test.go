package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What comes before the tests: set-up in the guest, modules by name, the
// kernel's configuration; and a script in the place of the test binary.
func TestHarnessSetup(t *testing.T) {
	needKVM(t)
	t.Run("works", func(t *testing.T) {
		r := mtest(t, []string{"--setup", "mkdir /set && mount -t tmpfs -o size=123k none /set; echo set up in $PWD", "--setup", "echo $SETTING >/set/file",
			"--env", "SETTING=value"}, "-test.v", "-test.run=^TestGuestSetup$")
		r.wantStatus(t, 0)
		here, _ := os.Getwd()
		r.wantStdout(t, "found value", "--- PASS: TestGuestSetup")
		if !strings.Contains(r.stderr, "set up in "+here+"\n") {
			t.Errorf("the set-up's words are not on stderr: %v", r)
		}
	})
	t.Run("fails", func(t *testing.T) {
		r := mtest(t, []string{"--setup", "echo why; exit 3", "--setup", "echo not this"}, "-test.v", "-test.run=^TestGuestPass$")
		r.wantStatus(t, 125)
		if want := `moovm: the set-up "echo why; exit 3" failed in the guest, nothing else ran: exit status 3`; !strings.Contains(r.stderr, want) ||
			!strings.Contains(r.stderr, "why\n") || strings.Contains(r.stderr, "not this\n") || strings.Contains(r.stdout, "TestGuestPass") {
			t.Error(r)
		}
	})
	t.Run("hangs", func(t *testing.T) {
		r := mtest(t, []string{"--setup", "sleep 1000", "--boot-timeout", "80s"}, "-test.run=^TestGuestPass$")
		r.wantStatus(t, 125)
		if !strings.Contains(r.stderr, "the set-up in the guest did not end in time: not within 1m20s") {
			t.Error(r)
		}
	})
	t.Run("script", func(t *testing.T) {
		script := filepath.Join(t.TempDir(), "script")
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprintf("#!/bin/sh\nset -e\nmkdir /set; echo scripted >/set/file\nexec %s \"$@\"\n", self)
		if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		r := moovm(t, mustGetwd(t), "test", "--kernel", kernel, "--accel", "kvm", script, "-test.v", "-test.run=^TestGuestSetup$")
		r.wantStatus(t, 0)
		r.wantStdout(t, "found scripted", "--- PASS: TestGuestSetup")
	})
	t.Run("unknown module", func(t *testing.T) {
		r := mtest(t, []string{"--load", "dummi"}, "-test.run=^TestGuestPass$")
		r.wantStatus(t, 125)
		if !strings.Contains(r.stderr, "near names: dummy") {
			t.Error(r)
		}
	})
}

func mustGetwd(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestGuestSetup(t *testing.T) {
	inGuest(t)
	b, err := os.ReadFile("/set/file")
	fmt.Println("found", string(b), err)
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	config, err := os.ReadFile("/boot/config-" + strings.TrimSpace(string(release)))
	if err != nil || !strings.Contains(string(config), "CONFIG_VIRTIO") {
		t.Errorf("the kernel's configuration: %d bytes, %v", len(config), err)
	}
}
