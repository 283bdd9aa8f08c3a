package kerneltest

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/guest/guesttest"
)

// TestMain runs the tests in a guest with an empty disk of 256 MiB.
func TestMain(m *testing.M) {
	guesttest.Hook() // before anything else: this binary is also the guests' init
	if os.Getenv("MOOVM_KERNEL") == "" && !guesttest.InGuest() {
		fmt.Println("kerneltest: skipped: set MOOVM_KERNEL to a vmlinuz with its modules beside it")
		os.Exit(0)
	}
	guesttest.Main(m, func(c *guesttest.Config) {
		c.Disks = []guesttest.Disk{{Size: 256 << 20}}
	})
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// mountExt4 makes a file system on the extra disk and mounts it.
func mountExt4(t *testing.T) string {
	t.Helper()
	disk, dir := guesttest.ExtraDisks()[0], t.TempDir()
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", disk)
	if err := unix.Mount(disk, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

func TestRemount(t *testing.T) {
	dir := mountExt4(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("one"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("two"), 0o666); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to a read-only file system: %v, want EROFS", err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("three"), 0o666); err != nil {
		t.Error(err)
	}
	// Unmounted and mounted again it is still there.
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(guesttest.ExtraDisks()[0], dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "three" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestPunchHole(t *testing.T) {
	f, err := os.Create(filepath.Join(mountExt4(t), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 1 << 20
	if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(bytes.Repeat([]byte{'x'}, size), 0); err != nil {
		t.Fatal(err)
	}
	blocks := func() int64 {
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		st, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		return st.Sys().(*syscall.Stat_t).Blocks
	}
	before := blocks()
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4096, size/2); err != nil {
		t.Fatal(err)
	}
	if after := blocks(); after != before-size/2/512 {
		t.Errorf("%d sectors before, %d after the hole of %d", before, after, size/2/512)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b[4096:4096+size/2], make([]byte, size/2)) || b[0] != 'x' || b[4096+size/2] != 'x' {
		t.Error("the hole does not read as zeros, or more than it does")
	}
	if hole, err := f.Seek(0, unix.SEEK_HOLE); err != nil || hole != 4096 {
		t.Errorf("the first hole is at %d, %v", hole, err)
	}
}

func TestLoopDevice(t *testing.T) {
	file, err := os.Create(filepath.Join(mountExt4(t), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	run(t, "modprobe", "loop")
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		t.Fatal(err)
	}
	loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	if err := unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_SET_FD, int(file.Fd())); err != nil {
		t.Fatal(err)
	}
	defer unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_CLR_FD, 0)
	want := bytes.Repeat([]byte("loop"), 1024)
	if _, err := loop.WriteAt(want, 8192); err != nil {
		t.Fatal(err)
	}
	if err := loop.Sync(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := file.ReadAt(got, 8192); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the file behind the loop device does not have what was written (%v)", err)
	}
}

func TestNamespaces(t *testing.T) {
	before, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.Command("sh", "-ec", `hostname inside; hostname; echo $$; mount -t tmpfs tmpfs "$1"; touch "$1/file"; ls "$1"; ls /sys/class/net | wc -l`, "sh", dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUTS | unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC}
	out, err := cmd.CombinedOutput()
	if lines := strings.Fields(string(out)); err != nil || len(lines) < 3 || lines[0] != "inside" || lines[1] != "1" || lines[2] != "file" {
		t.Errorf("in new namespaces: %v\n%s", err, out)
	}
	if after, _ := os.Hostname(); after != before {
		t.Errorf("the host's name became %q", after)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("the mount is visible outside: %v", left)
	}
}

func TestSysctl(t *testing.T) {
	const name = "/proc/sys/kernel/pid_max"
	if err := os.WriteFile(name, []byte("4000"), 0); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(name); err != nil || string(b) != "4000\n" {
		t.Fatalf("%q, %v", b, err)
	}
	// Process numbers start again below the limit.
	for range 3 {
		cmd := exec.Command("true")
		if err := cmd.Run(); err != nil || cmd.Process.Pid >= 4000 {
			t.Errorf("process %d, %v", cmd.Process.Pid, err)
		}
	}
}

func TestModule(t *testing.T) {
	run(t, "modprobe", "dummy", "numdummies=2")
	for _, name := range []string{"dummy0", "dummy1"} {
		if _, err := net.InterfaceByName(name); err != nil {
			t.Error(err)
		}
	}
	if err := unix.DeleteModule("dummy", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := net.InterfaceByName("dummy0"); err == nil {
		t.Error("the interface outlived its module")
	}
}
