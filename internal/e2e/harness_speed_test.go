package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/initramfs"
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
	vmlinux := elfFile(t, dir)
	// The kernel is told the same; its console is the only serial port there.
	microvm := func(initrd string, more ...string) []string {
		return append([]string{qemu, "-M", "microvm,accel=kvm", "-cpu", "host", "-m", "1024", "-nodefaults", "-no-user-config",
			"-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", vmlinux, "-initrd", initrd,
			"-append", "console=ttyS0 panic=-1 quiet"}, more...)
	}
	hostRoot := &control.Root{Device: "host", Type: "9p", Options: "trans=virtio,version=9p2000.L,msize=500000,cache=loose", ReadOnly: true, Overlay: true}
	run := []string{moovmBin, "test", "--kernel", kernel, "--accel", "kvm"}
	test := []string{self, "-test.v", "-test.run=^TestGuestPass$"}
	ways := map[string][]string{
		"QEMU microvm, initramfs": microvm(harnessInitrd(t, dir, self, nil)),
		"QEMU microvm, host's root": microvm(harnessInitrd(t, dir, self, hostRoot),
			"-fsdev", "local,id=h,path=/,security_model=none,readonly=on,multidevs=remap", "-device", "virtio-9p-device,fsdev=h,mount_tag=host"),
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

// harnessInitrd writes an initramfs whose init runs the test binary self, which
// is in it, or on the root if there is one.
func harnessInitrd(t *testing.T, dir, self string, root *control.Root) string {
	t.Helper()
	_, m := kernelWithModules(t)
	modules, err := m.Resolve("virtio_mmio", "9pnet_virtio", "9p", "overlay")
	if err != nil {
		t.Fatal(err)
	}
	archive := &initramfs.Archive{
		Init: moovmBin, Modules: modules,
		Config: &control.InitConfig{Version: control.ConfigVersion, Control: "/dev/ttyS0", Root: root, Command: &control.Command{
			Args: []string{self, "-test.v", "-test.run=^TestGuestPass$"}, Env: []string{"MOOVM_GUEST=1"}}},
	}
	name := "initrd-root"
	if root == nil {
		name = "initrd"
		archive.Files = []initramfs.File{{Name: "e2e.test", Mode: 0o755, HostPath: self}}
		archive.Config.Command.Args[0] = "/e2e.test"
	}
	return writeTo(t, filepath.Join(dir, name), archive)
}
