package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/guest/guesttest"
)

// The tests of this file run in guests that the harness tests boot with this
// same test binary: `moovm test e2e.test -test.run '^TestGuest…$'`. On the
// host they are skipped.

func inGuest(t testing.TB) {
	t.Helper()
	if !guesttest.InGuest() {
		t.Skip("runs in the guests of the harness tests; see harness_test.go")
	}
}

// What a test finds: a kernel of its own, root, its folder, its files.
func TestGuestPass(t *testing.T) {
	inGuest(t)
	if os.Getuid() != 0 {
		t.Errorf("user %d", os.Getuid())
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	fmt.Println("kernel", unix.ByteSliceToString(u.Release[:]))
	dir, _ := os.Getwd()
	self, _ := os.Executable()
	fmt.Println("dir", dir, "self", self, "args0", os.Args[0], "env", os.Getenv("HARNESS_TEXT"))
	if st, err := os.Stat("/proc/self/exe"); err != nil || st.Size() == 0 {
		t.Errorf("/proc: %v", err)
	}
	b, err := os.ReadFile("doc.go")
	fmt.Println("doc.go", len(b), err)
	if err := os.WriteFile(filepath.Join(t.TempDir(), "x"), []byte("x"), 0o666); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile("scratch-in-package", []byte("x"), 0o666); err != nil {
		t.Errorf("the package's folder cannot be written: %v", err)
	}
	t.Run("sub", func(t *testing.T) { t.Log("a subtest") })
	t.Run("skipped", func(t *testing.T) { t.Skip("a skip") })
}

func TestGuestFail(t *testing.T)  { inGuest(t); t.Error("this test fails") }
func TestGuestPanic(t *testing.T) { inGuest(t); panic("this test panics") }
func TestGuestExit3(t *testing.T) { inGuest(t); os.Exit(3) }
func TestGuestHang(t *testing.T)  { inGuest(t); select {} }

func TestGuestStuckProcess(t *testing.T) {
	inGuest(t)
	// Not even the runtime's timeout ends it.
	unix.Kill(os.Getpid(), unix.SIGSTOP)
	time.Sleep(time.Hour)
}

func harnessSysrq(t *testing.T, key string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/kernel/sysrq", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/proc/sysrq-trigger", []byte(key), 0); err != nil {
		t.Fatal(err)
	}
}

func TestGuestKernelPanic(t *testing.T) {
	inGuest(t)
	t.Run("inner", func(t *testing.T) {
		fmt.Println("about to panic")
		time.Sleep(time.Second)
		harnessSysrq(t, "c")
		time.Sleep(time.Hour)
	})
}

// With panic_on_oops off, sysrq c is an oops that kills only who asked.
func TestGuestOops(t *testing.T) {
	inGuest(t)
	if pid, _, _ := syscall.RawSyscall(syscall.SYS_GETPID, 0, 0, 0); pid == 0 {
		t.Fatal("no pid")
	}
	harnessOops(t)
	time.Sleep(500 * time.Millisecond)
}

// harnessOops makes the kernel stumble over a console message that says so.
func harnessOops(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fmt.Fprintf(f, "<0>BUG: kernel NULL pointer dereference, address: 0000000000000010\n")
	fmt.Fprintf(f, "<0>RIP: 0010:harness_test+0x0/0x1\n")
}

// OOM killer: a child that takes all memory.
func TestGuestOOM(t *testing.T) {
	inGuest(t)
	if os.Getenv("HARNESS_EAT") != "" {
		harnessEat()
	}
	p, err := os.StartProcess("/proc/self/exe", []string{"eater", "-test.run", "^TestGuestOOM$"},
		&os.ProcAttr{Env: append(os.Environ(), "HARNESS_EAT=1"), Files: []*os.File{nil, os.Stdout, os.Stderr}})
	if err != nil {
		t.Fatal(err)
	}
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", p.Pid), []byte("1000"), 0)
	st, err := p.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if ws := st.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != syscall.SIGKILL {
		t.Fatalf("the eater: %v", st)
	}
	t.Fatal("the eater was killed")
}

func harnessEat() {
	var keep [][]byte
	for {
		b := make([]byte, 16<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		keep = append(keep, b)
		runtime.KeepAlive(keep)
	}
}

// The extra disks: sizes, read-only, faults, a full one.
func TestGuestDisks(t *testing.T) {
	inGuest(t)
	disks := guesttest.ExtraDisks()
	if len(disks) != 3 {
		t.Fatalf("disks %q", disks)
	}
	f, err := os.OpenFile(disks[0], os.O_RDWR|unix.O_DIRECT|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(buf, 0); err != nil {
		t.Errorf("a good sector: %v", err)
	}
	if _, err := f.WriteAt(buf, 1<<20); !errors.Is(err, unix.EIO) {
		t.Errorf("write of a bad sector: %v, want EIO", err)
	}
	if _, err := f.ReadAt(buf, 1<<20); !errors.Is(err, unix.EIO) {
		t.Errorf("read of a bad sector: %v, want EIO", err)
	}
	if _, err := f.WriteAt(buf, 1<<20+4096); err != nil {
		t.Errorf("beyond the bad sectors: %v", err)
	}
	if n, err := f.Seek(0, 2); err != nil || n != 8<<20 {
		t.Errorf("size %d, %v", n, err)
	}
	ro, err := os.OpenFile(disks[1], os.O_RDWR, 0)
	if err == nil {
		if _, err = ro.Write(buf); err == nil {
			err = ro.Sync()
		}
		ro.Close()
	}
	if err == nil {
		t.Error("the read-only disk took a write")
	}
	slow, err := os.OpenFile(disks[2], os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	start := time.Now()
	if _, err := slow.ReadAt(buf, 0); err != nil || time.Since(start) < 300*time.Millisecond {
		t.Errorf("the slow disk: %v after %v", err, time.Since(start))
	}
}

// A disk that is full is an error of the test, as on any machine.
func TestGuestFullDisk(t *testing.T) {
	inGuest(t)
	disk, dir := guesttest.ExtraDisks()[0], t.TempDir()
	if out, err := execOutput("mke2fs", "-q", "-t", "ext4", disk); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := unix.Mount(disk, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	f, err := os.Create(filepath.Join(dir, "big"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1<<20)
	for i := 0; err == nil && i < 64; i++ {
		_, err = f.Write(b)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("got %v, want ENOSPC", err)
	}
	t.Fatalf("the disk is full: %v", err)
}

func TestGuestCrash(t *testing.T) {
	inGuest(t)
	out, err := execOutput("sh", "-c", "kill -SEGV $$")
	t.Fatalf("a child crashed: %v %s", err, out)
}

// A module that is loaded because somebody mounts its file system.
func TestGuestModule(t *testing.T) {
	inGuest(t)
	out, err := execOutput("modprobe", "loop")
	if err != nil {
		t.Fatalf("modprobe: %v %s", err, out)
	}
	b, err := os.ReadFile("/proc/modules")
	if err != nil || !strings.Contains(string(b), "loop ") {
		t.Errorf("loop is not loaded: %v", err)
	}
}

func BenchmarkGuest(b *testing.B) {
	inGuest(b)
	for b.Loop() {
		unix.Getppid()
	}
}

func FuzzGuest(f *testing.F) {
	f.Add("seed")
	f.Fuzz(func(t *testing.T, s string) { inGuest(t); t.Log("fuzz", s) })
}

// TestGuestStdin reads what the host was given.
func TestGuestStdin(t *testing.T) {
	inGuest(t)
	b, err := io.ReadAll(os.Stdin)
	fmt.Printf("stdin %q %v\n", b, err)
}
