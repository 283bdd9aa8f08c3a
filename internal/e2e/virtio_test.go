package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/virtioblk"
	"github.com/moovm/moovm/vmm"
)

// virtioScript runs in the guest. vda is the root, vdb an overlay whose base
// is full of sevens, vdc a disk that grows, vdd has fio.
const virtioScript = `
set -e
step() { echo "$* after $(cut -d" " -f1 /proc/uptime) s" >&2; }
step boot
echo "queues: $(ls /sys/block/vda/mq | wc -l) $(ls /sys/block/vdb/mq | wc -l)"
mkdir /fio
mount -o ro /dev/vdd /fio
for d in dev proc sys; do mount --rbind /$d /fio/$d; done
[ "$(head -c 7 /dev/vdb)" = 7777777 ] && echo "base: ok"
chroot /fio fio --name=job --filename=/dev/vdb --numjobs=4 --offset_increment=%[1]dm --size=%[1]dm --loops=%[2]d \
	--ioengine=libaio --direct=1 --iodepth=8 --rw=randwrite --bsrange=4k-64k --fsync=64 \
	--verify=crc32c --verify_backlog=64 --verify_fatal=1 --verify_state_save=0 --minimal > /fio.out 2>&1 || { cat /fio.out; exit 1; }
echo "fio: $(grep -c ';job;0;' /fio.out) jobs without an error"

step fio
blkdiscard -f /dev/vdb
cmp -n $((16 << 20)) /dev/vdb /dev/zero && echo "blkdiscard: zeros, not the base"
step discard
mkfs.ext4 -q -F /dev/vdb
mkdir /x
mount /dev/vdb /x
cp -a /usr/lib/x86_64-linux-gnu/lib[ab]* /x
(cd /x && find . -type f -exec md5sum {} +) > /sums
dd if=/dev/urandom of=/x/big bs=1M count=4 conv=fsync 2>/dev/null
rm /x/big
sync
fstrim -v /x
umount /x
e2fsck -fn /dev/vdb > /fsck.out 2>&1 || { cat /fsck.out; exit 1; }
mount /dev/vdb /x
(cd /x && md5sum -c --quiet /sums) && echo "ext4: whole"
umount /x

step ext4
echo "vdc: $(blockdev --getsize64 /dev/vdc)"
echo "GROW"
for i in $(seq 300); do [ "$(blockdev --getsize64 /dev/vdc)" = %[3]d ] && break; sleep 0.1; done
echo "vdc: $(blockdev --getsize64 /dev/vdc)"
echo last | dd of=/dev/vdc bs=512 seek=$((%[3]d / 512 - 1)) conv=notrunc oflag=sync 2>/dev/null
step resize
dmesg | grep -E "I/O error|blk_update_request|virtio.*(fail|error)|BUG:|WARNING:" && exit 1
echo "kernel: content"
`

// watch calls f once when text has been written.
type watch struct {
	mu   sync.Mutex
	b    bytes.Buffer
	text string
	f    func()
}

func (w *watch) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.b.Write(p)
	if w.f != nil && strings.Contains(w.b.String(), w.text) {
		go w.f()
		w.f = nil
	}
	return len(p), nil
}

func (w *watch) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

// realDrivers boots stock Debian with four processors and works its disks hard.
func realDrivers(t *testing.T, transport vmm.Transport, megabytes, loops int) {
	needKVM(t)
	tools := needTools(t)
	dir := folder(t)
	open := func(name, base string) *cowdisk.Disk {
		img := filepath.Join(dir, name)
		if err := cowdisk.Create(img, cowdisk.CreateOptions{Backing: base}); err != nil {
			t.Fatal(err)
		}
		d, err := cowdisk.Open(img, cowdisk.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	}
	sevens := bytes.Repeat([]byte("7"), max(64, 4*megabytes)<<20)
	if err := os.WriteFile(filepath.Join(dir, "sevens"), sevens, 0o600); err != nil {
		t.Fatal(err)
	}
	const small, large = 8 << 20, 24 << 20
	growing := virtioblk.NewRAM(small)
	fio, err := virtioblk.OpenFile(tools, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fio.Close() })
	k, mods := kernelWithModules(t)
	var g *guest.Guest
	started := make(chan struct{})
	out := &watch{text: "GROW", f: func() {
		<-started
		growing.Resize(large)
		if err := g.DiskResized(2); err != nil {
			t.Error(err)
		}
	}}
	var stderr watch
	ctx, cancel := context.WithTimeout(t.Context(), patience*3/2)
	defer cancel()
	g, err = guest.Start(ctx, guest.Config{
		Kernel: k, Modules: mods, Init: moovmBin, Memory: 512 << 20, CPUs: 4, Transport: transport,
		Disks: []guest.Disk{
			{COW: open("root.cow", "base.img")},
			{COW: open("data.cow", "sevens"), Serial: "data"},
			{Backend: growing},
			{Backend: fio, ReadOnly: true},
		},
		Command: &control.Command{Args: []string{"/bin/bash", "-c", fmt.Sprintf(virtioScript, megabytes, loops, large)}},
		Stdout:  out, Stderr: &stderr,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	close(started)
	r, err := g.Wait()
	if err != nil || r.ExitStatus != 0 {
		t.Fatalf("%v, status %d\n%s\n%s", err, r.ExitStatus, out.String(), stderr.String())
	}
	for _, want := range []string{
		"queues: 4 4", "base: ok", "fio: 4 jobs without an error", "blkdiscard: zeros, not the base", "ext4: whole",
		fmt.Sprintf("vdc: %d\nGROW\nvdc: %d\n", small, large), "kernel: content",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the guest did not say %q", want)
		}
	}
	if !strings.Contains(out.String(), "trimmed") {
		t.Error("fstrim did nothing")
	}
	last := make([]byte, 5)
	if _, err := growing.ReadAt(last, large-512); err != nil || string(last) != "last\n" {
		t.Errorf("the grown disk's last sector is %q, %v", last, err)
	}
	t.Logf("%s\n%s", out.String(), stderr.String())
	if b, err := os.ReadFile(filepath.Join(dir, "sevens")); err != nil || !bytes.Equal(b, sevens) {
		t.Errorf("the base has changed (%v)", err)
	}
}

// Stock Linux's drivers: fio verifies what four jobs write on four queues;
// discard, ext4 with its tools, a disk that grows while it is used.
func TestVirtioPCI(t *testing.T) { realDrivers(t, vmm.TransportPCI, 2, 1) }

func TestLongVirtioPCI(t *testing.T) {
	long(t)
	realDrivers(t, vmm.TransportPCI, 32, 4)
}

func TestLongVirtioMMIO(t *testing.T) {
	long(t)
	realDrivers(t, vmm.TransportMMIO, 2, 1)
}

// A stock kernel finds virtio-mmio devices by ACPI and boots from one; each has
// an interrupt of its own, an edge.
func TestVirtioMMIO(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	overlay(t, dir)
	r := moovm(t, dir, runArgs(append([]string{"--virtio", "mmio", "--cpus", "2"}, sh(`
		readlink /sys/bus/virtio/devices/*
		ls /sys/bus/pci/devices | wc -l
		ls /sys/block/vda/mq | wc -l
		grep -c 'IO-APIC.*-edge *virtio' /proc/interrupts
		dd if=/dev/urandom of=/new bs=1M count=8 conv=fsync 2>/dev/null
		md5sum /new >/sum; sync; echo 3 >/proc/sys/vm/drop_caches; md5sum -c /sum
		cat /run/moovm/disks/vda/format`)...)...)...)
	r.wantStatus(t, 0)
	// The disk, the metadata, the kernel's modules and the control line; nothing on PCI but its bridge.
	want := regexp.MustCompile(`^(\.\./.*/LNRO0005:0\d/virtio\d\n){4}1\n2\n4\n/new: OK\ncow\n$`)
	if !want.MatchString(r.stdout) {
		t.Errorf("the guest says\n%s", r.stdout)
	}
	moovm(t, dir, runArgs(sh("md5sum -c /sum")...)...).wantStatus(t, 0) // on the other transport
	fsck(t, dir, "root.cow", false)
}
