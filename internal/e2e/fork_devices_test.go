package e2e

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moovm/moovm/guest/sharefs"
	guestkernel "github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio9p"
	"github.com/moovm/moovm/virtioblk"
	"github.com/moovm/moovm/vmm"
)

// deviceScript is the init of a guest that reads an open file of a 9P share
// piece by piece and writes what it makes of it to a disk, with a flush each.
const deviceScript = `#!/bin/busybox sh
busybox() { /bin/busybox "$@"; }
busybox mkdir -p /proc /sys /dev /mnt
busybox mount -t proc p /proc
busybox mount -t sysfs s /sys
busybox mount -t devtmpfs d /dev
while read m; do busybox insmod $m || echo CANNOT LOAD $m; done < /modules
busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=65536,cache=none share /mnt || echo CANNOT MOUNT
exec 3< /mnt/folder/file
h=start i=0
echo READY
while [ $i -lt 40 ]; do
	h=$(echo $h $i $(busybox dd bs=1000 count=1 <&3 2>/dev/null | busybox sha256sum) | busybox sha256sum)
	echo $h | busybox dd of=/dev/vda bs=512 seek=$i conv=sync,fsync,notrunc 2>/dev/null
	i=$((i+1))
done
echo 3 > /proc/sys/vm/drop_caches
echo HASH $(busybox dd if=/dev/vda bs=512 count=40 2>/dev/null | busybox sha256sum | busybox cut -c1-32) $(busybox cat /mnt/folder/file | busybox wc -c)
echo UUID $(busybox cat /proc/sys/kernel/random/uuid)
busybox poweroff -f
`

// memDisk is a disk that can be copied while its machine stands still. Writes
// take a moment, so that there are some in flight.
type memDisk struct {
	mu sync.Mutex
	b  []byte
}

func (d *memDisk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := copy(p, d.b[off:]); n < len(p) {
		return n, io.EOF
	}
	return len(p), nil
}

func (d *memDisk) WriteAt(p []byte, off int64) (int, error) {
	time.Sleep(5 * time.Millisecond)
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(d.b[off:], p), nil
}

func (d *memDisk) Flush() error { return nil }
func (d *memDisk) Size() int64  { return int64(len(d.b)) }

func (d *memDisk) clone() *memDisk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return &memDisk{b: bytes.Clone(d.b)}
}

// jobDevices are a disk and a share of dir.
func jobDevices(t *testing.T, disk *memDisk, dir string) []virtio.Device {
	t.Helper()
	blk, err := virtioblk.New(virtioblk.Config{Backend: disk})
	if err != nil {
		t.Fatal(err)
	}
	share, err := sharefs.New(dir, sharefs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { share.Close() })
	p9, err := virtio9p.New(virtio9p.Config{Tag: "share", Attacher: share})
	if err != nil {
		t.Fatal(err)
	}
	return []virtio.Device{blk, p9}
}

// TestForkDevices forks a stock kernel in the middle of disk and 9P traffic,
// with a file of the share open: every life reads on where it was and ends with
// the result of one that was left alone, on a disk of its own.
func TestForkDevices(t *testing.T) {
	needKVM(t)
	k, err := guestkernel.LoadKernel(kernel)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	modules, err := kmod.FindModules(k)
	if err != nil {
		t.Fatal(err)
	}
	files, err := modules.Resolve("virtio_pci", "virtio_blk", "9pnet_virtio", "9p")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	content := make([]byte, 40_000)
	for i := range content {
		content[i] = byte(i * i >> 3)
	}
	if err := os.MkdirAll(filepath.Join(dir, "folder"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "folder", "file"), content, 0o644); err != nil {
		t.Fatal(err)
	}
	initrd := jobInitrd(t, deviceScript, files...)
	blank := &memDisk{b: make([]byte, 1<<20)}
	plain := bootJob(t, k, initrd, 1, vmm.TransportPCI, jobDevices(t, blank.clone(), dir)...)
	want, uuid := plain.end(t)
	if !strings.HasSuffix(want, " 40000") || strings.Contains(plain.out.String(), "CANNOT") {
		t.Fatalf("the job ended with %q\n%s", want, plain.out)
	}
	uuids := map[string]bool{uuid: true}
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	disk := blank.clone()
	parent := bootJob(t, k, initrd, 2, vmm.TransportPCI, jobDevices(t, disk, dir)...)
	all := []*job{parent}
	for i := range 3 {
		time.Sleep(time.Duration(rng.IntN(1000)) * time.Millisecond)
		var frozen *memDisk
		s, err := parent.m.Snapshot(t.Context(), vmm.SnapshotOptions{Frozen: func() error { frozen = disk.clone(); return nil }})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, forkJob(t, s, fmt.Sprint("child ", i), jobDevices(t, frozen, dir)...))
		s.Close()
	}
	for _, j := range all {
		got, uuid := j.end(t)
		if got != want {
			t.Errorf("%s ended with %q, want %q\n%s", j.name, got, want, j.out)
		}
		if uuids[uuid] || uuid == "" {
			t.Errorf("%s has a UUID that was seen: %q", j.name, uuid)
		}
		uuids[uuid] = true
	}
}
