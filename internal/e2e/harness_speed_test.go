package e2e

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
	ways := map[string][]string{
		"QEMU microvm, initramfs":     microvm,
		"moovm test --root initramfs": slices.Concat(run, []string{"--root", "initramfs"}, test),
		"moovm test (host's root)":    slices.Concat(run, test),
	}
	took := map[string][]time.Duration{}
	for range 5 {
		for name, args := range ways {
			took[name] = append(took[name], untilLine(t, "", "=== RUN   TestGuestPass", args...))
		}
	}
	base := median(took["QEMU microvm, initramfs"])
	for name, times := range took {
		t.Logf("%-30s %7v to the first line (%.2f of QEMU); all: %v", name, median(times).Round(time.Millisecond), float64(median(times))/float64(base), times)
	}
}

// microvmFiles writes the kernel and the initramfs for QEMU.
func microvmFiles(t *testing.T, vmlinux, initrd, self string) {
	t.Helper()
	k, m := kernelWithModules(t)
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
