package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/initramfs"
	guestkernel "github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/vmm"
)

// Tests of the machine by itself: a stock kernel, and a busybox that runs a
// script as process 1.

const busybox = "/bin/busybox"

// scriptInitrd is an initramfs whose init is the script. Further files are
// from this machine, by their name in the archive.
func scriptInitrd(t *testing.T, script string, files map[string]string) []byte {
	t.Helper()
	if _, err := os.Stat(busybox); err != nil {
		t.Skip("needs a static busybox (apt-get install busybox-static)")
	}
	var out bytes.Buffer
	w := cpio.NewWriter(&out)
	add := func(name string, mode cpio.FileMode, data []byte) {
		t.Helper()
		if err := w.WriteHeader(&cpio.Header{Name: name, Mode: mode, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"bin", "dev", "proc", "sys", "tmp"} {
		add(dir, cpio.TypeDir|0o755, nil)
	}
	all := map[string]string{"bin/busybox": busybox}
	for name, path := range files {
		all[name] = path
	}
	for name, path := range all {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		add(name, cpio.TypeReg|0o755, data)
	}
	add("init", cpio.TypeReg|0o755, []byte(`#!/bin/busybox sh
echo "user space" > /dev/console
/bin/busybox --install /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
`+script+"\npoweroff -f\n"))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// testMachine is a machine with its console on pipes.
type testMachine struct {
	*vmm.Machine
	t    *testing.T
	out  *console // only its text
	in   io.WriteCloser
	done chan struct{}
}

// elfKernel is a kernel file as an ELF image.
func elfKernel(t *testing.T, path string) vmm.Kernel {
	t.Helper()
	k, err := guestkernel.LoadKernel(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return vmm.Kernel{Name: path, Image: k, Size: k.Size()}
}

// kernelWithModules is the kernel and what there is for it to load.
func kernelWithModules(t *testing.T) (*guestkernel.Kernel, *kmod.Modules) {
	t.Helper()
	k, err := guestkernel.LoadKernel(kernel)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	modules, err := kmod.FindModules(k)
	if err != nil {
		t.Fatal(err)
	}
	return k, modules
}

// fileKernel is a kernel file as it is: a bzImage.
func fileKernel(t *testing.T, path string) vmm.Kernel {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return vmm.Kernel{Name: path, Image: f, Size: st.Size()}
}

// bootScript starts a machine whose process 1 is the script.
func bootScript(t *testing.T, k vmm.Kernel, script string, change ...func(*vmm.Config)) *testMachine {
	t.Helper()
	needKVM(t)
	r, w := io.Pipe()
	m := &testMachine{t: t, out: &console{t: t, more: make(chan struct{}, 1)}, in: w, done: make(chan struct{})}
	c := vmm.Config{
		Memory: 256 << 20, Kernel: k, Initrd: scriptInitrd(t, script, nil),
		Cmdline: "console=ttyS0 quiet panic=-1 pci=noearly mitigations=off",
		Console: vmm.Serial{In: r, Out: m.out},
	}
	for _, f := range change {
		f(&c)
	}
	var err error
	if m.Machine, err = vmm.New(c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Close()
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("console:\n%s", m.out.output())
		}
	})
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	return m
}

// end waits for the machine's end and returns what the console said.
func (m *testMachine) end(want vmm.ExitReason) string {
	m.t.Helper()
	defer context.AfterFunc(timeoutContext(m.t), m.Stop)()
	if r, err := m.Wait(); r != want || err != nil {
		m.t.Fatalf("the machine ended by %v, %v; want %v", r, err, want)
	}
	return strings.ReplaceAll(m.out.output(), "\r", "")
}

func timeoutContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// expect waits for text on the console.
func (m *testMachine) expect(text string) {
	m.t.Helper()
	for ctx := timeoutContext(m.t); !strings.Contains(m.out.output(), text); {
		select {
		case <-m.out.more:
		case <-ctx.Done():
			m.t.Fatalf("no %q on the console", text)
		}
	}
}

// field is the value after NAME= on a line of text.
func field(t *testing.T, text, name string) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + name + `=(.*)$`).FindStringSubmatch(text)
	if m == nil {
		t.Fatalf("no %s= in:\n%s", name, text)
	}
	return m[1]
}

func number(t *testing.T, text, name string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(field(t, text, name), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// facts is a script that says what the kernel found.
const facts = `
echo "release=$(uname -r)"
echo "cpus=$(nproc)"
echo "kib=$(sed -n 's/MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo)"
echo "text=$(sed -n 's/^\([0-9a-f]*\) T _text$/\1/p' /proc/kallsyms)"
echo "clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"`

// All usual ways to end: a power-off, and a reset by the ACPI register, the
// keyboard controller, port 0xcf9 and a triple fault.
func TestMachineEnds(t *testing.T) {
	needKVM(t)
	k := elfKernel(t, kernel)
	for _, c := range []struct {
		name, script, cmdline string
		want                  vmm.ExitReason
	}{
		{"power-off", "poweroff -f", "", vmm.PowerOff},
		{"reset by ACPI", "reboot -f", "reboot=acpi", vmm.Reset},
		{"reset by keyboard controller", "reboot -f", "reboot=kbd", vmm.Reset},
		{"reset by port 0xcf9", "reboot -f", "reboot=pci", vmm.Reset},
		{"reset by triple fault", "reboot -f", "reboot=triple", vmm.Reset},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := bootScript(t, k, "echo up; "+c.script, func(v *vmm.Config) { v.Cmdline += " " + c.cmdline })
			if out := m.end(c.want); !strings.Contains(out, "up\n") {
				t.Errorf("console:\n%s", out)
			}
		})
	}
}

// A panic reaches the host by the pvpanic device, before any reset.
func TestMachinePanicNotice(t *testing.T) {
	needKVM(t)
	k, modules := kernelWithModules(t)
	name := "pvpanic-mmio"
	if strings.HasPrefix(k.Release, "5.") {
		name = "pvpanic"
	}
	r, err := guest.Boot(t.Context(), guest.Config{
		Kernel: k, Modules: modules, LoadModules: []string{name}, Init: moovmBin,
		Files:   []initramfs.File{{Name: "bin/busybox", Mode: 0o755, HostPath: busybox}},
		Command: &control.Command{Args: []string{"/bin/busybox", "sh", "-c", "echo c > /proc/sysrq-trigger"}},
	})
	if r.Reason != vmm.Panic {
		t.Errorf("ended by %v, %v; want %v", r.Reason, err, vmm.Panic)
	}
}

// A hundred kilobytes pasted into a cooked terminal arrive as they are.
func TestLongMachinePaste(t *testing.T) {
	long(t)
	needKVM(t)
	var paste bytes.Buffer
	for i := 0; paste.Len() < 100_000; i++ {
		fmt.Fprintf(&paste, "line %d: the quick brown fox jumps over the lazy dog\n", i)
	}
	sum := sha256.Sum256(paste.Bytes())
	m := bootScript(t, elfKernel(t, kernel), `
echo ready
cat > /tmp/pasted
echo "size=$(wc -c < /tmp/pasted)"
echo "sum=$(sha256sum < /tmp/pasted | cut -d ' ' -f 1)"`)
	m.expect("ready")
	go m.in.Write(append(paste.Bytes(), 4)) // Ctrl-D
	out := m.end(vmm.PowerOff)
	if n := number(t, out, "size"); n != int64(paste.Len()) {
		t.Errorf("%d bytes of %d arrived", n, paste.Len())
	}
	if got := field(t, out, "sum"); got != hex.EncodeToString(sum[:]) {
		t.Errorf("sha256 %s", got)
	}
}

// A guest of 4 GiB costs what it uses.
func TestLongMachineLazyMemory(t *testing.T) {
	long(t)
	needKVM(t)
	m := bootScript(t, elfKernel(t, kernel), `
mount -t tmpfs -o size=1G tmp /tmp
dd if=/dev/urandom of=/tmp/used bs=1M count=100 2>/dev/null
echo "free=$(sed -n 's/MemFree: *\([0-9]*\) kB/\1/p' /proc/meminfo)"
echo wrote
read line`, func(c *vmm.Config) { c.Memory = 4 << 30 })
	m.expect("wrote")
	used := m.Stats().RAMUsed
	guest := 4<<30 - number(t, strings.ReplaceAll(m.out.output(), "\r", ""), "free")<<10
	t.Logf("the guest uses %d MiB, of which 100 MiB are a file; the host gives %d MiB", guest>>20, used>>20)
	if used < 100<<20 || used > guest+32<<20 {
		t.Errorf("%d MiB of memory exist for a guest that uses %d MiB", used>>20, guest>>20)
	}
	io.WriteString(m.in, "\n")
	m.end(vmm.PowerOff)
}

// series are the kernels that must boot; scripts/fetch-kernel.sh gets them.
var series = []string{"5.10", "5.10-cloud", "6.1", "6.1-cloud", "6.12", "6.12-cloud"}

func seriesKernel(t *testing.T, name string) string {
	t.Helper()
	cache := os.Getenv("MOOVM_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			t.Skip("needs a folder of kernels: set MOOVM_CACHE")
		}
		cache = filepath.Join(dir, "moovm")
	}
	found, _ := filepath.Glob(filepath.Join(cache, "kernel", name, "boot", "vmlinuz-*"))
	if len(found) == 0 {
		t.Skipf("needs the kernel %s: scripts/fetch-kernel.sh %s", name, name)
	}
	return found[0]
}

// Debian's kernels of three series, generic and cloud, boot by every way in;
// those that unpack themselves choose a random address.
func TestLongMachineKernels(t *testing.T) {
	long(t)
	needKVM(t)
	for _, name := range series {
		t.Run(name, func(t *testing.T) {
			path := seriesKernel(t, name)
			release := strings.TrimPrefix(filepath.Base(path), "vmlinuz-")
			boot := func(k vmm.Kernel) string {
				t.Helper()
				start := time.Now()
				m := bootScript(t, k, facts, func(c *vmm.Config) { c.CPUs, c.Memory = 2, 512<<20 })
				out := m.end(vmm.PowerOff)
				t.Logf("booted in %v", time.Since(start).Round(time.Millisecond))
				if got := field(t, out, "release"); got != release {
					t.Errorf("release %s, want %s", got, release)
				}
				if n := number(t, out, "cpus"); n != 2 {
					t.Errorf("%d CPUs", n)
				}
				return field(t, out, "text")
			}
			elf := elfKernel(t, path)
			plain := boot(elf)
			elf.Protocol = vmm.ProtocolPVH
			if text := boot(elf); text != plain {
				t.Errorf("_text is at %s by the 64-bit entry and at %s by PVH", plain, text)
			}
			zImage := fileKernel(t, path)
			places := map[string]bool{plain: true, boot(zImage): true, boot(zImage): true}
			if len(places) != 3 {
				t.Errorf("KASLR: _text was at %v", places)
			}
		})
	}
}

// Machines of several sizes. Debian's kernels end 66 MiB (6.12) to 74 MiB (6.1)
// from the beginning of memory, and need some 20 MiB more to reach user space.
func TestMachineSizes(t *testing.T) {
	needKVM(t)
	k := elfKernel(t, kernel)
	_, err := vmm.New(vmm.Config{Memory: 64 << 20, Kernel: k})
	if !errors.Is(err, vmm.ErrKernel) || !strings.Contains(err.Error(), "give the machine more memory") {
		t.Errorf("64 MiB: %v", err)
	}
	for _, c := range []struct {
		cpus   int
		memory int64
	}{{1, 96 << 20}, {2, 512 << 20}, {8, 6 << 30}, {1, 6 << 30}, {8, 128 << 20}} {
		t.Run(fmt.Sprintf("%d CPUs %d MiB", c.cpus, c.memory>>20), func(t *testing.T) {
			m := bootScript(t, k, facts, func(v *vmm.Config) { v.CPUs, v.Memory = c.cpus, c.memory })
			out := m.end(vmm.PowerOff)
			if n := number(t, out, "cpus"); n != int64(c.cpus) {
				t.Errorf("the guest sees %d CPUs", n)
			}
			// The kernel keeps itself and a page table entry for each page.
			if n := number(t, out, "kib") << 10; n > c.memory || n < c.memory*31/32-60<<20 {
				t.Errorf("the guest sees %d MiB", n>>20)
			}
			if s := field(t, out, "clock"); s != "kvm-clock" && s != "tsc" {
				t.Errorf("clock source %s", s)
			}
		})
	}
}
