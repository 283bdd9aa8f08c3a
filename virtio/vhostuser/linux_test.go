package vhostuser_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/initramfs"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/virtioblk"
)

// linuxScript runs in the guest. The machine's fio, with its libraries from a
// share of the host, writes the second disk past the page cache in four jobs
// and verifies what it reads back, all the time; it never flushes.
const linuxScript = `
exec >/dev/console 2>&1
for d in dev proc sys; do mount --rbind /$d /mnt/host/$d; done
uname -r
chroot /mnt/host fio --name=job --filename=/dev/vdb --numjobs=4 --offset_increment=16m --size=16m --loops=2 \
	--ioengine=libaio --direct=1 --iodepth=8 --rw=randwrite --bsrange=4k-32k \
	--verify=crc32c --verify_backlog=32 --verify_fatal=1 --verify_state_save=0 --minimal >/fio.out 2>&1
s=$?
[ $s = 0 ] || cat /fio.out
echo "fio status $s"
# Read again what is there now, with the checksums that fio has put in.
md5sum /dev/vdb >/sum; sync; echo 3 >/proc/sys/vm/drop_caches; md5sum -c /sum
blkdiscard -f -l 1048576 /dev/vdb && echo "discard ok"
dmesg | grep -i 'i/o error\|blk_update' && echo "kernel complains"
echo "all done"
`

// Stock Linux under QEMU: its root is an overlay of a Debian disk that this
// process serves; a second disk, an overlay too, has a server that is killed
// with SIGKILL every few seconds while fio verifies what it writes there.
func TestQEMULinux(t *testing.T) {
	bin, kernelPath, baseImg := os.Getenv("MOOVM_BIN"), os.Getenv("MOOVM_KERNEL"), os.Getenv("MOOVM_BASE")
	if bin == "" || kernelPath == "" || baseImg == "" {
		t.Skip("needs MOOVM_BIN, MOOVM_KERNEL and MOOVM_BASE (an image, no archive), as `make test` sets them")
	}
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("fio is missing: apt-get install fio")
	}
	t.Parallel()
	dir := t.TempDir()
	rootDev := blkDevice(t, virtioblk.Config{Backend: overlayOn(t, dir, baseImg), Queues: 2})
	rootSock := filepath.Join(dir, "root")
	serveHere(t, rootSock, rootDev)
	data := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(data, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(data, 64<<20); err != nil {
		t.Fatal(err)
	}
	overlayOn(t, filepath.Dir(data), data).Close()
	d := startDaemon(t, "cow", filepath.Join(filepath.Dir(data), "overlay.cow"), 2)

	kernel, err := kernel.LoadKernel(kernelPath)
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	mods, err := kmod.FindModules(kernel)
	if err != nil {
		t.Fatal(err)
	}
	list, err := mods.Resolve("virtio_pci", "virtio_blk", "ext4", "9pnet_virtio", "9p")
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := (&initramfs.Archive{Init: bin, Modules: list, Config: &control.InitConfig{
		Version: control.ConfigVersion, Root: &control.Root{Device: "/dev/vda"},
		Mounts: []control.Mount{{Source: "host", Target: "/mnt/host", Type: "9p",
			Options: "trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro"}},
		Command: &control.Command{Args: []string{"/bin/sh", "-c", linuxScript}},
	}}).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	initrdPath := filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrdPath, initrd, 0o600); err != nil {
		t.Fatal(err)
	}
	args := append([]string{"-smp", "2", "-kernel", kernel.ELFPath(), "-initrd", initrdPath,
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off rdinit=/init",
		"-fsdev", "local,id=h,path=/,security_model=none,readonly=on,multidevs=remap", "-device", "virtio-9p-pci,fsdev=h,mount_tag=host"},
		append(vhostDisk(rootSock, ",num-queues=2"), vhostDisk(d.sock, ",num-queues=2")...)...)
	q := startQEMU(t, "q35", 512, 5*time.Minute, args...)
	q.expect("amd64") // the job begins: before, the disk is only probed
	q.killing(d, 2500*time.Millisecond, 8)
	for _, want := range []string{"fio status 0", "/dev/vdb: OK", "discard ok", "all done"} {
		if !strings.Contains(q.out.String(), want) {
			t.Errorf("the guest did not say %q", want)
		}
	}
	if strings.Contains(q.out.String(), "kernel complains") {
		t.Error("there were I/O errors")
	}
	if d.kills == 0 {
		t.Error("the guest was done before the first kill")
	}
	t.Logf("%d kills; root disk: %+v", d.kills, rootDev.Stats())
}
