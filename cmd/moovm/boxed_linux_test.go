package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/internal/ptytest"
	"github.com/moovm/moovm/internal/sandbox"
)

// inSandbox are the flags of a guest in a sandbox; the test is skipped where
// there is none.
func inSandbox(t *testing.T) []string {
	t.Helper()
	kernel, base, program := os.Getenv("MOOVM_KERNEL"), os.Getenv("MOOVM_BASE"), os.Getenv("MOOVM_BIN")
	if os.Getenv("MOOVM_QEMU") == "" || kernel == "" || base == "" || program == "" {
		t.Skip("boots guests in sandboxes: set MOOVM_QEMU=1, MOOVM_BIN to a static moovm, MOOVM_KERNEL and MOOVM_BASE (`make test-long` does)")
	}
	if _, err := exec.LookPath(sandbox.DefaultQEMU); err != nil {
		t.Skip(sandbox.ErrNoQEMU)
	}
	return []string{"--accel", "sandbox", "--kernel", kernel, "--base", base}
}

// The terminal of a machine in the sandbox. internal/e2e has the same tests for
// one that runs in the program itself.
func TestTerminalBoxed(t *testing.T) {
	m := ptytest.Moovm{Program: os.Getenv("MOOVM_BIN"), Dir: t.TempDir(), Flags: inSandbox(t)}
	t.Run("QuitAtOnce", m.QuitAtOnce)
	t.Run("InterruptKeyAtOnce", func(t *testing.T) { m.InterruptKeyAtOnce(t, 0) })
	t.Run("InterruptKeyInBoot", func(t *testing.T) { m.InterruptKeyAtOnce(t, 3*time.Second) })
	t.Run("Command", m.CommandTTY)
	t.Run("CommandQuit", m.CommandQuit)
	t.Run("Console", m.Console)
}

// Signals and --timeout while the sandbox boots, and while a guest boots in it.
func TestSignalsBoxed(t *testing.T) {
	flags := inSandbox(t)
	for _, c := range []struct {
		name    string
		args    []string
		after   time.Duration
		signals []syscall.Signal
		status  int
	}{
		{"SIGINT at 3 s", []string{"--", "sleep", "1000"}, 3 * time.Second, []syscall.Signal{syscall.SIGINT}, exitInterrupted},
		{"SIGTERM at once", []string{"--", "sleep", "1000"}, 300 * time.Millisecond, []syscall.Signal{syscall.SIGTERM}, exitInterrupted},
		{"SIGINT without a command", nil, 3 * time.Second, []syscall.Signal{syscall.SIGINT}, exitInterrupted},
		{"SIGTERM twice", nil, 8 * time.Second, []syscall.Signal{syscall.SIGTERM, syscall.SIGTERM}, exitInterrupted},
		{"timeout while the sandbox boots", []string{"--timeout", "2s", "--", "sleep", "1000"}, 0, nil, guest.StatusTimeout},
		{"timeout of the guest", []string{"--timeout", "15s", "--", "sleep", "1000"}, 0, nil, guest.StatusTimeout},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command(os.Getenv("MOOVM_BIN"), append(append([]string{"run"}, flags...), c.args...)...)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			hung := time.AfterFunc(2*time.Minute, func() { cmd.Process.Kill() })
			defer hung.Stop()
			time.Sleep(c.after)
			for _, s := range c.signals {
				if err := cmd.Process.Signal(s); err != nil {
					t.Error(err)
				}
				time.Sleep(300 * time.Millisecond) // two of a kind that nobody has taken are one
			}
			start := time.Now()
			err := cmd.Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != c.status {
				t.Errorf("%v, want status %d\n%s", err, c.status, stderr.String())
			}
			if c.status == guest.StatusTimeout && !strings.Contains(stderr.String(), "--timeout") {
				t.Errorf("said %q", stderr.String())
			}
			t.Logf("ended %v later", time.Since(start).Round(time.Millisecond))
		})
	}
}

// An emulator that hangs holds up neither --timeout nor an interrupt.
func TestHungBoxed(t *testing.T) {
	flags := inSandbox(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, sandbox.DefaultQEMU), []byte("#!/bin/sh\nexec sleep 1000\n"), 0o777); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args   []string
		signal bool
		status int
	}{
		"timeout":   {[]string{"--timeout", "1s", "--", "true"}, false, guest.StatusTimeout},
		"interrupt": {[]string{"--", "true"}, true, exitInterrupted},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(os.Getenv("MOOVM_BIN"), append(append([]string{"run"}, flags...), c.args...)...)
			cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			hung := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() }) // long before the sandbox's own limit
			defer hung.Stop()
			if c.signal {
				time.Sleep(time.Second)
				if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
					t.Error(err)
				}
			}
			err := cmd.Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != c.status {
				t.Errorf("%v, want status %d", err, c.status)
			}
		})
	}
}

// What a guest in the sandbox discards is a hole in the image on this machine,
// of a raw image and of an overlay, and nothing else in their folder is reached.
func TestTrimBoxed(t *testing.T) {
	flags := inSandbox(t)
	dir := t.TempDir()
	const size = 32 << 20
	raw, cow := filepath.Join(dir, "data.img"), filepath.Join(dir, "data.cow")
	if err := os.WriteFile(raw, bytes.Repeat([]byte("x"), size), 0o600); err != nil {
		t.Fatal(err)
	}
	boxedMoovm(t, dir, "create", "--size", "64M", cow)
	boxedMoovm(t, dir, append(append([]string{"run"}, flags...), "--disk", raw+",format=raw", "--disk", cow, "--", "sh", "-ec", `
		cmp -n 33554432 /dev/vdb /dev/zero && exit 9
		blkdiscard -o 1M -l 30M /dev/vdb
		yes | head -c 24M >/dev/vdc; sync
		blkdiscard -l 22M /dev/vdc
		blkdiscard -z -o 22M -l 1M /dev/vdc
		sync`)...)
	for _, path := range []string{raw, cow} {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Blocks*512 < 1<<20 || st.Blocks*512 > 8<<20 {
			t.Errorf("%s has %d KiB on the disk; 2 MiB are left in it (%v)", path, st.Blocks/2, err)
		}
	}
	got, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("x"), size)
	clear(want[1<<20 : 31<<20])
	if !bytes.Equal(got, want) {
		t.Error("the raw image has not what is left of it")
	}
	boxedMoovm(t, dir, "check", cow)
	flat := filepath.Join(dir, "flat.img")
	boxedMoovm(t, dir, "flatten", cow, flat)
	want = make([]byte, 64<<20)
	copy(want[23<<20:24<<20], bytes.Repeat([]byte("y\n"), 1<<19))
	if got, err := os.ReadFile(flat); err != nil || !bytes.Equal(got[22<<20:], want[22<<20:]) {
		t.Errorf("the overlay has not what was written to it (%v)", err)
	}
}

// fstrim of a file system whose blocks are nearly all in the base, or nowhere:
// it comes to its end, and the overlay holds no more than it did.
func TestFstrimBoxed(t *testing.T) {
	flags := inSandbox(t)
	base := flags[len(flags)-1]
	dir := t.TempDir()
	cow := filepath.Join(dir, "root.cow")
	boxedMoovm(t, dir, "create", "-b", base, cow)
	boxedMoovm(t, dir, append(append([]string{"run"}, flags[:len(flags)-2]...), "--disk", cow, "--backing-root", filepath.Dir(base), "--timeout", "3m", "--", "sh", "-ec", `
		yes | head -c 24M >/big; sync
		rm /big; sync
		fstrim -v / | grep -E '([2-9][0-9]{2}|[0-9.]+ G)' # hundreds of MiB`)...)
	var st unix.Stat_t
	if err := unix.Stat(cow, &st); err != nil || st.Blocks*512 > 16<<20 {
		t.Errorf("%s has %d KiB on the disk, of which 24 MiB were given back (%v)", cow, st.Blocks/2, err)
	}
	boxedMoovm(t, dir, "check", "--backing-root", filepath.Dir(base), cow)
}

// boxedMoovm runs the program to its good end.
func boxedMoovm(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command(os.Getenv("MOOVM_BIN"), args...)
	cmd.Dir = dir
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	hung := time.AfterFunc(4*time.Minute, func() { cmd.Process.Kill() })
	defer hung.Stop()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("moovm %q: %v\n%s", args, err, out.String())
	}
}
