package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/guest/sharefs"
	"github.com/moovm/moovm/initramfs"
	"github.com/moovm/moovm/virtioblk"
	"github.com/moovm/moovm/vmm"
)

// moovm run needs neither root nor privileges, but access to /dev/kvm; it
// confines all of its threads before the guest runs; and its counters can be
// read meanwhile.
func TestMachineConfined(t *testing.T) {
	needKVM(t)
	if os.Getuid() != 0 {
		t.Skip("needs root, to become nobody; run `make test-e2e`, which runs it in the sandbox")
	}
	dir := folder(t)
	share := filepath.Join(dir, "share")
	for _, d := range []string{share, filepath.Join(dir, "tmp"), filepath.Join(dir, "kernel")} {
		if err := os.Mkdir(d, 0o777); err != nil {
			t.Fatal(err)
		}
		os.Chmod(d, 0o777)
	}
	// Where nobody can reach it: t.TempDir and the caches are not for them.
	for d := dir; d != "/"; d = filepath.Dir(d) {
		os.Chmod(d, 0o777)
	}
	tree := filepath.Dir(filepath.Dir(kernel))
	if err := syscall.Mount(tree, filepath.Join(dir, "kernel"), "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer syscall.Unmount(filepath.Join(dir, "kernel"), syscall.MNT_DETACH)
	program := filepath.Join(dir, "moovm")
	if out, err := exec.Command("cp", moovmBin, program).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.Chmod("/dev/kvm", 0o666); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	const nobody = 65534
	c := &console{t: t, done: make(chan error, 1), more: make(chan struct{}, 1)}
	c.cmd = exec.CommandContext(ctx, program, "run", "--kernel", filepath.Join(dir, "kernel", "boot", filepath.Base(kernel)),
		"--accel", "kvm", "--base", "base.img", "--share", "s=share,rw", "--metrics", "unix:tmp/metrics", "--cpus", "2",
		"--", "sh", "-c", "echo guest > /mnt/s/file; head -c 100000 /dev/vda | wc -c; echo up; read line; exit 7")
	c.cmd.Dir = dir
	c.cmd.Env = append(os.Environ(), "TMPDIR="+filepath.Join(dir, "tmp"), "HOME=/nonexistent")
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody, Groups: []uint32{}}}
	c.cmd.Stdout, c.cmd.Stderr = c, &c.errs
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { c.done <- c.cmd.Wait() }()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("stderr:\n%s", c.errs.String())
		}
	})
	c.expect("up")

	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", c.cmd.Process.Pid))
	if err != nil || len(threads) < 3 {
		t.Fatalf("%d threads, %v", len(threads), err)
	}
	for _, path := range threads {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		for _, want := range []string{`NoNewPrivs:\s1\n`, `Seccomp:\s2\n`, `Uid:\s65534\s`, `CapEff:\s0+\n`} {
			if !regexp.MustCompile(want).Match(b) {
				t.Errorf("%s lacks %s:\n%s", path, want, b)
			}
		}
	}

	values := metrics(t, filepath.Join(dir, "tmp", "metrics"))
	for _, name := range []string{
		`moovm_state{state="running"}`, `moovm_vcpu_seconds_total{vcpu="1"}`, `moovm_exits_total{vcpu="0",kind="io"}`,
		`moovm_disk_bytes_total{disk="vda",op="read"}`, `moovm_share_requests_total{tag="s"}`, `moovm_memory_used_bytes`,
	} {
		if values[name] <= 0 {
			t.Errorf("%s is %v in:\n%v", name, values[name], values)
		}
	}

	c.send("go")
	if status := c.wait(); status != 7 {
		t.Errorf("exit status %d", status)
	}
	if got, err := os.ReadFile(filepath.Join(share, "file")); err != nil || string(got) != "guest\n" {
		t.Errorf("the share has %q, %v", got, err)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "tmp")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// metrics are the values of a machine's counters, by name and labels.
func metrics(t *testing.T, socket string) map[string]float64 {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}
	r, err := client.Get("http://machine/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	values := make(map[string]float64)
	lines := bufio.NewScanner(r.Body)
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), " ")
		if !ok || name == "#" {
			continue
		}
		if values[name], err = strconv.ParseFloat(value, 64); err != nil {
			t.Errorf("%s: %v", lines.Text(), err)
		}
	}
	if err := lines.Err(); err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%s, %v", r.Status, err)
	}
	return values
}

// The first interrupt of a machine without a command presses its power button;
// the second stops it.
func TestMachinePowerButton(t *testing.T) {
	needKVM(t)
	dir := t.TempDir()
	modules := map[string]string{}
	tree := filepath.Join(filepath.Dir(filepath.Dir(kernel)), "lib", "modules")
	for _, m := range []string{"kernel/drivers/acpi/button.ko", "kernel/drivers/input/evdev.ko"} {
		found, _ := filepath.Glob(filepath.Join(tree, "*", m))
		if len(found) == 0 {
			t.Skipf("needs the kernel's module %s", m)
		}
		modules[filepath.Base(m)] = found[0]
	}
	initrd := scriptInitrd(t, `
insmod /button.ko; insmod /evdev.ko
grep . /sys/class/input/*/name
case "$(cat /proc/cmdline)" in *deaf*) echo up; while :; do sleep 100; done;; esac
(sleep 60; cat /proc/interrupts) &
exec 3< /dev/input/event0 # what nobody listens to is lost
echo up
head -c 1 <&3 > /dev/null
echo pressed`, modules)
	if err := os.WriteFile(filepath.Join(dir, "initrd"), initrd, 0o666); err != nil {
		t.Fatal(err)
	}
	run := func(more ...string) *console {
		return start(t, dir, append([]string{"run", "--kernel", kernel, "--accel", "kvm", "--initrd", "initrd", "--memory", "256M"}, more...)...)
	}
	interrupt := func(c *console, s os.Signal) {
		t.Helper()
		if err := c.cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM} {
		polite := run()
		polite.expect("up")
		interrupt(polite, s)
		polite.expect("pressed")
		if status := polite.wait(); status != 0 {
			t.Errorf("%v: exit status %d", s, status)
		}
		if !strings.Contains(polite.errs.String(), "asked to power off") {
			t.Errorf("%v: stderr %q", s, polite.errs.String())
		}
	}
	deaf := run("--append", "deaf")
	deaf.expect("up")
	interrupt(deaf, syscall.SIGINT)
	time.Sleep(time.Second)
	interrupt(deaf, syscall.SIGINT)
	if status := deaf.wait(); status != 130 {
		t.Errorf("exit status %d after two interrupts", status)
	}
}

// As many disks as a machine takes for certain, and several shares.
func TestMachineDisks(t *testing.T) {
	needKVM(t)
	k, modules := kernelWithModules(t)
	for _, transport := range []vmm.Transport{vmm.TransportPCI, vmm.TransportMMIO} {
		t.Run(fmt.Sprint(transport), func(t *testing.T) {
			var out strings.Builder
			c := guest.Config{
				Kernel: k, Modules: modules, Init: moovmBin, NoRoot: true, Transport: transport, Memory: 512 << 20, Stdout: &out, Stderr: &out,
				Files: []initramfs.File{{Name: "bin/busybox", Mode: 0o755, HostPath: busybox}},
				Command: &control.Command{Args: []string{"/bin/busybox", "sh", "-c", `
					bb=/bin/busybox
					for d in /sys/block/vd*; do d=${d##*/}; echo "$d $($bb cat /sys/block/$d/ro) $($bb head -c 8 /dev/$d)"; done
					for i in 0 1 2 3; do $bb cat /share/$i/name; done`}},
			}
			const disks = 24
			for i := range disks {
				d := virtioblk.NewRAM(1 << 20)
				if _, err := d.WriteAt(fmt.Appendf(nil, "disk %03d", i), 0); err != nil {
					t.Fatal(err)
				}
				c.Disks = append(c.Disks, guest.Disk{Backend: d, ReadOnly: i%2 == 1})
			}
			for i := range 4 {
				dir := t.TempDir()
				if err := os.WriteFile(filepath.Join(dir, "name"), fmt.Appendf(nil, "share %d\n", i), 0o666); err != nil {
					t.Fatal(err)
				}
				s, err := sharefs.New(dir, sharefs.Options{})
				if err != nil {
					t.Fatal(err)
				}
				defer s.Close()
				c.Shares = append(c.Shares, guest.Share{Tag: fmt.Sprint("s", i), Attacher: s, Target: fmt.Sprint("/share/", i), ReadOnly: true})
			}
			r, err := guest.Boot(timeoutContext(t), c)
			if err != nil || r.ExitStatus != 0 {
				t.Fatalf("%v, status %d\n%s", err, r.ExitStatus, out.String())
			}
			for i := range disks {
				if want := fmt.Sprintf("vd%c %d disk %03d\n", 'a'+i, i%2, i); !strings.Contains(out.String(), want) {
					t.Errorf("no %q in:\n%s", want, out.String())
				}
			}
			for i := range 4 {
				if want := fmt.Sprintf("share %d\n", i); !strings.Contains(out.String(), want) {
					t.Errorf("no %q in:\n%s", want, out.String())
				}
			}
		})
	}
}
