package vmm

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtiorng"
)

// Tests with a stock kernel. The test binary is the guest's init as well:
// TestMain recognises process 1.

func TestMain(m *testing.M) {
	if os.Getpid() == 1 {
		guestInit()
	}
	if dir := os.Getenv(evilEnv); dir != "" {
		evilMachine(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

// guestInit is what runs in the guest; it does not return. What to do is the
// last word of the kernel command line.
func guestInit() {
	fail := func(err error) {
		if err != nil {
			fmt.Println("init:", err)
		}
	}
	for _, dir := range []string{"/proc", "/dev"} {
		os.MkdirAll(dir, 0o755)
	}
	fail(unix.Mount("proc", "/proc", "proc", 0, ""))
	fail(unix.Mount("dev", "/dev", "devtmpfs", 0, ""))
	cmdline, _ := os.ReadFile("/proc/cmdline")
	words := strings.Fields(string(cmdline))
	var info unix.Sysinfo_t
	fail(unix.Sysinfo(&info))
	fmt.Printf("guest: %d CPUs, %d MiB\n", runtime.NumCPU(), info.Totalram*uint64(info.Unit)>>20)
	switch words[len(words)-1] {
	case "reboot":
		unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "panic":
		os.Exit(3) // the end of init is a panic
	case "ticks":
		for i := 0; ; i++ {
			fmt.Println("tick", i)
			time.Sleep(20 * time.Millisecond)
		}
	case "sum":
		// Counts what arrives on the second serial port, with hardware flow
		// control.
		f, err := os.OpenFile("/dev/ttyS1", os.O_RDWR, 0)
		fail(err)
		t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
		fail(err)
		t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
		t.Cflag |= unix.CRTSCTS | unix.CS8 | unix.CLOCAL | unix.CREAD
		fail(unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t))
		fmt.Println("ready") // before, the line was cooked
		n, sum := 0, byte(0)
		r := bufio.NewReader(f)
		for {
			b, err := r.ReadByte()
			fail(err)
			if err != nil || b == 0 {
				break
			}
			n, sum = n+1, sum*31+b
		}
		fmt.Println("received", n, sum)
	}
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// kernelMachine boots the stock kernel with this test binary as its init, or
// skips.
func kernelMachine(t *testing.T, do string, change ...func(*Config)) (*Machine, *syncBuffer) {
	t.Helper()
	path := os.Getenv("MOOVM_KERNEL_ELF")
	if path == "" {
		t.Skip("needs a kernel: set MOOVM_KERNEL_ELF to an uncompressed vmlinux, on a machine whose KVM really works")
	}
	if r, err := Probe(t.Context(), ""); err != nil || !r.Usable {
		t.Skipf("needs a KVM that runs kernels: %s", r.Reason)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	out := new(syncBuffer)
	cfg := Config{
		Kernel:  Kernel{Name: path, Image: f, Size: st.Size()},
		Initrd:  selfInitrd(t),
		Cmdline: "console=ttyS0 quiet panic=-1 pci=noearly " + do,
		Console: Serial{Out: out},
	}
	for _, f := range change {
		f(&cfg)
	}
	return newClosed(t, cfg), out
}

// selfInitrd is an initramfs with this program as /init.
func selfInitrd(t *testing.T) []byte {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(self[:4096], []byte("/ld-linux")) {
		t.Skip("needs a static test binary: build it with CGO_ENABLED=0")
	}
	var b bytes.Buffer
	w := cpio.NewWriter(&b)
	if err := w.WriteHeader(&cpio.Header{Name: "init", Mode: cpio.TypeReg | 0o755, Size: int64(len(self))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(self); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func runKernel(t *testing.T, m *Machine) (ExitReason, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	return m.Run(ctx)
}

func TestKernelBoots(t *testing.T) {
	for _, test := range []struct {
		cpus   int
		memory int64
	}{{1, 128 << 20}, {2, 512 << 20}, {8, 6 << 30}} {
		t.Run(fmt.Sprintf("%d CPUs %d MiB", test.cpus, test.memory>>20), func(t *testing.T) {
			m, out := kernelMachine(t, "poweroff", func(c *Config) { c.CPUs, c.Memory = test.cpus, test.memory })
			if r, err := runKernel(t, m); r != PowerOff || err != nil {
				t.Errorf("%v, %v; want %v\n%s", r, err, PowerOff, out)
			}
			var cpus, mib int
			i := strings.Index(out.String(), "guest: ")
			if i < 0 {
				t.Fatalf("no word from init:\n%s", out)
			}
			fmt.Sscanf(out.String()[i:], "guest: %d CPUs, %d MiB", &cpus, &mib)
			if cpus != test.cpus || mib < int(test.memory>>20)*3/4-40 || mib > int(test.memory>>20) {
				t.Errorf("the guest sees %d CPUs and %d MiB", cpus, mib)
			}
		})
	}
}

func TestKernelByPVH(t *testing.T) {
	m, out := kernelMachine(t, "poweroff", func(c *Config) { c.Kernel.Protocol, c.Devices = ProtocolPVH, []virtio.Device{virtiorng.Device{}} })
	if r, err := runKernel(t, m); r != PowerOff || err != nil || !strings.Contains(out.String(), "guest: 1 CPUs") {
		t.Errorf("%v, %v; want %v\n%s", r, err, PowerOff, out)
	}
}

func TestKernelReboots(t *testing.T) {
	m, out := kernelMachine(t, "reboot")
	if r, err := runKernel(t, m); r != Reset || err != nil {
		t.Errorf("%v, %v; want %v\n%s", r, err, Reset, out)
	}
}

func TestKernelPanics(t *testing.T) {
	m, out := kernelMachine(t, "panic")
	if r, err := runKernel(t, m); r != Reset || err != nil {
		t.Errorf("%v, %v; want %v (panic=-1)", r, err, Reset)
	}
	if !strings.Contains(out.String(), "Kernel panic - not syncing: Attempted to kill init") {
		t.Errorf("the console lacks the panic:\n%s", out)
	}
}

func TestKernelPauses(t *testing.T) {
	m, out := kernelMachine(t, "ticks", func(c *Config) { c.CPUs = 2 })
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	eventuallyLong(t, func() bool { return strings.Contains(out.String(), "tick 3") })
	for range 5 {
		if err := m.Pause(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond) // the writer finishes
		n := len(out.String())
		time.Sleep(100 * time.Millisecond)
		if len(out.String()) != n {
			t.Error("a paused guest writes")
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
		eventuallyLong(t, func() bool { return len(out.String()) > n })
	}
	m.Stop()
	if r, err := m.Wait(); r != Stopped || err != nil {
		t.Errorf("%v, %v", r, err)
	}
	if strings.Contains(out.String(), "rcu") || strings.Contains(out.String(), "stall") {
		t.Errorf("the guest complains:\n%s", out)
	}
}

// TestKernelInput pastes more than any buffer holds into a serial port.
func TestKernelInput(t *testing.T) {
	in, feed := io.Pipe()
	m, out := kernelMachine(t, "sum", func(c *Config) { c.Control.In = in })
	n, sum := 20_000, byte(0)
	data := make([]byte, n, n+1)
	for i := range data {
		data[i] = byte(i%250 + 1)
		sum = sum*31 + data[i]
	}
	go func() {
		for !strings.Contains(out.String(), "ready") && t.Context().Err() == nil {
			time.Sleep(10 * time.Millisecond)
		}
		feed.Write(append(data, 0))
		feed.Close()
	}()
	if r, err := runKernel(t, m); r != PowerOff || err != nil {
		t.Errorf("%v, %v\n%s", r, err, out)
	}
	feed.CloseWithError(errors.New("test ends"))
	if want := fmt.Sprintln("received", n, sum); !strings.Contains(strings.ReplaceAll(out.String(), "\r", ""), want) {
		t.Errorf("want %q in:\n%s", want, out)
	}
}

func eventuallyLong(t *testing.T, ok func() bool) {
	t.Helper()
	for range 60_000 {
		if ok() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("it did not come")
}
