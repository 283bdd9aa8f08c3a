package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/moovm/moovm/vmm"
)

// twinKernel is a guest that prints ready, waits until it is another machine,
// prints a letter or some and switches itself off.
func twinKernel() []byte {
	code := []byte{0xbb, 0, 0, 0, 0, 0x4c, 0x8b, 0x03, 0x66, 0xba, 0xf8, 0x03} // mov ebx, generation; mov r8, [rbx]; mov dx, 0x3f8
	binary.LittleEndian.PutUint32(code[1:], vmm.GenerationAddress)
	say := func(text string) {
		for _, c := range []byte(text) {
			code = append(code, 0xb0, c, 0xee) // mov al, c; out dx, al
		}
	}
	say("ready\n")
	code = append(code, 0x48, 0x8b, 0x03, 0x4c, 0x39, 0xc0, 0x74, 0xf8) // wait: mov rax, [rbx]; cmp rax, r8; je wait
	say("twin\n")
	code = append(code, 0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd) // S5; hlt
	const base, header = 1 << 20, 64 + 56
	le := binary.LittleEndian
	b := make([]byte, header, header+len(code))
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2)
	le.PutUint16(b[18:], 0x3e)
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[24:], base)
	le.PutUint64(b[32:], 64)
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 1)
	le.PutUint32(b[64:], 1)
	le.PutUint32(b[68:], 7)
	le.PutUint64(b[72:], header)
	le.PutUint64(b[80:], base)
	le.PutUint64(b[88:], base)
	le.PutUint64(b[96:], uint64(len(code)))
	le.PutUint64(b[104:], uint64(len(code)))
	return append(b, code...)
}

// needBareKVM skips a test where not even a guest without a kernel runs.
func needBareKVM(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("needs /dev/kvm: %v", err)
	}
	f.Close()
}

// bareSnapshot makes a snapshot of a guest without a kernel in dir/snap.
func bareSnapshot(t *testing.T, dir string, more ...string) (*snapshotRequest, error) {
	t.Helper()
	kernel := filepath.Join(dir, "twin")
	if err := os.WriteFile(kernel, twinKernel(), 0o644); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, "base.img")
	if _, err := os.Stat(disk); err != nil {
		if err := os.WriteFile(disk, bytes.Repeat([]byte("base"), 64<<10), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return bareRequest(t, append([]string{"--kernel", kernel, "--memory", "64M", "--disk", disk + ",format=raw", "--no-9p"}, more...)...)
}

func bareRequest(t *testing.T, args ...string) (*snapshotRequest, error) {
	t.Helper()
	m := &machineFlags{}
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	m.register(flags)
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	return newSnapshotRequest(flags, m, "unset", "ready", nil)
}

// take makes it, in dir/snap, or fails the test.
func takeBare(t *testing.T, dir string) string {
	t.Helper()
	needBareKVM(t)
	r, err := bareSnapshot(t, dir)
	if err != nil {
		t.Fatal(err)
	}
	r.dir = filepath.Join(dir, "snap")
	if err := r.here(t.Context(), &globals{quiet: true}); err != nil {
		t.Fatal(err)
	}
	return r.dir
}

// restoreBare runs the snapshot and returns what its guest says.
func restoreBare(t *testing.T, dir string) (string, error) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "console")
	m := &machineFlags{}
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	m.register(flags)
	if err := flags.Parse([]string{"--console", out, "--backing-root", filepath.Dir(dir)}); err != nil {
		t.Fatal(err)
	}
	r, err := newRestoreRequest(flags, m, dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	o, err := r.openRestore(t.Context())
	if err != nil {
		return "", err
	}
	defer o.Close(t.Context(), slog.Default())
	g := &globals{quiet: true, signals: catchInterrupts()}
	defer g.signals.Close()
	err = r.goOn(t.Context(), g, o)
	b, _ := os.ReadFile(out)
	return strings.TrimLeft(string(b), "\n"), err // it may have been frozen before that newline
}

// sumTree is what a folder holds, with modes and times.
func sumTree(t *testing.T, dir string) map[string]string {
	t.Helper()
	sums := map[string]string{}
	err := filepath.Walk(dir, func(path string, st os.FileInfo, err error) error {
		if err != nil || st.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		sums[path] = fmt.Sprintf("%x %v %v", sha256.Sum256(b), st.Mode(), st.ModTime())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return sums
}

// A snapshot is written and restored, several at a time, by the code of the two
// commands; nothing of it or of its base changes.
func TestSnapshotAndRestore(t *testing.T) {
	dir := t.TempDir()
	snap := takeBare(t, dir)
	before := sumTree(t, dir)
	for path, sum := range before {
		if strings.HasPrefix(path, snap) && !strings.Contains(sum, " -r-------- ") {
			t.Errorf("%s: %s", path, sum)
		}
	}
	said := make(chan string, 4)
	for range 4 {
		go func() {
			out, err := restoreBare(t, snap)
			said <- fmt.Sprint(out, err)
		}()
	}
	for range 4 {
		if got := <-said; got != "twin\n<nil>" {
			t.Errorf("a twin says %q", got)
		}
	}
	after := sumTree(t, dir)
	if len(before) != 6 || fmt.Sprint(before) != fmt.Sprint(after) {
		t.Errorf("before:\n%v\nafter:\n%v", before, after)
	}
	var out bytes.Buffer
	if err := snapshotInfo(&out, snap, false); err != nil || !strings.Contains(out.String(), "disk0.cow on "+filepath.Join(dir, "base.img")) {
		t.Errorf("%v\n%s", err, out.String())
	}
	out.Reset()
	var a snapshotAbout
	if err := snapshotInfo(&out, snap, true); err != nil || json.Unmarshal(out.Bytes(), &a) != nil || len(a.Disks) != 1 || a.Disks[0].Bases[0].Size != 256<<10 {
		t.Errorf("%v\n%s", err, out.String())
	}
	// There already.
	r, err := bareSnapshot(t, dir)
	if err != nil {
		t.Fatal(err)
	}
	r.dir = snap
	if err := r.here(t.Context(), &globals{quiet: true}); err == nil || !strings.Contains(err.Error(), "exists; name a folder that does not") {
		t.Errorf("over a snapshot: %v", err)
	}
}

// What does not fit is one sentence that names it.
func TestRestoreRefusals(t *testing.T) {
	dir := t.TempDir()
	snap := takeBare(t, dir)
	at := func(name string) string { return filepath.Join(snap, name) }
	edit := func(path string, f func([]byte) []byte) func() {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		st, _ := os.Stat(path)
		if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, f(bytes.Clone(b)), 0o600)); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := errors.Join(os.WriteFile(path, b, 0o600), os.Chtimes(path, st.ModTime(), st.ModTime())); err != nil {
				t.Fatal(err)
			}
		}
	}
	rename := func(path string) func() {
		if err := os.Rename(path, path+".away"); err != nil {
			t.Fatal(err)
		}
		return func() { _ = os.Rename(path+".away", path) }
	}
	// The state with its checksum made right again.
	resum := func(path, key string, change func(state string) string) func() {
		return edit(path, func(b []byte) []byte {
			var f map[string]json.RawMessage
			if err := json.Unmarshal(b, &f); err != nil {
				t.Fatal(err)
			}
			f[key] = json.RawMessage(change(string(f[key])))
			f["SHA256"] = json.RawMessage(fmt.Sprintf(`"%x"`, sha256.Sum256(f[key])))
			b, err := json.Marshal(f)
			if err != nil {
				t.Fatal(err)
			}
			return b
		})
	}
	ecx := regexp.MustCompile(`"Ecx":\d+`)
	for name, c := range map[string]struct {
		damage func() (undo func())
		want   string
	}{
		"changed base": {func() func() {
			return edit(filepath.Join(dir, "base.img"), func(b []byte) []byte { b[0]++; return b })
		}, "has changed since the snapshot was taken"},
		"shorter base": {func() func() {
			return edit(filepath.Join(dir, "base.img"), func(b []byte) []byte { return b[:512] })
		}, "has changed since the snapshot was taken"},
		"no base":          {func() func() { return rename(filepath.Join(dir, "base.img")) }, "a base of the snapshot is missing"},
		"missing layer":    {func() func() { return rename(at("disk0.cow")) }, "a layer of the snapshot is missing"},
		"no memory":        {func() func() { return rename(at("memory")) }, "no such file"},
		"no manifest":      {func() func() { return rename(at("snapshot.json")) }, "no such file"},
		"truncated memory": {func() func() { return edit(at("memory"), func(b []byte) []byte { return b[:len(b)-4096] }) }, "it has 67104768 bytes, the machine's memory 67108864"},
		"no JSON":          {func() func() { return edit(at("snapshot.json"), func(b []byte) []byte { return b[:len(b)/2] }) }, "it is no manifest of a snapshot"},
		"newer manifest": {func() func() {
			return resum(at("snapshot.json"), "Guest", func(s string) string { return strings.Replace(s, `"Version":1`, `"Version":7`, 1) })
		}, "its version is 7, this program knows 1"},
		"newer machine": {func() func() {
			return resum(at("machine.json"), "State", func(s string) string { return strings.Replace(s, `"Version":1`, `"Version":9`, 1) })
		}, "its version is 9, this program knows 1"},
		"other disks": {func() func() {
			return resum(at("snapshot.json"), "Guest", func(s string) string { return strings.Replace(s, `"disk0.cow"`, `"../disk0.cow"`, 1) })
		}, `a disk is called "../disk0.cow"`},
		"another processor": {func() func() {
			return resum(at("machine.json"), "State", func(s string) string { return ecx.ReplaceAllString(s, `"Ecx":4294967295`) })
		}, "this host cannot continue the snapshot"},
	} {
		t.Run(name, func(t *testing.T) {
			undo := c.damage()
			_, err := restoreBare(t, snap)
			undo()
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	// A base with another time and the same contents is the same base.
	base := filepath.Join(dir, "base.img")
	if err := os.Chtimes(base, time.Unix(1_000_000_000, 0), time.Unix(1_000_000_000, 0)); err != nil {
		t.Fatal(err)
	}
	if out, err := restoreBare(t, snap); err != nil || out != "twin\n" {
		t.Errorf("%q, %v", out, err)
	}
	// Each byte of the manifest.
	b, err := os.ReadFile(at("snapshot.json"))
	if err != nil {
		t.Fatal(err)
	}
	var want bytes.Buffer
	if err := snapshotInfo(&want, snap, true); err != nil {
		t.Fatal(err)
	}
	for i := range bytes.TrimRight(b, "\n") {
		other := bytes.Clone(b)
		other[i] ^= 1 << (i % 7)
		if err := os.WriteFile(at("snapshot.json"), other, 0o600); err != nil {
			t.Fatal(err)
		}
		// The names of fields may be written in capitals.
		var got bytes.Buffer
		if err := snapshotInfo(&got, snap, true); err == nil && got.String() != want.String() {
			t.Errorf("byte %d, %q for %q: it was taken: %s", i, other[i], b[i], got.String())
		}
	}
}

// saverEnv makes this test binary make a snapshot and be killed in it.
const saverEnv = "MOOVM_TEST_SNAPSHOT"

// A program that is killed at any moment while it saves leaves a whole folder or
// none that counts, and the next one cleans up.
func TestSnapshotKilled(t *testing.T) {
	if dir := os.Getenv(saverEnv); dir != "" {
		takeBare(t, dir)
		return
	}
	needBareKVM(t)
	kills := 20
	if os.Getenv("MOOVM_TEST_LONG") != "" {
		kills = 300
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	whole := 0
	for i := range kills {
		snap := filepath.Join(dir, "snap")
		cmd := exec.Command(self, "-test.run=^TestSnapshotKilled$")
		cmd.Env = append(os.Environ(), saverEnv+"="+dir, "GORACE=atexit_sleep_ms=0")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		reached := killAt(cmd, snap+".partial", i)
		if _, err := os.Lstat(snap); err != nil && !reached {
			t.Fatalf("kill %d: the program ended by itself, without a snapshot", i)
		} else if err == nil {
			whole++
			if out, err := restoreBare(t, snap); err != nil || out != "twin\n" {
				t.Fatalf("kill %d: what is there is not whole: %q, %v", i, out, err)
			}
			if err := os.RemoveAll(snap); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("%d kills, %d whole", kills, whole)
	takeBare(t, dir)
	if left, _ := filepath.Glob(filepath.Join(dir, "*.partial*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// killAt lets the program get to its i-th step, by the files that there are, and
// somewhat further. false says that it was never seen there.
func killAt(cmd *exec.Cmd, partial string, i int) (reached bool) {
	gone := make(chan struct{})
	go func() { _, _ = cmd.Process.Wait(); close(gone) }()
	want := []string{"", "disk0.cow", "memory", "machine.json", "snapshot.json"}[i%5]
	for {
		if _, err := os.Lstat(filepath.Join(partial, want)); err == nil {
			break
		}
		select {
		case <-gone:
			return false
		default:
			runtime.Gosched()
		}
	}
	for range (i / 5) * 2000 {
		runtime.Gosched()
	}
	_ = cmd.Process.Kill()
	<-gone
	return true
}
