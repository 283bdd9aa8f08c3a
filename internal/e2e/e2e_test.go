package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/vmm"
)

// patience is how long anything may take before a test gives up; boots in the
// sandbox take seconds, systemd well under two minutes. The tests that take
// minutes have more of it.
var patience = 4 * time.Minute

var moovmBin, kernel, base string

func TestMain(m *testing.M) {
	harnessHook(m) // before: guests of the harness have a process 1 of their own
	shareHook()
	if os.Getenv("MOOVM_TEST_LONG") != "" {
		patience = 35 * time.Minute
	}
	moovmBin, kernel, base = os.Getenv("MOOVM_BIN"), os.Getenv("MOOVM_KERNEL"), os.Getenv("MOOVM_BASE")
	status := m.Run()
	if moovmBin != "" {
		if image, err := localBase(); err == nil {
			os.RemoveAll(filepath.Dir(image))
		}
	}
	os.Exit(status)
}

// needKVM skips a test where guests cannot run.
func needKVM(t *testing.T) {
	t.Helper()
	if moovmBin == "" || kernel == "" || base == "" {
		t.Skip("needs MOOVM_BIN, MOOVM_KERNEL and MOOVM_BASE; run `make test-e2e`, which sets them")
	}
	p, err := vmm.Probe(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if !p.Usable {
		t.Skipf("needs a KVM that runs real code; run `make test-e2e`, which brings one (here: %s)", p.Reason)
	}
}

// result is how a moovm process ended.
type result struct {
	stdout, stderr string
	status         int
}

func (r result) String() string {
	return fmt.Sprintf("exit status %d\n--- stdout\n%s\n--- stderr\n%s", r.status, r.stdout, r.stderr)
}

// command prepares a moovm process in dir.
func command(ctx context.Context, dir string, args ...string) *exec.Cmd {
	return program(ctx, dir, moovmBin, args...)
}

func program(ctx context.Context, dir, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// moovm runs the program to its end.
func moovm(t *testing.T, dir string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := command(ctx, dir, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("moovm %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	r := result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
	t.Logf("moovm %s: status %d after %v", strings.Join(args, " "), r.status, time.Since(start).Round(time.Millisecond))
	return r
}

// wantStatus fails the test unless the process ended with the status.
func (r result) wantStatus(t *testing.T, status int) {
	t.Helper()
	if r.status != status {
		t.Fatalf("exit status %d, want %d\n%v", r.status, status, r)
	}
}

// wantStderr fails unless stderr has the text.
func (r result) wantStderr(t *testing.T, text string) {
	t.Helper()
	if !strings.Contains(r.stderr, text) {
		t.Fatalf("stderr lacks %q\n%v", text, r)
	}
}

// folder returns an empty folder with base.img in it: a name of its own for
// the shared base image.
func folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	linkBase(t, dir)
	return dir
}

// localBase is the base image on the file system of the tests' folders, so
// that each test can have it by a hard link.
var localBase = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "moovm-e2e-")
	if err != nil {
		return "", err
	}
	out, err := exec.Command("tar", "-C", dir, "-xf", base).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("unpack the base image %s: %v\n%s", base, err, out)
	}
	images, err := filepath.Glob(filepath.Join(dir, "*.img"))
	if err != nil || len(images) != 1 {
		return "", fmt.Errorf("%s holds %q; one image was expected", base, images)
	}
	return images[0], nil
})

// linkBase makes dir/base.img the shared base image, or a copy of it on
// another file system.
func linkBase(t *testing.T, dir string) {
	t.Helper()
	image, err := localBase()
	if err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(dir, "base.img")
	if os.Link(image, target) == nil {
		return
	}
	if out, err := exec.Command("cp", "--sparse=always", "--preserve=timestamps", image, target).CombinedOutput(); err != nil {
		t.Fatalf("copy the base image: %v\n%s", err, out)
	}
}

// overlay makes dir/root.cow over dir/base.img.
func overlay(t *testing.T, dir string) string {
	t.Helper()
	moovm(t, dir, "create", "-b", "base.img", "root.cow").wantStatus(t, 0)
	return filepath.Join(dir, "root.cow")
}

// runArgs is `moovm run` on dir's overlay.
func runArgs(args ...string) []string {
	return append([]string{"run", "--kernel", kernel, "--accel", "kvm", "--disk", "root.cow"}, args...)
}

// sh is the tail of a command line that runs a script in the guest.
func sh(script string) []string { return []string{"--", "sh", "-ec", script} }

// checksum is of a file's data and where it lies; holes cost nothing, which
// matters on an emulated processor.
func checksum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	for end := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return fmt.Sprintf("%08x", h.Sum32())
		} else if err != nil {
			t.Fatal(err)
		}
		if end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(h, "%d-%d:", start, end)
		if _, err := io.Copy(h, io.NewSectionReader(f, start, end-start)); err != nil {
			t.Fatal(err)
		}
	}
}

func sha256Text(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

func execOutput(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	return string(out), err
}

// fsck fails unless e2fsck finds the flattened disk clean. With replayJournal,
// the journal may be replayed first.
func fsck(t *testing.T, dir, image string, replayJournal bool) {
	t.Helper()
	raw := filepath.Join(dir, "flat.img")
	os.Remove(raw)
	moovm(t, dir, "flatten", image, raw).wantStatus(t, 0)
	defer os.Remove(raw)
	if replayJournal {
		// Status 1: errors corrected; what was corrected is checked below.
		out, err := exec.Command("e2fsck", "-E", "journal_only", "-p", raw).CombinedOutput()
		var exit *exec.ExitError
		if err != nil && (!errors.As(err, &exit) || exit.ExitCode() > 1) {
			t.Fatalf("e2fsck could not replay the journal: %v\n%s", err, out)
		}
	}
	out, err := exec.Command("e2fsck", "-f", "-n", raw).CombinedOutput()
	if err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
}

// console is a running guest whose serial line the test reads and types on.
type console struct {
	t    *testing.T
	cmd  *exec.Cmd
	in   io.WriteCloser
	done chan error

	mu   sync.Mutex
	text strings.Builder
	from int // where the next expect begins
	more chan struct{}
	errs bytes.Buffer
}

// start runs moovm with its console on pipes.
func start(t *testing.T, dir string, args ...string) *console {
	t.Helper()
	return startProgram(t, dir, moovmBin, args...)
}

func startProgram(t *testing.T, dir, name string, args ...string) *console {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	c := &console{t: t, cmd: program(ctx, dir, name, args...), done: make(chan error, 1), more: make(chan struct{}, 1)}
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	c.cmd.Stdout = c
	c.cmd.Stderr = &c.errs
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { c.done <- c.cmd.Wait() }()
	t.Cleanup(func() {
		cancel()
		if c.cmd.ProcessState == nil {
			<-c.done
		}
		if t.Failed() {
			t.Logf("console:\n%s\nstderr:\n%s", c.output(), c.errs.String())
		}
	})
	return c
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.text.Write(p)
	c.mu.Unlock()
	select {
	case c.more <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (c *console) output() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

// expect waits until the text appears after what was expected before.
func (c *console) expect(text string) {
	c.t.Helper()
	timeout := time.After(patience)
	for {
		c.mu.Lock()
		i := strings.Index(c.text.String()[c.from:], text)
		if i >= 0 {
			c.from += i + len(text)
		}
		c.mu.Unlock()
		if i >= 0 {
			return
		}
		select {
		case <-c.more:
		case err := <-c.done:
			c.done <- err
			c.t.Fatalf("the guest ended (%v) before it said %q", err, text)
		case <-timeout:
			c.t.Fatalf("no %q after %v", text, patience)
		}
	}
}

func (c *console) send(line string) {
	c.t.Helper()
	if _, err := io.WriteString(c.in, line+"\n"); err != nil {
		c.t.Fatalf("type %q: %v", line, err)
	}
}

// wait returns the exit status once the process has ended by itself.
func (c *console) wait() int {
	c.t.Helper()
	select {
	case err := <-c.done:
		c.done <- err
		return c.cmd.ProcessState.ExitCode()
	case <-time.After(patience):
		c.t.Fatal("the machine did not end")
		return -1
	}
}
