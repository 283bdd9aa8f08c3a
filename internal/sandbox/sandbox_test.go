package sandbox

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/guest/guestinit"
	"github.com/moovm/moovm/initramfs"
	"github.com/moovm/moovm/internal/reexec"
)

// TestMain lets the test binary be the init of the emulated hosts it boots.
func TestMain(m *testing.M) {
	if guestinit.IsInit() {
		guestinit.Main()
	}
	reexec.Do(Server())
	goleak.VerifyTestMain(m)
}

func TestConfig(t *testing.T) {
	command := control.Command{Args: []string{"true"}}
	for want, c := range map[string]Config{
		"no command":           {},
		"at least 512M":        {Command: command, Memory: 64 << 20},
		"not an absolute path": {Command: command, Writable: []string{"rel"}},
		"no such file":         {Command: command, Writable: []string{"/nonexistent/folder"}},
		"nor a regular file":   {Command: command, Writable: []string{os.DevNull}},
		"qemu-system-x86":      {Command: command, QEMU: "/nonexistent/qemu"},
	} {
		if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one that says %q", err, want)
		}
	}
	if _, err := Run(t.Context(), Config{Command: command, QEMU: "/nonexistent/qemu"}); !errors.Is(err, ErrNoQEMU) {
		t.Errorf("%v is not ErrNoQEMU", err)
	}
}

func TestQEMUArgs(t *testing.T) {
	c := Config{Memory: 3 << 30, CPUs: 5, Writable: []string{"/a,b/", "/c"}}
	args := qemuArgs(&c)
	for _, want := range [][2]string{
		{"-m", "3072"}, {"-smp", "5"}, {"-cpu", processor},
		{"-fsdev", "local,id=host,path=/,security_model=none,multidevs=remap,readonly=on"},
		{"-fsdev", "local,id=rw0,path=/a,,b,security_model=none,multidevs=remap"},
		{"-device", "virtio-9p-pci,fsdev=rw1,mount_tag=rw1"},
	} {
		found := false
		for i := range len(args) - 1 {
			found = found || args[i] == want[0] && args[i+1] == want[1]
		}
		if !found {
			t.Errorf("no %s %s in %q", want[0], want[1], args)
		}
	}
	conf := initConfig(&c)
	targets := []string{}
	for _, m := range conf.Mounts {
		targets = append(targets, m.Target)
	}
	if !slices.Equal(targets, c.Writable) {
		t.Errorf("mounted at %q", targets)
	}
}

// A writable file is passed as a file, and its folder is not.
func TestWritableFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	c := Config{Memory: 3 << 30, Writable: []string{file, "/c"}}
	args := strings.Join(qemuArgs(&c), " ")
	for what, want := range map[string]bool{
		"vhost-user-fs-pci,chardev=files,tag=files":          true,
		"memory-backend-memfd,id=memory,size=3072M,share=on": true,
		"local,id=rw0,path=/c,":                              true,
		"id=rw1":                                             false,
		"path=" + filepath.Dir(file):                         false,
	} {
		if strings.Contains(args, what) != want {
			t.Errorf("%q in %q: want %v", what, args, want)
		}
	}
	want := []control.Mount{
		{Source: "rw0", Target: "/c", Type: "9p", Options: mountOptions},
		{Source: "files", Target: "/run/moovm-files", Type: "virtiofs"},
		{Source: "/run/moovm-files/0", Target: file, Options: "bind"},
	}
	if got := initConfig(&c).Mounts; !slices.Equal(got, want) {
		t.Errorf("mounts %+v, want %+v", got, want)
	}
	s, err := serveFiles(&c)
	if err != nil {
		t.Fatal(err)
	}
	s.Close() // QEMU was not started; goleak sees what stays
}

// needEmulation skips a test where the emulated host cannot boot.
func needEmulation(t *testing.T) Config {
	t.Helper()
	if os.Getenv("MOOVM_QEMU") == "" || os.Getenv("MOOVM_KERNEL") == "" {
		t.Skip("boots an emulated host: set MOOVM_QEMU=1 and MOOVM_KERNEL to a vmlinuz with its modules beside it (`make test` does)")
	}
	if _, err := exec.LookPath(DefaultQEMU); err != nil {
		t.Skip(ErrNoQEMU)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Config{Kernel: os.Getenv("MOOVM_KERNEL"), Init: self}
}

// run runs a shell script in a sandbox.
func (c Config) run(t *testing.T, ctx context.Context, script string) (stdout, stderr string, status int) {
	t.Helper()
	var out, errs, console bytes.Buffer
	c.Command = control.Command{Args: []string{"/bin/sh", "-c", script}, Dir: "/"}
	c.Stderr, c.Console = &errs, &console
	if c.Stdout == nil {
		c.Stdout = &out
	}
	status, err := Run(ctx, c)
	if errors.Is(err, initramfs.ErrNotStatic) {
		t.Skip("the test binary is the init and must be static: build it with CGO_ENABLED=0")
	}
	if err != nil {
		t.Fatalf("%v\nstderr %s\nconsole %s", err, errs.String(), console.String())
	}
	return out.String(), errs.String(), status
}

func TestSandbox(t *testing.T) {
	c := needEmulation(t)
	rw := t.TempDir()
	ro := t.TempDir()
	if err := os.WriteFile(filepath.Join(ro, "file"), []byte("host\n"), 0o666); err != nil {
		t.Fatal(err)
	}
	c.Writable = []string{rw}
	c.Stdin = strings.NewReader("typed\n")
	stdout, stderr, status := c.run(t, t.Context(), `
		test -c /dev/kvm && echo kvm
		grep -o '\[advise\]' /sys/kernel/mm/transparent_hugepage/shmem_enabled
		cat
		cat `+ro+`/file; echo guest > `+ro+`/file; cat `+ro+`/file
		echo kept > `+rw+`/file
		echo oops >&2
		exit 42`)
	if want := "kvm\n[advise]\ntyped\nhost\nguest\n"; stdout != want {
		t.Errorf("stdout %q, want %q", stdout, want)
	}
	if stderr != "oops\n" || status != 42 {
		t.Errorf("stderr %q, status %d", stderr, status)
	}
	for path, want := range map[string]string{filepath.Join(ro, "file"): "host\n", filepath.Join(rw, "file"): "kept\n"} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", path, got, err, want)
		}
	}
}

// The end of the context reaches the command as SIGINT.
func TestSandboxInterrupted(t *testing.T) {
	c := needEmulation(t)
	ctx, cancel := context.WithCancel(t.Context())
	var stdout bytes.Buffer
	c.Stdout = writerFunc(func(p []byte) (int, error) {
		if bytes.Contains(p, []byte("ready")) {
			cancel()
		}
		return stdout.Write(p)
	})
	_, _, status := c.run(t, ctx, `trap 'echo interrupted; exit 9' INT; echo ready; sleep 60 & wait`)
	if stdout.String() != "ready\ninterrupted\n" || status != 9 {
		t.Errorf("stdout %q, status %d", stdout.String(), status)
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A broken emulator is one error with what it said.
func TestSandboxBroken(t *testing.T) {
	c := needEmulation(t)
	c.QEMU = filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(c.QEMU, []byte("#!/bin/sh\necho no such machine >&2\nexit 3\n"), 0o777); err != nil {
		t.Fatal(err)
	}
	c.Command = control.Command{Args: []string{"true"}}
	_, err := Run(t.Context(), c)
	if err == nil || !strings.Contains(err.Error(), "no such machine") {
		t.Errorf("error %v", err)
	}
}

// What the command does to a writable file is done to it, holes included, and
// to nothing else in its folder.
func TestSandboxFile(t *testing.T) {
	c := needEmulation(t)
	dir := t.TempDir()
	file, other := filepath.Join(dir, "file"), filepath.Join(dir, "other")
	const size = 8 << 20
	for _, path := range []string{file, other} {
		if err := os.WriteFile(path, bytes.Repeat([]byte("x"), size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c.Writable = []string{file}
	stdout, stderr, status := c.run(t, t.Context(), `
		set -e
		cd `+dir+`
		dd if=file bs=1M status=none | tr -d x | wc -c
		printf begin | dd of=file conv=notrunc status=none
		fallocate -p -o 1M -l 6M file
		dd if=file bs=1M skip=1 count=6 status=none | tr -d '\0' | wc -c
		printf more >>file
		fallocate -z -o 7M -l 64K file
		stat -c %s file
		sync file
		chmod 644 file 2>/dev/null || echo no chmod
		echo gone >other; ls`)
	if want := "0\n0\n8388612\nno chmod\nfile\nother\n"; stdout != want || status != 0 {
		t.Errorf("stdout %q, want %q; status %d, stderr %q", stdout, want, status, stderr)
	}
	want := bytes.Repeat([]byte("x"), size)
	if got, err := os.ReadFile(other); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the other file was changed too (%v)", err)
	}
	copy(want, "begin")
	clear(want[1<<20 : 7<<20+64<<10])
	want = append(want, "more"...)
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the file has not what was written (%v)", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil || st.Blocks*512 > 3<<20 {
		t.Errorf("%d KiB on the disk, with a hole of 6 MiB in 8 MiB (%v)", st.Blocks/2, err)
	}
}
