package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"

	guestkernel "github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/vmm"
)

// jobScript is the init of a guest with a stock kernel and busybox: a job whose
// result does not depend on when it is interrupted, with processes, files,
// timers and two processors at work.
const jobScript = `#!/bin/busybox sh
busybox() { /bin/busybox "$@"; }
busybox mkdir -p /proc /sys /dev /tmp
busybox mount -t proc p /proc
busybox mount -t tmpfs t /tmp
busybox mount -t devtmpfs d /dev
( busybox sleep 2; echo armed > /tmp/timer ) &
h=start i=0
echo READY
while [ $i -lt 40 ]; do
	i=$((i+1))
	h=$(echo $h $i | busybox sha256sum)
	echo $h >> /tmp/log
done
wait
echo HASH $(busybox sha256sum < /tmp/log | busybox cut -c1-32) $(busybox cat /tmp/timer) $(busybox wc -l < /tmp/log)
echo UUID $(busybox cat /proc/sys/kernel/random/uuid)
echo FORKS $(busybox dmesg | busybox grep -c 'due to virtual machine fork')
busybox poweroff -f
`

// jobInitrd is an archive of busybox, the script, and modules with a list of them
// in load order.
func jobInitrd(t *testing.T, script string, modules ...kmod.ModuleFile) []byte {
	t.Helper()
	box, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("%v (apt-get install busybox-static; make setup does)", err)
	}
	var b bytes.Buffer
	w := cpio.NewWriter(&b)
	add := func(name string, mode cpio.FileMode, p []byte) {
		if err := w.WriteHeader(&cpio.Header{Name: name, Mode: mode, Size: int64(len(p)), Links: 1}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	add("bin", cpio.TypeDir|0o755, nil)
	add("bin/busybox", cpio.TypeReg|0o755, box)
	add("init", cpio.TypeReg|0o755, []byte(script))
	list := ""
	for _, m := range modules {
		p, err := m.Load()
		if err != nil {
			t.Fatal(err)
		}
		add(m.Name+".ko", cpio.TypeReg|0o644, p)
		list += "/" + m.Name + ".ko\n"
	}
	add("modules", cpio.TypeReg|0o644, []byte(list))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// jobConsole collects a guest's output.
type jobConsole struct {
	mu sync.Mutex
	b  strings.Builder
}

func (c *jobConsole) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.Write(p)
}

func (c *jobConsole) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.String()
}

// line is the rest of the line that begins with word.
func (c *jobConsole) line(word string) string {
	for l := range strings.Lines(c.String()) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(l), word+" "); ok {
			return rest
		}
	}
	return ""
}

// job is one life of the guest.
type job struct {
	name string
	m    *vmm.Machine
	out  *jobConsole
}

func bootJob(t *testing.T, kernel *guestkernel.Kernel, initrd []byte, cpus int, transport vmm.Transport, devices ...virtio.Device) *job {
	t.Helper()
	j := &job{name: "parent", out: &jobConsole{}}
	var err error
	j.m, err = vmm.New(vmm.Config{
		Memory: 256 << 20, CPUs: cpus, Transport: transport, Initrd: initrd, Devices: devices,
		Kernel:  vmm.Kernel{Name: "vmlinux", Image: kernel, Size: kernel.Size()},
		Cmdline: "console=ttyS0 quiet panic=-1 pci=noearly", Console: vmm.Serial{Out: j.out},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.m.Close() })
	if err := j.m.Start(); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); j.out.String() == "" || !strings.Contains(j.out.String(), "READY"); time.Sleep(20 * time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("the guest does not begin:\n%s", j.out)
		}
	}
	return j
}

func (j *job) fork(t *testing.T, name string) *job {
	t.Helper()
	s, err := j.m.Snapshot(t.Context(), vmm.SnapshotOptions{})
	if err != nil {
		t.Fatalf("snapshot of %s: %v", j.name, err)
	}
	defer s.Close()
	return forkJob(t, s, name)
}

func forkJob(t *testing.T, s *vmm.Snapshot, name string, devices ...virtio.Device) *job {
	t.Helper()
	c := &job{name: name, out: &jobConsole{}}
	var err error
	if c.m, err = s.Fork(vmm.ForkConfig{Console: vmm.Serial{Out: c.out}, Devices: devices}); err != nil {
		t.Fatalf("fork of %s: %v", name, err)
	}
	t.Cleanup(func() { c.m.Close() })
	if err := c.m.Start(); err != nil {
		t.Fatal(err)
	}
	return c
}

// end waits for the job's end and returns its result and its UUID.
func (j *job) end(t *testing.T) (hash, uuid string) {
	t.Helper()
	stop := time.AfterFunc(patience, j.m.Stop)
	defer stop.Stop()
	if r, err := j.m.Wait(); r != vmm.PowerOff || err != nil {
		t.Fatalf("%s: %v, %v\n%s", j.name, r, err, j.out)
	}
	return j.out.line("HASH"), j.out.line("UUID")
}

// TestForkStock forks and rewinds a machine with a stock kernel at random
// instants. Every life ends with the result of one that was left alone; random
// numbers differ, and the kernel knows that it was forked.
func TestForkStock(t *testing.T) { forkStock(t, 2, []int{2}, vmm.TransportPCI) }

// TestLongForkStock does so more often, with other numbers of processors and
// without PCI.
func TestLongForkStock(t *testing.T) {
	long(t)
	forkStock(t, 8, []int{1, 4}, vmm.TransportPCI, vmm.TransportMMIO)
}

func forkStock(t *testing.T, children int, cpus []int, transports ...vmm.Transport) {
	needKVM(t)
	k, err := guestkernel.LoadKernel(kernel)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	f := &forkTest{kernel: k, initrd: jobInitrd(t, jobScript), uuids: map[string]string{}}
	plain := bootJob(t, k, f.initrd, 1, vmm.TransportPCI)
	var uuid string
	f.want, uuid = plain.end(t)
	if !strings.HasSuffix(f.want, " armed 40") || uuid == "" {
		t.Fatalf("the job ended with %q, %q\n%s", f.want, uuid, plain.out)
	}
	f.uuids[uuid] = "left alone"
	for _, transport := range transports {
		for _, n := range cpus {
			t.Run(fmt.Sprintf("%d CPUs, transport %d", n, transport), func(t *testing.T) { f.run(t, children, n, transport) })
		}
	}
}

// forkTest is what all of its runs share.
type forkTest struct {
	kernel *guestkernel.Kernel
	initrd []byte
	want   string            // a job's result
	uuids  map[string]string // that were seen, and whose they are
}

func (f *forkTest) run(t *testing.T, children, cpus int, transport vmm.Transport) {
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	pause := func(most int) { time.Sleep(time.Duration(rng.IntN(most)) * time.Millisecond) }
	parent := bootJob(t, f.kernel, f.initrd, cpus, transport)
	all := []*job{parent}
	for i := range children {
		pause(1000)
		child := parent.fork(t, fmt.Sprint("child ", i))
		all = append(all, child)
		if i == 1 {
			pause(500)
			all = append(all, child.fork(t, "grandchild"))
		}
	}
	saved := parent.save(t)
	all = append(all, forkJob(t, saved, "from files"))
	rewound := forkJob(t, saved, "rewound")
	for range 5 {
		pause(300)
		if err := rewound.m.Rewind(t.Context(), saved, vmm.SnapshotOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, j := range append(all, rewound) {
		got, uuid := j.end(t)
		if got != f.want {
			t.Errorf("%s ended with %q, want %q\n%s", j.name, got, f.want, j.out)
		}
		if who, twice := f.uuids[uuid]; twice || uuid == "" {
			t.Errorf("%s has the UUID %q of %s", j.name, uuid, who)
		}
		f.uuids[uuid] = j.name
		if j != parent && j.out.line("FORKS") == "0" {
			t.Errorf("%s: the kernel does not know that it was forked", j.name)
		}
	}
}

// save writes the job into files and opens them.
func (j *job) save(t *testing.T) *vmm.Snapshot {
	t.Helper()
	s, err := j.m.Snapshot(t.Context(), vmm.SnapshotOptions{})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := errors.Join(s.Save(dir), s.Close()); err != nil {
		t.Fatal(err)
	}
	saved, err := vmm.OpenSnapshot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { saved.Close() })
	return saved
}
