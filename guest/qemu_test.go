package guest

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/initramfs"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kernel/kerneltest"
	"github.com/moovm/moovm/kmod"
)

// These tests boot the real init in QEMU's software emulation, which needs no
// KVM: a few seconds for each boot. They run when MOOVM_QEMU=1 and need
// qemu-system-x86_64, mke2fs, a static busybox and the kernel MOOVM_KERNEL
// with its modules:
//
//	MOOVM_QEMU=1 MOOVM_KERNEL=…/boot/vmlinuz-… go test ./guest -run QEMU

// qemuGuest is one boot.
type qemuGuest struct {
	config  control.InitConfig
	modules []string
	files   []initramfs.File
	disks   []string // raw images, by path
	qemu    []string // further arguments
	append  string
	stdin   io.Reader
}

type qemuResult struct {
	control.State
	stdout, stderr, console string
	warnings                []string
	err                     error
	took                    time.Duration
}

func needTool(t *testing.T, names ...string) {
	t.Helper()
	for _, n := range names {
		if _, err := exec.LookPath(n); err != nil {
			t.Skipf("%s is missing: apt-get install qemu-system-x86 e2fsprogs busybox-static", n)
		}
	}
}

func testKernel(t *testing.T) *kernel.Kernel {
	t.Helper()
	k, err := kernel.LoadKernel(kerneltest.Path(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func (g qemuGuest) run(t *testing.T) qemuResult {
	t.Helper()
	if os.Getenv("MOOVM_QEMU") == "" {
		t.Skip("MOOVM_QEMU is not set: set it to 1 to boot guests in QEMU's software emulation")
	}
	needTool(t, "qemu-system-x86_64", "busybox", "mke2fs")
	k := testKernel(t)
	dir := t.TempDir()
	a := &initramfs.Archive{Init: testInit(t), Config: &g.config, Files: g.files}
	if len(g.modules) > 0 {
		m, err := kmod.FindModules(k)
		if err != nil {
			t.Skip(err)
		}
		a.Modules, err = m.Resolve(g.modules...)
		if err != nil {
			t.Fatal(err)
		}
	}
	initrd, err := a.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	initrdPath, consolePath := filepath.Join(dir, "initrd"), filepath.Join(dir, "console")
	if err := os.WriteFile(initrdPath, initrd, 0o600); err != nil {
		t.Fatal(err)
	}
	kernelPath := k.ELFPath()
	if kernelPath == "" {
		t.Skip("the kernel cache cannot be written: set XDG_CACHE_HOME")
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	args := []string{"-accel", "tcg", "-cpu", "max", "-m", "512", "-display", "none", "-monitor", "none", "-no-reboot",
		"-nodefaults", "-kernel", kernelPath, "-initrd", initrdPath,
		"-append", strings.TrimSpace("console=ttyS0 panic=-1 quiet " + g.append),
		"-serial", "file:" + consolePath, "-serial", "unix:" + l.Addr().String()}
	for _, d := range g.disks {
		args = append(args, "-drive", "if=virtio,format=raw,file="+d)
	}
	start := time.Now()
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64", append(args, g.qemu...)...)
	var noise bytes.Buffer
	qemu.Stdout, qemu.Stderr = &noise, &noise
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	var res qemuResult
	var stdout, stderr bytes.Buffer
	c := control.NewHost(conn, conn, control.HostConfig{Stdin: g.stdin, Stdout: &stdout, Stderr: &stderr,
		OnWarning: func(s string) { res.warnings = append(res.warnings, s) }})
	res.err = c.Run()
	conn.Close()
	if err := qemu.Wait(); err != nil {
		t.Errorf("qemu: %v\n%s", err, noise.String())
	}
	console, _ := os.ReadFile(consolePath)
	res.State, res.stdout, res.stderr, res.console = c.State(), stdout.String(), stderr.String(), string(console)
	res.took = time.Since(start)
	t.Logf("%.1f s: %+v warnings %q", res.took.Seconds(), res.State, res.warnings)
	if res.console != "" {
		t.Logf("console: %q", res.console)
	}
	return res
}

func busybox(t *testing.T) string {
	t.Helper()
	p, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("busybox is missing: apt-get install busybox-static")
	}
	return p
}

// ext4Image makes a disk image with a busybox and what files says, without
// mounting it.
func ext4Image(t *testing.T, mkfs ...string) string {
	t.Helper()
	needTool(t, "mke2fs")
	tree := t.TempDir()
	for _, d := range []string{"bin", "dev", "proc", "sys", "run", "tmp", "root", "sbin"} {
		if err := os.Mkdir(filepath.Join(tree, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(busybox(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "bin/busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"sh", "cat", "sleep", "mount", "ls", "ps", "id", "stty", "ip", "poweroff", "head", "sha256sum", "dd", "tty"} {
		if err := os.Symlink("busybox", filepath.Join(tree, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	img := filepath.Join(t.TempDir(), "disk.img")
	args := append([]string{"-q", "-t", "ext4", "-d", tree}, mkfs...)
	if out, err := exec.Command("mke2fs", append(args, img, "64M")...).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	return img
}

func TestQEMUCommandInInitramfs(t *testing.T) {
	r := qemuGuest{
		// The share is not there, so the serial port has to do.
		config: control.InitConfig{Control: "/dev/ttyS1", ControlShare: control.ShareTag, Command: &control.Command{Args: []string{"/bin/busybox", "sh", "-c", "echo out; echo err >&2; exit 7"}}},
		files:  []initramfs.File{{Name: "/bin/busybox", Mode: 0o755, HostPath: busybox(t)}},
	}.run(t)
	if !r.Hello || !r.Started || !r.Exited || r.Status != 7 || !r.Bye || r.stdout != "out\n" || r.stderr != "err\n" {
		t.Errorf("got %+v, stdout %q, stderr %q", r.State, r.stdout, r.stderr)
	}
}

func TestQEMUCommandOnDisk(t *testing.T) {
	img := ext4Image(t, "-L", "rootfs")
	input := strings.Repeat("0123456789abcdef\n", 1000)
	r := qemuGuest{
		config: control.InitConfig{Control: "/dev/ttyS1", Root: &control.Root{Device: "LABEL=rootfs"},
			Command: &control.Command{Args: []string{"sh", "-c", "pwd; echo $X; cat > /root/written; cat /root/written; (sleep 100 &); kill -TERM $$"}, Env: []string{"X=y z"}, Dir: "/root"}},
		modules: []string{"virtio_pci", "virtio_blk", "ext4"},
		disks:   []string{img},
		stdin:   strings.NewReader(input),
	}.run(t)
	if !r.Exited || r.Signal != 15 || r.Status != 143 || !r.Bye || r.stdout != "/root\ny z\n"+input {
		t.Errorf("got %+v, %d bytes of stdout", r.State, len(r.stdout))
	}
	out, err := exec.Command("e2fsck", "-fn", img).CombinedOutput()
	if err != nil || strings.Contains(string(out), "recovering journal") {
		t.Errorf("the file system is not clean: %v\n%s", err, out)
	}
}

func TestQEMUTerminal(t *testing.T) {
	r := qemuGuest{
		config: control.InitConfig{Control: "/dev/ttyS1", Hostname: "box", Command: &control.Command{
			Args: []string{"/bin/busybox", "sh", "-c", "busybox tty; busybox stty size; busybox hostname; read x; echo got $x; read y || echo eof"},
			Env:  []string{"PATH=/bin", "TERM=xterm"}, Terminal: true, Rows: 33, Columns: 101}},
		files: []initramfs.File{{Name: "/bin/busybox", Mode: 0o755, HostPath: busybox(t)}},
		stdin: strings.NewReader("hello\n"),
	}.run(t)
	want := []string{"/dev/pts/0", "33 101", "box", "got hello", "eof"}
	for _, w := range want {
		if !strings.Contains(r.stdout, w+"\r\n") {
			t.Errorf("no %q in %q", w, r.stdout)
		}
	}
	if !r.Exited || r.Status != 0 {
		t.Errorf("got %+v", r.State)
	}
}

func TestQEMUCannotStart(t *testing.T) {
	for name, c := range map[string]struct {
		command control.Command
		status  int
		text    string
	}{
		"missing":    {control.Command{Args: []string{"nonesuch"}}, 127, "nonesuch: not found in the guest"},
		"not a file": {control.Command{Args: []string{"/bin"}}, 126, "/bin cannot be run in the guest"},
		"folder":     {control.Command{Args: []string{"/bin/busybox"}, Dir: "/nowhere"}, 127, "no working folder /nowhere"},
	} {
		t.Run(name, func(t *testing.T) {
			r := qemuGuest{
				config: control.InitConfig{Control: "/dev/ttyS1", Command: &c.command},
				files:  []initramfs.File{{Name: "/bin/busybox", Mode: 0o755, HostPath: busybox(t)}},
			}.run(t)
			f := r.Failure
			if f == nil || f.Kind != control.FailCommand || f.Status != c.status || !strings.Contains(f.Message, c.text) || r.Exited || !r.Bye {
				t.Errorf("got %+v", r.State)
			}
			if !strings.Contains(r.console, c.text) {
				t.Errorf("the console says %q", r.console)
			}
		})
	}
}

func TestQEMUReadOnlyDisk(t *testing.T) {
	img := ext4Image(t)
	r := qemuGuest{
		config: control.InitConfig{Control: "/dev/ttyS1", Root: &control.Root{Device: "SERIAL=the-root"},
			Command: &control.Command{Args: []string{"sh", "-c", "echo x > /file; echo y > /tmp/file && cat /tmp/file; exit 3"}}},
		modules: []string{"virtio_pci", "virtio_blk", "ext4"},
		qemu: []string{"-blockdev", "driver=file,node-name=d,read-only=on,filename=" + img,
			"-device", "virtio-blk-pci,drive=d,serial=the-root"},
	}.run(t)
	if r.Status != 3 || r.stdout != "y\n" || !strings.Contains(r.stderr, "Read-only file system") || !r.Bye {
		t.Errorf("got %+v, stdout %q, stderr %q", r.State, r.stdout, r.stderr)
	}
}

func TestQEMUOverlay(t *testing.T) {
	img := ext4Image(t)
	before, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	r := qemuGuest{
		config: control.InitConfig{Control: "/dev/ttyS1", Root: &control.Root{Device: "/dev/vda", ReadOnly: true, Overlay: true},
			Command: &control.Command{Args: []string{"sh", "-c", "echo x > /root/file && cat /root/file"}}},
		modules: []string{"virtio_pci", "virtio_blk", "ext4", "overlay"},
		disks:   []string{img},
	}.run(t)
	if !r.Exited || r.Status != 0 || r.stdout != "x\n" {
		t.Errorf("got %+v, stdout %q", r.State, r.stdout)
	}
	if after, err := os.ReadFile(img); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the disk changed (%v)", err)
	}
}

func TestQEMUNoInit(t *testing.T) {
	r := qemuGuest{
		config:  control.InitConfig{Control: "/dev/ttyS1", Root: &control.Root{Device: "/dev/vda"}, Init: "/lib/systemd/systemd"},
		modules: []string{"virtio_pci", "virtio_blk", "ext4"},
		disks:   []string{ext4Image(t)},
	}.run(t)
	if f := r.Failure; f == nil || f.Kind != control.FailInit || !strings.Contains(f.Message, "/lib/systemd/systemd") {
		t.Errorf("got %+v", r.State)
	}
}

// A disk's own init takes over as PID 1, with /run as it was left.
func TestQEMUHandOver(t *testing.T) {
	img := ext4Image(t)
	script := "#!/bin/sh\necho pid $$ > /dev/ttyS0\nmount > /dev/ttyS0\nls /moovm > /dev/ttyS0 2>&1\n/bin/busybox poweroff -f\n"
	dbg := exec.Command("debugfs", "-w", "-f", "-", img)
	file := filepath.Join(t.TempDir(), "init")
	if err := os.WriteFile(file, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	dbg.Stdin = strings.NewReader("write " + file + " sbin/init\nset_inode_field sbin/init mode 0100755\n")
	if out, err := dbg.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	r := qemuGuest{
		config:  control.InitConfig{Control: "/dev/ttyS1", Root: &control.Root{Device: "/dev/vda"}},
		modules: []string{"virtio_pci", "virtio_blk", "ext4"},
		disks:   []string{img},
	}.run(t)
	if !r.Started || r.Failure != nil {
		t.Errorf("got %+v", r.State)
	}
	for _, want := range []string{"pid 1\r\n", "/dev/vda on / type ext4", "tmpfs on /run type tmpfs", "devtmpfs on /dev ", "/moovm: No such file"} {
		if !strings.Contains(r.console, want) {
			t.Errorf("no %q on the console: %s", want, r.console)
		}
	}
}
