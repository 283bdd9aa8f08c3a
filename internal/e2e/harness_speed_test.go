package e2e

import (
	"bufio"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/guest"
)

// How long it takes from `moovm test` to the first line of a test, next to a
// QEMU microvm with the same kernel and an initramfs with the same init,
// modules and test binary. It asserts only that both get there; the figures
// are in docs/TESTING.md.
func TestLongHarnessSpeed(t *testing.T) {
	needKVM(t)
	long(t)
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("needs QEMU to compare with: apt-get install qemu-system-x86")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	vmlinux, initrd := filepath.Join(dir, "vmlinux"), filepath.Join(dir, "initrd")
	microvmFiles(t, vmlinux, initrd, self)

	// The kernel is told the same; its console is the only serial port there.
	microvm := []string{qemu, "-M", "microvm,accel=kvm", "-cpu", "host", "-m", "1024", "-nodefaults", "-no-user-config",
		"-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", vmlinux, "-initrd", initrd,
		"-append", "console=ttyS0 panic=-1 quiet"}
	run := []string{moovmBin, "test", "--kernel", kernel, "--accel", "kvm"}
	test := []string{self, "-test.v", "-test.run=^TestGuestPass$"}
	took := map[string][]time.Duration{}
	for range 5 {
		took["QEMU microvm, initramfs"] = append(took["QEMU microvm, initramfs"], firstLine(t, microvm))
		took["moovm test --root initramfs"] = append(took["moovm test --root initramfs"], firstLine(t, slices.Concat(run, []string{"--root", "initramfs"}, test)))
		took["moovm test (host's root)"] = append(took["moovm test (host's root)"], firstLine(t, slices.Concat(run, test)))
	}
	median := func(name string) time.Duration {
		slices.Sort(took[name])
		return took[name][len(took[name])/2]
	}
	base := median("QEMU microvm, initramfs")
	for name, times := range took {
		t.Logf("%-30s %7v to the first line (%.2f of QEMU); all: %v", name, median(name).Round(time.Millisecond), float64(median(name))/float64(base), times)
	}
}

// microvmFiles writes the kernel and the initramfs for QEMU.
func microvmFiles(t *testing.T, vmlinux, initrd, self string) {
	t.Helper()
	k, err := guest.LoadKernel(kernel)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	m, err := guest.FindModules(k)
	if err != nil {
		t.Fatal(err)
	}
	modules, err := m.Resolve("virtio_pci", "9pnet_virtio", "9p", "overlay")
	if err != nil {
		t.Fatal(err)
	}
	write := func(path string, w io.WriterTo) {
		f, err := os.Create(path)
		if err == nil {
			_, err = w.WriteTo(f)
		}
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write(vmlinux, k)
	write(initrd, &guest.Initramfs{
		Init: moovmBin, Modules: modules, Files: []guest.File{{Name: "e2e.test", Mode: 0o755, HostPath: self}},
		Config: &guest.InitConfig{Version: guest.ConfigVersion, Control: "/dev/ttyS0", Command: &guest.Command{
			Args: []string{"/e2e.test", "-test.v", "-test.run=^TestGuestPass$"}, Env: []string{"MOOVM_GUEST=1"}}},
	})
}

// firstLine runs a program until it says that a test runs, and ends it.
func firstLine(t *testing.T, args []string) time.Duration {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs strings.Builder
	cmd.Stderr = &errs
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cancel()
	lines := bufio.NewReader(out)
	var said strings.Builder
	for {
		line, err := lines.ReadString('\n')
		said.WriteString(line)
		if strings.Contains(line, "=== RUN   TestGuestPass") {
			return time.Since(start)
		}
		if err != nil {
			t.Fatalf("%s ended without a test: %v\n%s\n%s", args[0], err, said.String(), errs.String())
		}
	}
}
