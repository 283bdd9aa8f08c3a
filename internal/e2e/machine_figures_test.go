package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	guestkernel "github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/vmm"
)

// Figures of the machine, and QEMU's beside them: docs/VMM.md has the table.

// qemuMicrovm is QEMU's command line for its small machine.
func qemuMicrovm(t *testing.T, memory, elf, initrd, cmdline string, more ...string) []string {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs qemu-system-x86_64 (apt-get install qemu-system-x86)")
	}
	return append([]string{"qemu-system-x86_64", "-M", "microvm", "-accel", "kvm", "-cpu", "host", "-m", memory, "-smp", "1",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-kernel", elf, "-initrd", initrd, "-append", "console=ttyS0 panic=-1 pci=noearly quiet " + cmdline}, more...)
}

// elfFile is the kernel unpacked, as a file that QEMU can read.
func elfFile(t *testing.T, dir string) string {
	t.Helper()
	k, err := guestkernel.LoadKernel(kernel)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	return writeTo(t, filepath.Join(dir, "vmlinux"), k)
}

// writeTo makes a file of what from writes, and returns its name.
func writeTo(t *testing.T, name string, from io.WriterTo) string {
	t.Helper()
	f, err := os.Create(name)
	if err == nil {
		_, err = from.WriteTo(f)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// untilLine starts a program, returns when it has printed a line with the text
// and how long that took, and ends it.
func untilLine(t *testing.T, dir, text string, args ...string) time.Duration {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = dir
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	cmd.Stderr = &all
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cancel()
	for s := bufio.NewScanner(io.TeeReader(out, &all)); s.Scan(); {
		if strings.Contains(s.Text(), text) {
			return time.Since(start)
		}
	}
	t.Fatalf("%s: no %q in:\n%s", args[0], text, all.String())
	return 0
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// From the start of the program to the first instruction in user space, beside
// QEMU with the same kernel, initramfs, memory and processors.
func TestLongMachineBootTime(t *testing.T) {
	long(t)
	needKVM(t)
	dir := t.TempDir()
	initrd := filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrd, scriptInitrd(t, "", nil), 0o666); err != nil {
		t.Fatal(err)
	}
	elf := elfFile(t, dir)
	moovmArgs := []string{moovmBin, "run", "--kernel", kernel, "--accel", "kvm", "--initrd", initrd, "--memory", "256M"}
	untilLine(t, dir, "user space", moovmArgs...) // unpacks the kernel into the cache
	var ours, theirs []time.Duration
	for range 5 {
		ours = append(ours, untilLine(t, dir, "user space", moovmArgs...))
		theirs = append(theirs, untilLine(t, dir, "user space", qemuMicrovm(t, "256", elf, initrd, "")...))
	}
	t.Logf("moovm run  %v", ours)
	t.Logf("QEMU       %v", theirs)
	ratio := float64(median(ours)) / float64(median(theirs))
	t.Logf("medians %v and %v: %.2f of QEMU's", median(ours).Round(time.Millisecond), median(theirs).Round(time.Millisecond), ratio)
	if ratio > 1 {
		t.Error("slower than QEMU")
	}
}

// What the time to user space is spent on: variants of one boot, each with its
// exits to this program and its page faults.
func TestLongMachineBootCosts(t *testing.T) {
	long(t)
	needKVM(t)
	elf, zImage := elfKernel(t, kernel), fileKernel(t, kernel)
	pvh := elf
	pvh.Protocol = vmm.ProtocolPVH
	for _, v := range []struct {
		name   string
		kernel vmm.Kernel
		words  string
		change func(*vmm.Config)
	}{
		{"ELF, 64-bit entry", elf, "", nil},
		{"ELF, PVH", pvh, "", nil},
		{"bzImage: unpacks itself", zImage, "", nil},
		{"the AGP scan too", elf, "pci=early", func(c *vmm.Config) { c.Cmdline = strings.ReplaceAll(c.Cmdline, "pci=noearly ", "") }},
		{"no PCI", elf, "pci=off", nil},
		{"all messages on the console", elf, "", func(c *vmm.Config) { c.Cmdline = strings.ReplaceAll(c.Cmdline, "quiet ", "") }},
		{"4 processors", elf, "", func(c *vmm.Config) { c.CPUs = 4 }},
		{"4 GiB", elf, "", func(c *vmm.Config) { c.Memory = 4 << 30 }},
	} {
		var build, boot []time.Duration
		var exits map[string]uint64
		var faults int64
		for range 3 {
			before := minorFaults(t)
			start := time.Now()
			m := bootScript(t, v.kernel, "", func(c *vmm.Config) {
				c.Cmdline += " " + v.words
				if v.change != nil {
					v.change(c)
				}
			})
			build = append(build, time.Since(start))
			m.expect("user space")
			boot = append(boot, time.Since(start))
			exits, faults = m.Exits(), minorFaults(t)-before
			m.Close()
		}
		t.Logf("%-28s built in %v, user space after %v, exits %v, page faults %d",
			v.name, median(build).Round(time.Millisecond), median(boot).Round(time.Millisecond), exits, faults)
	}
}

func minorFaults(t *testing.T) int64 {
	t.Helper()
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		t.Fatal(err)
	}
	return r.Minflt
}

// Memory beside the guest's, with a disk and 9P, and what a guest costs that
// does nothing.
func TestLongMachineCosts(t *testing.T) {
	long(t)
	needKVM(t)
	dir := folder(t)
	c := start(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img", "--metrics", "unix:metrics",
		"--", "sh", "-c", "echo up; sleep 1000")
	c.expect("up")
	pid := c.cmd.Process.Pid
	time.Sleep(15 * time.Second) // whatever Debian and the Go runtime still do
	before, was := cpuTime(t, pid), metrics(t, filepath.Join(dir, "metrics"))
	const idle = 20 * time.Second
	time.Sleep(idle)
	share := 100 * float64(cpuTime(t, pid)-before) / float64(idle)
	exits := ""
	for name, n := range metrics(t, filepath.Join(dir, "metrics")) {
		if n -= was[name]; n > 0 && strings.HasPrefix(name, "moovm_exits_total") {
			exits += fmt.Sprintf(" %s %.1f", name, n/idle.Seconds())
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	kib := func(key string) int {
		for _, line := range strings.Split(string(status), "\n") {
			if rest, ok := strings.CutPrefix(line, key+":"); ok {
				n, _ := strconv.Atoi(strings.Fields(rest)[0])
				return n
			}
		}
		t.Fatalf("no %s in %s", key, status)
		return 0
	}
	anon, file := kib("RssAnon"), kib("RssFile")
	t.Logf("resident beside the guest's memory: %.1f MiB (%.1f its own, %.1f of its program file)",
		float64(anon+file)/1024, float64(anon)/1024, float64(file)/1024)
	t.Logf("an idle guest: %.2f %% of a core; exits to the program each second:%s", share, exits)
	if anon+file > 32<<10 {
		t.Error("more than twice what is aimed at")
	}
}

// cpuTime is what a process has used, all threads.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest) // from the state on
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// fio in the guest on a COW overlay, and in QEMU on a qcow2 overlay of the
// same base. fio comes from this machine by 9P.
func TestLongMachineDiskSpeed(t *testing.T) {
	long(t)
	needKVM(t)
	fio, err := exec.LookPath("fio")
	if err != nil {
		t.Skip("needs fio (apt-get install fio)")
	}
	dir := t.TempDir()
	data := filepath.Join(dir, "data.img")
	if out, err := exec.Command("sh", "-c", "head -c 256M /dev/urandom > "+data+" && qemu-img create -q -f qcow2 -F raw -b data.img "+dir+"/data.qcow2").CombinedOutput(); err != nil {
		t.Skipf("needs qemu-img (apt-get install qemu-utils): %v\n%s", err, out)
	}
	moovm(t, dir, "create", "-b", "data.img", "data.cow").wantStatus(t, 0)

	_, modules := kernelWithModules(t)
	resolved, err := modules.Resolve("virtio_pci", "virtio_mmio", "virtio_blk", "9p", "9pnet_virtio")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	script := ""
	for i, m := range resolved {
		name := fmt.Sprintf("m%02d.ko", i)
		files[name] = m.Path
		script += "insmod /" + name + "\n"
	}
	script += `mkdir /host; mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /host
mount --bind /dev /host/dev; mount --bind /proc /host/proc; mount -t tmpfs tmp /host/tmp
for rw in randread randwrite; do for depth in 1 16; do
	iops=$(chroot /host ` + fio + ` --name=x --filename=/dev/vda --direct=1 --rw=$rw --bs=4k --iodepth=$depth --ioengine=libaio --size=256m \
		--norandommap --time_based --ramp_time=1 --runtime=5 --output-format=terse --terse-version=3 | awk -F ';' '{print $8 + $49}')
	echo "fio $rw $depth $iops"
done; done
`
	initrd := filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrd, scriptInitrd(t, script, files), 0o666); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) map[string]float64 {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		got := map[string]float64{}
		for _, line := range strings.Split(string(out), "\n") {
			if f := strings.Fields(line); len(f) == 4 && f[0] == "fio" {
				got[f[1]+" "+f[2]], _ = strconv.ParseFloat(f[3], 64)
			}
		}
		if len(got) != 4 {
			t.Fatalf("%s: %v, %v\n%s", args[0], got, err, out)
		}
		return got
	}
	ours := run(moovmBin, "run", "--kernel", kernel, "--accel", "kvm", "--initrd", initrd, "--memory", "512M", "--disk", "data.cow", "--share", "host=/")
	theirs := run(qemuMicrovm(t, "512", elfFile(t, dir), initrd, "",
		"-drive", "file=data.qcow2,format=qcow2,if=none,id=d", "-device", "virtio-blk-device,drive=d",
		"-fsdev", "local,id=h,path=/,security_model=none,readonly=on,multidevs=remap", "-device", "virtio-9p-device,fsdev=h,mount_tag=host")...)
	for _, what := range []string{"randread 1", "randread 16", "randwrite 1", "randwrite 16"} {
		t.Logf("%-12s moovm %8.0f IOPS, QEMU %8.0f: %.2f times", what, ours[what], theirs[what], ours[what]/theirs[what])
	}
}
