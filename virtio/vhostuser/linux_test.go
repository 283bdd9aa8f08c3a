package vhostuser_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/virtio/vhostuser"
	"github.com/moovm/moovm/virtioblk"
)

// linuxScript runs in the guest: four jobs write random data to the second disk
// past the page cache and read it back, again and again.
const linuxScript = `
job() {
	n=$1
	for i in 1 2 3 4 5 6; do
		dd if=/dev/urandom of=/x$n bs=64k count=64 status=none || return 1
		dd if=/x$n of=/dev/vdb bs=64k seek=$((n*64)) oflag=direct status=none || return 1
		a=$(sha256sum < /x$n)
		b=$(dd if=/dev/vdb bs=64k skip=$((n*64)) count=64 iflag=direct status=none | sha256sum)
		[ "$a" = "$b" ] || { echo "job $n round $i: wrong data"; return 1; }
	done
	echo "job $n ok"
}
exec >/dev/console 2>&1
uname -r
for n in 0 1 2 3; do job $n & done
wait
sync
blkdiscard -f -l 1048576 /dev/vdb && echo "discard ok"
dmesg | grep -i 'i/o error\|blk_update' && echo "kernel complains"
echo "all done"
`

// Stock Linux under QEMU: its root is an overlay of a Debian disk that this
// process serves; a second disk's server is killed with SIGKILL every few
// seconds while four jobs verify what they write there.
func TestQEMULinux(t *testing.T) {
	bin, kernelPath, baseImg := os.Getenv("MOOVM_BIN"), os.Getenv("MOOVM_KERNEL"), os.Getenv("MOOVM_BASE")
	if bin == "" || kernelPath == "" || baseImg == "" {
		t.Skip("needs MOOVM_BIN, MOOVM_KERNEL and MOOVM_BASE, as `make test-e2e` sets them")
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is missing: apt-get install qemu-system-x86")
	}
	dir := t.TempDir()
	root := filepath.Join(dir, "root.cow")
	if err := cowdisk.Create(root, cowdisk.CreateOptions{Backing: baseImg}); err != nil {
		t.Fatal(err)
	}
	cow, err := cowdisk.Open(root, cowdisk.Options{BackingRoots: []string{filepath.Dir(baseImg)}})
	if err != nil {
		t.Fatal(err)
	}
	defer cow.Close()
	rootDev := blkDevice(t, virtioblk.Config{Backend: cow, Queues: 2})
	rootSock, dataSock := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	l, err := vhostuser.Listen(rootSock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- vhostuser.Serve(ctx, l, rootDev, vhostuser.Options{}) }()
	defer func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	data := filepath.Join(dir, "data")
	if err := os.WriteFile(data, make([]byte, 64<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	start := func() *exec.Cmd {
		p := serverProcess(t, "raw", data, dataSock, 2)
		if err := p.Start(); err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := start()
	defer func() {
		p.Process.Kill()
		p.Wait()
	}()
	for n := 0; ; n++ {
		if _, err := os.Stat(dataSock); err == nil {
			break
		}
		if n == 1000 {
			t.Fatal("no server")
		}
		time.Sleep(10 * time.Millisecond)
	}

	kernel, err := guest.LoadKernel(kernelPath)
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	mods, err := guest.FindModules(kernel)
	if err != nil {
		t.Fatal(err)
	}
	list, err := mods.Resolve("virtio_pci", "virtio_blk", "ext4")
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := (&guest.Initramfs{Init: bin, Modules: list, Config: &guest.InitConfig{
		Version: guest.ConfigVersion, Root: &guest.Root{Device: "/dev/vda"},
		Command: &guest.Command{Args: []string{"/bin/sh", "-c", linuxScript}},
	}}).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	initrdPath := filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrdPath, initrd, 0o600); err != nil {
		t.Fatal(err)
	}
	qctx, qcancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer qcancel()
	var out lockedBuffer
	var stderr bytes.Buffer
	cmd := exec.CommandContext(qctx, qemu, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "512", "-display", "none", "-nodefaults", "-no-reboot",
		"-object", "memory-backend-memfd,id=m,size=512M,share=on", "-machine", "q35,memory-backend=m",
		"-kernel", kernel.ELFPath(), "-initrd", initrdPath, "-append", "console=ttyS0 quiet panic=-1 mitigations=off rdinit=/init",
		"-chardev", "socket,id=a,path="+rootSock, "-device", "vhost-user-blk-pci,chardev=a,num-queues=2",
		"-chardev", "socket,id=b,reconnect=1,path="+dataSock, "-device", "vhost-user-blk-pci,chardev=b,num-queues=2",
		"-serial", "stdio")
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); cmd.Wait() }()
	kills := 0
	for running := true; running; {
		select {
		case <-ended:
			running = false
		case <-time.After(2500 * time.Millisecond):
			// From when the jobs run: before, the disk is only probed.
			if kills < 8 && strings.Contains(out.String(), "amd64") {
				p.Process.Kill()
				p.Wait()
				p = start()
				kills++
			}
		}
	}
	got := out.String()
	for _, want := range []string{"job 0 ok", "job 1 ok", "job 2 ok", "job 3 ok", "discard ok", "all done"} {
		if !strings.Contains(got, want) {
			t.Errorf("the guest did not say %q", want)
		}
	}
	if strings.Contains(got, "kernel complains") || strings.Contains(got, "rror") {
		t.Error("there were errors")
	}
	if kills == 0 {
		t.Error("the guest was done before the first kill")
	}
	if t.Failed() {
		t.Logf("%s\n%s", got, stderr.String())
	}
	t.Logf("%d kills; root disk: %+v", kills, rootDev.Stats())
}
