package e2e

import (
	"errors"
	"maps"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What a normal Linux system has is there whatever the root file system is.
func TestHarnessSystem(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	for name, flags := range map[string][]string{
		"this machine": nil,
		"a disk":       {"--base", filepath.Join(dir, "base.img")},
		"nothing":      {"--root", "initramfs"},
	} {
		t.Run(name, func(t *testing.T) {
			r := mtest(t, flags, "-test.v", "-test.run=^TestGuestSystem$")
			r.wantStatus(t, 0)
			r.wantStdout(t, "--- PASS: TestGuestSystem/modules")
			if strings.Contains(r.stderr, "level=WARN") {
				t.Errorf("warnings: %v", r)
			}
		})
	}
}

// TestGuestSystem looks at the system from inside.
func TestGuestSystem(t *testing.T) {
	inGuest(t)
	t.Run("mounts", guestMounts)
	t.Run("cgroups", guestControllers)
	t.Run("loopback", guestLoopback)
	t.Run("names", guestNames)
	t.Run("limits", guestLimits)
	t.Run("clock", guestClock)
	t.Run("nodes", guestNodes)
	t.Run("modules", guestModules)
}

func guestMounts(t *testing.T) {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 2 {
			have[f[1]] = f[2]
		}
	}
	for at, want := range map[string]string{
		"/proc": "proc", "/sys": "sysfs", "/dev": "devtmpfs", "/run": "tmpfs", "/dev/pts": "devpts", "/dev/shm": "tmpfs",
		"/dev/mqueue": "mqueue", "/dev/hugepages": "hugetlbfs", "/sys/fs/cgroup": "cgroup2", "/sys/fs/bpf": "bpf",
		"/sys/kernel/security": "securityfs", "/sys/kernel/debug": "debugfs", "/sys/kernel/tracing": "tracefs",
		"/sys/kernel/config": "configfs",
	} {
		if have[at] != want {
			t.Errorf("%s is %q, want %s", at, have[at], want)
		}
	}
	for _, dir := range []string{"/tmp", "/dev/shm", "/run"} {
		if err := os.WriteFile(filepath.Join(dir, "moovm-test"), nil, 0o600); err != nil {
			t.Error(err)
		}
	}
}

func guestControllers(t *testing.T) {
	words := func(path string) []string {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		}
		return slices.Sorted(slices.Values(strings.Fields(string(b))))
	}
	group := filepath.Join("/sys/fs/cgroup", "moovm-test")
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(group)
	all, below := words("/sys/fs/cgroup/cgroup.controllers"), words(filepath.Join(group, "cgroup.controllers"))
	if !slices.Contains(all, "memory") || !slices.Contains(all, "pids") || !slices.Equal(all, below) {
		t.Errorf("a group has the controllers %q of %q", below, all)
	}
}

func guestLoopback(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Error(err)
			continue
		}
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Error(err)
		} else {
			c.Close()
		}
		l.Close()
	}
}

func guestNames(t *testing.T) {
	if a, err := net.LookupHost("localhost"); err != nil || !slices.Contains(a, "127.0.0.1") {
		t.Errorf("localhost is %q, %v", a, err)
	}
	if u, err := user.LookupId("0"); err != nil || u.Username != "root" {
		t.Errorf("user 0 is %+v, %v", u, err)
	}
	if name, err := os.Hostname(); err != nil || name == "" || name == "(none)" {
		t.Errorf("the machine's name is %q, %v", name, err)
	}
	b, err := os.ReadFile("/etc/machine-id")
	if err != nil || !regexp.MustCompile(`^[0-9a-f]{32}\n?$`).Match(b) {
		t.Errorf("machine-id %q, %v", b, err)
	}
}

func guestLimits(t *testing.T) {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil || r.Max != 512<<10 {
		t.Errorf("files: %+v, %v", r, err)
	}
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &r); err != nil || r.Cur < 8<<20 {
		t.Errorf("locked memory: %+v, %v", r, err)
	}
}

func guestClock(t *testing.T) {
	b, err := os.ReadFile("/sys/class/rtc/rtc0/since_epoch")
	if err != nil {
		t.Fatal(err)
	}
	s, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if off := time.Since(time.Unix(s, 0)).Abs(); err != nil || off > 24*time.Hour || time.Now().Year() < 2024 {
		t.Errorf("it is %v; the hardware's clock says %v, %v", time.Now(), time.Unix(s, 0), err)
	}
	if _, err := os.Stat("/dev/rtc"); err != nil {
		t.Error(err)
	}
}

// Opening a node loads its driver.
func guestNodes(t *testing.T) {
	for node, module := range map[string]string{"fuse": "fuse", "net/tun": "tun", "loop-control": "loop", "vhost-vsock": "vhost_vsock"} {
		f, err := os.OpenFile(filepath.Join("/dev", node), os.O_RDWR, 0)
		if err != nil {
			t.Error(err)
			continue
		}
		f.Close()
		if _, err := os.Stat("/sys/module/" + module); err != nil {
			t.Error(err)
		}
	}
}

// The kernel's modules are there, and it loads what is asked for.
func guestModules(t *testing.T) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	dir := "/lib/modules/" + unix.ByteSliceToString(u.Release[:])
	if _, err := os.Stat(filepath.Join(dir, "modules.dep")); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("modules can be written: %v", err)
	}
	known := func() map[string]bool {
		b, _ := os.ReadFile("/proc/filesystems")
		types := map[string]bool{}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			types[f[len(f)-1]] = true
		}
		return types
	}
	if known()["xfs"] {
		t.Error("xfs is there before it is wanted")
	}
	_ = unix.Mount("none", t.TempDir(), "xfs", 0, "") // there is nothing to mount
	if !known()["xfs"] {
		t.Errorf("mounting xfs did not load it; the kernel knows %q", slices.Sorted(maps.Keys(known())))
	}
	if s, err := unix.Socket(unix.AF_BLUETOOTH, unix.SOCK_RAW, 1); err == nil { // by an alias: net-pf-31
		unix.Close(s)
	} else {
		t.Errorf("a module by its alias: %v", err)
	}
	if err := unix.Mount("none", t.TempDir(), "nosuchfs", 0, ""); !errors.Is(err, unix.ENODEV) {
		t.Errorf("an unknown file system: %v", err)
	}
}
