package e2e

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/guest/guesttest"
)

// harnessMain makes TestMain use guesttest.Main: the first way in.
const harnessMain = "MOOVM_E2E_MAIN"

// harnessHook makes this test binary the init of the guests it boots.
func harnessHook(m *testing.M) {
	guesttest.Hook()
	if base := os.Getenv(harnessMain); base != "" || guesttest.InGuest() {
		guesttest.Main(m, func(c *guesttest.Config) { c.Base = base })
	}
}

// mtest runs this test binary's TestGuest… tests by `moovm test`.
func mtest(t *testing.T, flags []string, args ...string) result {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	line := append([]string{"test", "--kernel", kernel, "--accel", "kvm"}, flags...)
	return moovm(t, dir, append(append(line, self), args...)...)
}

func (r result) wantStdout(t *testing.T, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(r.stdout, text) {
			t.Errorf("stdout lacks %q\n%v", text, r)
		}
	}
}

func wantFile(t *testing.T, path, text string) {
	t.Helper()
	if b, err := os.ReadFile(path); err != nil || !strings.Contains(string(b), text) {
		t.Errorf("%s lacks %q: %v\n%.2000s", path, text, err, b)
	}
}

// A Go test binary in a guest with this machine's root: what it finds there,
// and what comes back.
func TestHarness(t *testing.T) {
	needKVM(t)
	dir, artifacts := t.TempDir(), t.TempDir()
	t.Run("pass", func(t *testing.T) {
		cover := filepath.Join(dir, "cpu.out")
		r := mtest(t, []string{"--env", "HARNESS_TEXT=hello", "--artifacts", artifacts,
			"--disk", "size=8M,fault=EIO@1M+4K", "--disk", "size=1M,ro", "--disk", "size=1M,slow=400ms"},
			"-test.v", "-test.run=^TestGuest(Pass|Disks|Module)$|^FuzzGuest$", "-test.bench=Guest", "-test.benchtime=2x", "-test.count=1",
			"-test.cpuprofile="+cover, "-test.outputdir="+dir, "-test.timeout=2m")
		r.wantStatus(t, 0)
		here, _ := os.Getwd()
		r.wantStdout(t, "kernel ", "dir "+here, "env hello", "doc.go ", "--- SKIP: TestGuestPass/skipped", "--- PASS: TestGuestDisks",
			"--- PASS: TestGuestModule", "--- PASS: FuzzGuest/seed#0", "BenchmarkGuest", "PASS\n")
		wantFile(t, cover, "")
		if st, err := os.Stat(cover); err == nil && st.Size() == 0 {
			t.Error("the profile is empty")
		}
		if _, err := os.Stat("scratch-in-package"); err == nil {
			t.Error("what the guest wrote in the package's folder is on the host")
		}
		logs, _ := filepath.Glob(artifacts + "/*/console.log")
		if len(logs) != 1 {
			t.Errorf("console logs: %q", logs)
		}
	})
	t.Run("fail", func(t *testing.T) {
		// Three tests fail in one guest: by itself, on a full disk, by the OOM
		// killer; a fourth leaves a core file.
		r := mtest(t, []string{"--artifacts", artifacts, "--memory", "384M", "--disk", "size=16M"},
			"-test.v", "-test.run=^TestGuest(Fail|Crash|FullDisk|OOM)$", "-test.timeout=3m")
		r.wantStatus(t, 1)
		r.wantStdout(t, "--- FAIL: TestGuestFail", "this test fails", "--- FAIL: TestGuestFullDisk", "no space left on device",
			"--- FAIL: TestGuestOOM", "the eater was killed", "--- FAIL: TestGuestCrash", "FAIL\n")
		r.wantStderr(t, "the kernel had an OOM kill while TestGuestOOM ran")
		cores, _ := filepath.Glob(artifacts + "/*/core.*")
		if len(cores) == 0 {
			t.Error("no core file came back")
		}
	})
	t.Run("kernel panic", func(t *testing.T) {
		r := mtest(t, []string{"--root", "initramfs"}, "-test.v", "-test.run=^TestGuestKernelPanic$")
		r.wantStatus(t, 126)
		r.wantStdout(t, "about to panic", "Kernel panic - not syncing: sysrq triggered crash", "  | ", "--- FAIL: TestGuestKernelPanic/inner")
		if !strings.HasSuffix(r.stdout, "--- FAIL: TestGuestKernelPanic (0.00s)\nFAIL\n") {
			t.Errorf("the report does not end as a test's: %v", r)
		}
	})
	t.Run("no kernel", func(t *testing.T) {
		r := mtest(t, []string{"--kernel", filepath.Join(dir, "missing")}, "-test.run=^TestGuestPass$")
		r.wantStatus(t, 125)
		r.wantStderr(t, "missing")
	})
	t.Run("no modules", func(t *testing.T) {
		lonely := filepath.Join(dir, "vmlinuz")
		if err := os.Symlink(kernel, lonely); err != nil {
			t.Fatal(err)
		}
		self, _ := os.Executable()
		r := moovm(t, dir, "test", "--kernel", lonely, "--accel", "kvm", "--boot-timeout", "90s", self, "-test.run=^TestGuestPass$")
		r.wantStatus(t, 125)
		r.wantStderr(t, "modules")
	})
}

// The ends of a test binary are the host's.
func TestLongHarnessEnds(t *testing.T) {
	needKVM(t)
	long(t)
	for _, c := range []struct {
		name   string
		flags  []string
		args   []string
		status int
		stdout []string
	}{
		{"panic", nil, []string{"-test.run=^TestGuestPanic$"}, 2, []string{"panic: this test panics"}},
		{"exit 3", nil, []string{"-test.run=^TestGuestExit3$"}, 3, nil},
		{"hang", nil, []string{"-test.run=^TestGuestHang$", "-test.timeout=2s"}, 2, []string{"panic: test timed out after 2s"}},
		{"stopped process", []string{"--timeout", "10s"}, []string{"-test.v", "-test.run=^TestGuestStuckProcess$"}, 124,
			[]string{"the test did not end within 10s", "--- FAIL: TestGuestStuckProcess"}},
		{"oops", nil, []string{"-test.v", "-test.run=^TestGuestOops$"}, 1, []string{"the kernel had an oops while TestGuestOops ran", "NULL pointer", "FAIL\n"}},
		{"oops ignored", []string{"--ignore-oops"}, []string{"-test.v", "-test.run=^TestGuestOops$"}, 0, []string{"PASS"}},
		{"test2json", nil, []string{"-test.v=test2json", "-test.run=^TestGuestKernelPanic$"}, 126, []string{"\x16--- FAIL: TestGuestKernelPanic (0.00s)\n"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := mtest(t, append(c.flags, "--root", "initramfs"), c.args...)
			r.wantStatus(t, c.status)
			for _, text := range c.stdout {
				if !strings.Contains(r.stdout+r.stderr, text) {
					t.Errorf("no %q\n%v", text, r)
				}
			}
		})
	}
}

// Where the boot ends before user space, the end of the console and the usual
// causes are told.
func TestLongHarnessNoBoot(t *testing.T) {
	needKVM(t)
	long(t)
	r := mtest(t, []string{"--append", "rdinit=/nonesuch root=/dev/nonesuch", "--boot-timeout", "60s"}, "-test.run=^TestGuestPass$")
	if r.status != 125 && r.status != 126 {
		t.Errorf("exit status %d\n%v", r.status, r)
	}
	if !strings.Contains(r.stdout+r.stderr, "  | ") {
		t.Errorf("the console's end is not told\n%v", r)
	}
	r = mtest(t, []string{"--boot-timeout", "1ms"}, "-test.run=^TestGuestPass$")
	r.wantStatus(t, 125)
	r.wantStderr(t, "Usual causes")
}

// guesttest.Main, the first way in, on a base image, several at a time.
func TestHarnessMain(t *testing.T) {
	needKVM(t)
	image, err := localBase()
	if err != nil {
		t.Fatal(err)
	}
	before := checksum(t, image)
	self, _ := os.Executable()
	for _, name := range []string{"one", "two"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			cmd := exec.CommandContext(ctx, self, "-test.v", "-test.run=^TestGuestPass$")
			cmd.Env = append(os.Environ(), harnessMain+"="+image, "HARNESS_TEXT="+name)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for _, text := range []string{"env " + name, "--- PASS: TestGuestPass ", "doc.go "} {
				if !strings.Contains(string(out), text) {
					t.Errorf("no %q in\n%s", text, out)
				}
			}
		})
	}
	t.Cleanup(func() {
		if after := checksum(t, image); after != before {
			t.Error("the base image changed")
		}
	})
}

// guesttest.Start: commands, the console, the disk, the power.
func TestHarnessStart(t *testing.T) {
	needKVM(t)
	image, err := localBase()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	m := guesttest.Start(t, guesttest.Config{Kernels: []string{kernel}, Base: image, Disks: []guesttest.Disk{{Size: 1 << 20, Serial: "extra"}}})

	r, err := m.RunWith(ctx, guesttest.Streams{Stdin: strings.NewReader("typed")}, "sh", "-c", "cat; echo oops >&2; exit 7")
	if err != nil || r != (guesttest.Result{Stdout: "typed", Stderr: "oops\n", Status: 7}) {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := m.Run(ctx, "no-such-command"); err != nil || r.Status != 127 {
		t.Errorf("%+v, %v", r, err)
	}
	// Two at a time, one of them killed.
	short, stop := context.WithTimeout(ctx, 3*time.Second)
	defer stop()
	killed := make(chan error, 1)
	go func() { _, err := m.Run(short, "sleep", "1000"); killed <- err }()
	if r, err := m.Run(ctx, "cat", "/sys/block/vdb/serial"); err != nil || r.Stdout != "extra" {
		t.Errorf("%+v, %v", r, err)
	}
	if err := <-killed; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the command that was given 3 s: %v", err)
	}

	typing := make(chan error, 1)
	go func() {
		_, err := m.Run(ctx, "sh", "-c", "echo name? > /dev/ttyS0; read x < /dev/ttyS0; echo hello $x 42 > /dev/ttyS0")
		typing <- err
	}()
	if err := m.Console().WaitFor(ctx, "name?"); err != nil {
		t.Fatal(err)
	}
	if err := m.Console().Send("harness"); err != nil {
		t.Error(err)
	}
	groups, err := m.Console().WaitForMatch(ctx, regexp.MustCompile(`hello (\w+) (\d+)\s`))
	if err != nil || groups[1] != "harness" || groups[2] != "42" {
		t.Errorf("%q, %v", groups, err)
	}
	if err := <-typing; err != nil {
		t.Error(err)
	}

	r, err = m.Run(ctx, "sh", "-c", "echo synced > /root/synced; dd if=/dev/urandom of=/dev/vdb bs=4k count=3 conv=fsync 2>/dev/null; sync")
	if err != nil || r.Status != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	if n := m.Disk(1).Allocated(); n != 3*4096 {
		t.Errorf("%d bytes of the extra disk are allocated", n)
	}
	extents, err := m.Disk(1).Map(ctx)
	if err != nil || len(extents) == 0 || extents[0].Length != 3*4096 {
		t.Errorf("map %+v, %v", extents, err)
	}
	if c, err := m.Disk(0).Compare(ctx, image); err != nil || c.Equal {
		t.Errorf("the root disk and its base: %+v, %v", c, err)
	}
	flat := filepath.Join(t.TempDir(), "vdb.raw")
	if err := m.Disk(1).Flatten(ctx, flat); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(flat); err != nil || len(b) != 1<<20 || bytes.Equal(b[:4096], make([]byte, 4096)) {
		t.Errorf("the flattened disk has %d bytes, %v", len(b), err)
	}

	m.Kill()
	if _, err := m.Run(ctx, "true"); err == nil {
		t.Error("a command ran without power")
	}
	m.Reset()
	if r, err := m.Run(ctx, "cat", "/root/synced"); err != nil || r.Stdout != "synced\n" {
		t.Errorf("after the power cut: %+v, %v", r, err)
	}
}
