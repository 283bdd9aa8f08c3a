package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The process that runs a test binary's guest is confined, and the one that
// writes the files that come back is another.
func TestHarnessConfined(t *testing.T) {
	needKVM(t)
	profile := filepath.Join(t.TempDir(), "cpu.out")
	ended := make(chan result, 1)
	go func() {
		ended <- mtest(t, nil, "-test.v", "-test.run=^TestGuestPass$", "-test.count=1", "-test.cpuprofile="+profile, "-test.timeout=2m")
	}()
	confined := false
	for {
		select {
		case r := <-ended:
			r.wantStatus(t, 0)
			wantFile(t, profile, "")
			if !confined {
				t.Error("no process was confined while the guest ran")
			}
			return
		case <-time.After(20 * time.Millisecond):
			confined = confined || confinedChild(t)
		}
	}
}

// confinedChild looks for a moovm with a filter of system calls whose parent
// is a moovm that has none.
func confinedChild(t *testing.T) bool {
	t.Helper()
	field := func(status, name string) string {
		_, rest, _ := strings.Cut(status, "\n"+name+":\t")
		value, _, _ := strings.Cut(rest, "\n")
		return value
	}
	read := func(pid string) (exe, status string) {
		exe, _ = os.Readlink("/proc/" + pid + "/exe")
		b, _ := os.ReadFile("/proc/" + pid + "/status")
		return exe, string(b)
	}
	names, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		exe, status := read(filepath.Base(name))
		if filepath.Base(exe) != filepath.Base(moovmBin) || field(status, "Seccomp") != "2" || field(status, "NoNewPrivs") != "1" {
			continue
		}
		if parent, of := read(field(status, "PPid")); filepath.Base(parent) == filepath.Base(moovmBin) && field(of, "Seccomp") == "0" {
			return true
		}
	}
	return false
}
