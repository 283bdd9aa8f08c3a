//go:build linux

package cowdisk

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// killEnv tells the test binary to be the victim: "TOOL IMAGE CALL". It kills itself (SIGKILL) before the file-system call of that number.
const killEnv = "MOOVM_COWDISK_KILL"

// killFS counts calls.
type killFS struct {
	HostFS
	left *atomic.Int64
}

func (k killFS) tick() {
	if k.left.Add(-1) == 0 {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

type killFile struct {
	NewFile
	k    killFS
	path string
}

// Touch sets a time in a later second at once, so that Commit need not wait for one.
func (f killFile) Touch() error {
	f.k.tick()
	st, err := f.NewFile.Stat()
	if err != nil {
		return err
	}
	return os.Chtimes(f.path, time.Time{}, st.ModTime.Add(time.Second))
}

// onlyFile gives an open file the methods of a new one.
type onlyFile struct{ File }

func (onlyFile) Publish(bool, bool) error { return errors.ErrUnsupported }

func (k killFS) Open(p string, m OpenMode) (File, error) {
	f, err := k.HostFS.Open(p, m)
	if err != nil {
		return nil, err
	}
	return killFile{onlyFile{f}, k, p}, nil
}

func (k killFS) OpenBeneath(root, rel string, m OpenMode) (File, error) {
	f, err := k.HostFS.OpenBeneath(root, rel, m)
	if err != nil {
		return nil, err
	}
	return killFile{onlyFile{f}, k, filepath.Join(root, rel)}, nil
}

func (k killFS) Create(p string) (NewFile, error) {
	k.tick()
	f, err := k.HostFS.Create(p)
	if err != nil {
		return nil, err
	}
	return killFile{f, k, p}, nil
}

func (f killFile) WriteAt(p []byte, off int64) (int, error) {
	f.k.tick()
	return f.NewFile.WriteAt(p, off)
}
func (f killFile) WritevAt(b [][]byte, off int64) (int, error) {
	f.k.tick()
	return f.NewFile.WritevAt(b, off)
}
func (f killFile) Sync() error                  { f.k.tick(); return f.NewFile.Sync() }
func (f killFile) Truncate(n int64) error       { f.k.tick(); return f.NewFile.Truncate(n) }
func (f killFile) PunchHole(off, n int64) error { f.k.tick(); return f.NewFile.PunchHole(off, n) }
func (f killFile) Publish(replace, durable bool) error {
	f.k.tick()
	return f.NewFile.Publish(replace, durable)
}

const killDisk = 64 * 4096

// killChild runs one tool, or writes for ever, and tells on stdout what it has done.
func killChild() {
	f := strings.Fields(os.Getenv(killEnv))
	n, _ := strconv.ParseInt(f[2], 10, 64)
	k := killFS{left: &atomic.Int64{}}
	k.left.Store(n)
	err := runKillTool(f[0], f[1], Options{FS: k}, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func runKillTool(tool, img string, fs Options, w io.Writer) error {
	fs.Format = FormatCOW
	o := ToolOptions{Options: fs}
	ctx := context.Background()
	out := filepath.Join(filepath.Dir(img), "out")
	switch tool {
	case "commit":
		return Commit(ctx, img, o)
	case "rebase":
		return Rebase(ctx, img, "other", o)
	case "resize":
		return Resize(ctx, img, killDisk*2, false, o)
	case "flatten":
		os.Remove(out)
		return Flatten(ctx, img, out, VariantUnknown, o)
	case "create":
		os.Remove(out)
		return Create(out, CreateOptions{Backing: "base", FS: fs.FS})
	case "pending":
		return pendingChild(img, w)
	case "write":
		d, err := Open(img, fs)
		if err != nil {
			return err
		}
		for i := range 100000 {
			fmt.Fprintf(w, "begin %d\n", i)
			if err := killWrite(d, i); err != nil {
				return err
			}
			fmt.Fprintf(w, "end %d\n", i)
		}
	}
	return nil
}

// killWrite is the i-th operation of the writer: the same in the victim and in the model.
func killWrite(d *Disk, i int) error {
	off, p, flush := killOp(i)
	if flush {
		return d.Flush()
	}
	_, err := d.WriteAt(p, int64(off))
	return err
}

func killOp(i int) (off int, p []byte, flush bool) {
	r := rand.New(rand.NewPCG(uint64(i), 7))
	off = r.IntN(killDisk/512) * 512
	return off, randomBytes(min(r.IntN(20)*512+512, killDisk-off), uint64(i)), i%5 == 4
}

// A process is killed at a random call, hundreds of times: the image opens, its contents are those it must have, nothing is left lying
// about, and running the command again completes it.
func TestKill(t *testing.T) {
	if testing.Short() {
		t.Skip("starts many processes; run without -short")
	}
	times := 16
	if raceEnabled {
		times = 2
	}
	if os.Getenv("MOOVM_TEST_LONG") != "" || os.Getenv("MOOVM_SOAK") != "" {
		times = 100
	}
	for _, tool := range []struct {
		name  string
		calls int // about as many as it makes
	}{{"commit", 60}, {"rebase", 40}, {"resize", 30}, {"flatten", 25}, {"create", 5}, {"write", 150}} {
		t.Run(tool.name, func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(uint64(len(tool.name)), 3))
			for range times {
				killOnce(t, tool.name, 1+r.IntN(tool.calls))
			}
		})
	}
}

func killOnce(t *testing.T, tool string, call int) {
	dir := t.TempDir()
	defer os.RemoveAll(dir)
	img, out := filepath.Join(dir, "img"), filepath.Join(dir, "out")
	base := randomBytes(killDisk, 1)
	writeFile(t, filepath.Join(dir, "base"), base)
	writeFile(t, filepath.Join(dir, "other"), randomBytes(killDisk/2, 2))
	mustCreate(t, img, CreateOptions{Backing: "base"})
	d := mustOpen(t, img, Options{})
	m := newModel(base)
	for i := range 8 {
		p := randomBytes(4096*3, uint64(i)+50)
		m.write(i*7*4096, p)
		if _, err := d.WriteAt(p, int64(i*7*4096)); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	m.flushed()
	cmd := toolCommand(t, os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %d", killEnv, tool, img, call))
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && stderr.Len() > 0 {
		t.Fatalf("%s, call %d: %v: %s", tool, call, err, &stderr)
	}
	for s := bufio.NewScanner(&stdout); s.Scan(); {
		var what string
		var i int
		fmt.Sscan(s.Text(), &what, &i)
		off, p, flush := killOp(i)
		if what == "begin" && !flush {
			m.write(off, p)
		} else if what == "end" && flush {
			m.flushed()
		}
	}
	verify := func(when string) {
		t.Helper()
		b, err := readAll(img, Options{})
		if err != nil {
			t.Fatalf("%s killed at call %d, %s: %v", tool, call, when, err)
		}
		if len(b) != killDisk && tool != "resize" {
			t.Fatalf("%s killed at call %d, %s: %d bytes", tool, call, when, len(b))
		}
		if err := m.verify(b[:killDisk]); err != nil {
			t.Fatalf("%s killed at call %d, %s: %v", tool, call, when, err)
		}
		if r, err := Check(t.Context(), img, false, ToolOptions{}); err != nil || !r.Clean() {
			t.Fatalf("%s killed at call %d, %s: check: %+v %v", tool, call, when, r, err)
		}
	}
	verify("then")
	if b, err := readAll(out, Options{}); err == nil && len(b) != killDisk {
		t.Fatalf("%s killed at call %d: a part of its output appeared: %d bytes", tool, call, len(b))
	}
	if tool != "write" {
		if err := runKillTool(tool, img, Options{FS: killFS{left: &atomic.Int64{}}}, nil); err != nil {
			t.Fatalf("%s killed at call %d, again: %v", tool, call, err)
		}
		verify("after running it again")
	}
	left, _ := os.ReadDir(dir)
	for _, e := range left {
		switch e.Name() {
		case "img", "base", "other", "out":
		default:
			t.Errorf("%s killed at call %d: left behind: %s", tool, call, e.Name())
		}
	}
}
