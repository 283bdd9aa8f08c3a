package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/initramfs"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/vmm"
)

// needMachine skips a test where guests cannot run, and returns what they need.
func needMachine(t *testing.T) Config {
	t.Helper()
	k := testKernel(t)
	p, err := vmm.Probe(t.Context(), "")
	if err != nil || !p.Usable {
		t.Skipf("needs a KVM that runs real code; run it in the sandbox (here: %v %v)", p.Reason, err)
	}
	m, err := kmod.FindModules(k)
	if err != nil {
		t.Skip(err)
	}
	return Config{Kernel: k, Modules: m, Init: testInit(t), Memory: 256 << 20}
}

// fileBackend is a raw disk.
type fileBackend struct {
	*os.File
	size int64
}

func (f fileBackend) Flush() error { return f.Sync() }
func (f fileBackend) Size() int64  { return f.size }

func rawDisk(t *testing.T, path string) Disk {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return Disk{Backend: fileBackend{f, st.Size()}}
}

func sh(script string) *control.Command {
	return &control.Command{Args: []string{"/bin/busybox", "sh", "-c", script}}
}

func (c Config) boot(t *testing.T, timeout time.Duration) (r Result, stdout, stderr string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	r, err = Boot(ctx, c)
	t.Logf("%v: %+v %v", r.Took, r.Control, err)
	if testing.Verbose() {
		t.Logf("console:\n%s", strings.Join(r.Console, "\n"))
	}
	return r, out.String(), errs.String(), err
}

func TestBootCommand(t *testing.T) {
	c := needMachine(t)
	c.Files = []initramfs.File{{Name: "/bin/busybox", Mode: 0o755, HostPath: busybox(t)}}
	c.Command = sh("echo out; echo err >&2; ls /run/moovm; exit 7")
	r, stdout, stderr, err := c.boot(t, 2*time.Minute)
	if err != nil || r.ExitStatus != 7 || stdout != "out\ndisks\nversion\n" || stderr != "err\n" || r.Reason != vmm.PowerOff {
		t.Errorf("got %+v, stdout %q, stderr %q, %v", r, stdout, stderr, err)
	}
}

func TestBootDisk(t *testing.T) {
	c := needMachine(t)
	c.Disks = []Disk{rawDisk(t, ext4Image(t))}
	c.Command = sh("echo kept > /root/kept; cat /root/kept; head -c 100000 /dev/zero | sha256sum; kill -9 $$")
	c.Stdin = strings.NewReader("")
	r, stdout, _, err := c.boot(t, 2*time.Minute)
	if err != nil || r.ExitStatus != 137 || !strings.HasPrefix(stdout, "kept\n") {
		t.Errorf("got %+v, stdout %q, %v", r, stdout, err)
	}
}

func TestBootPanic(t *testing.T) {
	c := needMachine(t)
	c.Files = []initramfs.File{{Name: "/bin/busybox", Mode: 0o755, HostPath: busybox(t)}}
	for _, after := range []string{"-1", "0"} {
		c.Append = "panic=" + after
		c.Command = sh("echo c > /proc/sysrq-trigger; sleep 100")
		_, _, _, err := c.boot(t, 2*time.Minute)
		var p *PanicError
		if !errors.As(err, &p) || !strings.Contains(p.Cause, "sysrq triggered crash") || ExitStatus(Result{}, err) != 126 {
			t.Errorf("panic=%s: %v", after, err)
		}
	}
}

func TestBootTimeout(t *testing.T) {
	c := needMachine(t)
	c.Files = []initramfs.File{{Name: "/bin/busybox", Mode: 0o755, HostPath: busybox(t)}}
	c.Command = sh("sleep 1000")
	_, _, _, err := c.boot(t, 15*time.Second)
	if !errors.Is(err, context.DeadlineExceeded) || ExitStatus(Result{}, err) != 124 {
		t.Error(err)
	}
}

func TestBootNoRoot(t *testing.T) {
	c := needMachine(t)
	c.Disks = []Disk{rawDisk(t, ext4Image(t, "-L", "here"))}
	c.Append = "root=LABEL=elsewhere rootdelay=1"
	_, _, _, err := c.boot(t, 2*time.Minute)
	var g *control.GuestError
	if !errors.As(err, &g) || g.Kind != control.FailRoot || !strings.Contains(g.Message, "LABEL=here") {
		t.Error(err)
	}
}

// Much output arrives whole and in order, however slowly it is taken.
func TestBootOutput(t *testing.T) {
	c := needMachine(t)
	c.Files = []initramfs.File{{Name: "/bin/busybox", Mode: 0o755, HostPath: busybox(t)}}
	c.Command = sh("busybox time busybox seq 1 30000; echo end >&2")
	r, stdout, stderr, err := c.boot(t, 2*time.Minute)
	want := strings.Builder{}
	for i := 1; i <= 30000; i++ {
		fmt.Fprintln(&want, i)
	}
	if err != nil || r.ExitStatus != 0 || stdout != want.String() {
		t.Errorf("%v, status %d, %d bytes of stdout, want %d", err, r.ExitStatus, len(stdout), want.Len())
	}
	t.Logf("%d bytes: %s", len(stdout), stderr)
}
