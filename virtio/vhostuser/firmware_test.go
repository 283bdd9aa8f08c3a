package vhostuser_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/moovm/moovm/virtioblk"
)

// bootDebian serves an overlay of the boot disk to a machine and returns it when
// its firmware has loaded GRUB, and GRUB what it needs.
func bootDebian(t *testing.T, platform string, firmware ...string) (*qemu, *virtioblk.Device) {
	t.Helper()
	disk := os.Getenv("MOOVM_BOOTDISK")
	if disk == "" {
		t.Skip("needs MOOVM_BOOTDISK, the image that scripts/build-bootdisk.sh makes; `make test` sets it")
	}
	t.Parallel()
	dir := t.TempDir()
	dev := blkDevice(t, virtioblk.Config{Backend: overlayOn(t, dir, disk), Queues: 2})
	sock := filepath.Join(dir, "s")
	serveHere(t, sock, dev)
	q := startQEMU(t, "q35", 512, 4*time.Minute, append(append([]string{"-smp", "2"}, firmware...), vhostDisk(sock, ",num-queues=2,bootindex=0")...)...)
	q.expect(fmt.Sprintf("moovm: GRUB (%s) reads its configuration", platform))
	return q, dev
}

// login waits for Debian, logs in, writes to the disk and powers off.
func login(t *testing.T, q *qemu, dev *virtioblk.Device) {
	t.Helper()
	q.expect("bootdisk login:")
	fmt.Fprintln(q.in, "root")
	q.expect("root@bootdisk")
	fmt.Fprintln(q.in, "findmnt -no SOURCE,FSTYPE /; dd if=/dev/urandom of=/x bs=1M count=8 conv=fsync; echo 3 >/proc/sys/vm/drop_caches; md5sum </x >/y; md5sum </x | cmp - /y && echo sa''me; systemctl poweroff")
	q.expect("/dev/vda2 ext4")
	q.expect("same")
	<-q.ended
	if code := q.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("QEMU ended with %d", code)
	}
	if s := dev.Stats(); s.WriteBytes < 8<<20 || s.Flushes == 0 || s.Errors != 0 {
		t.Errorf("%+v", s)
	}
}

// SeaBIOS loads GRUB from our disk, GRUB Debian's kernel and initramfs, and
// Debian comes up on it.
func TestQEMUDebian(t *testing.T) {
	q, dev := bootDebian(t, "pc")
	login(t, q, dev)
}

// OVMF finds the EFI partition on our disk and loads GRUB from it; `make soak`
// goes on to Debian.
func TestQEMUOVMF(t *testing.T) {
	const code, vars = "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"
	b, err := os.ReadFile(vars)
	if err != nil {
		t.Skip("OVMF is missing: apt-get install ovmf")
	}
	mine := filepath.Join(t.TempDir(), "vars")
	if err := os.WriteFile(mine, b, 0o600); err != nil {
		t.Fatal(err)
	}
	q, dev := bootDebian(t, "efi", "-drive", "if=pflash,format=raw,readonly=on,file="+code, "-drive", "if=pflash,format=raw,file="+mine)
	if os.Getenv("MOOVM_SOAK") != "" {
		login(t, q, dev)
		return
	}
	if s := dev.Stats(); s.Reads == 0 || s.Errors != 0 {
		t.Errorf("%+v", s)
	}
}
