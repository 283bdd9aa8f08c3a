package cowdisk

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// mapShared maps n bytes of the memory file f.
func mapShared(t testing.TB, f *os.File, n int64) []byte {
	t.Helper()
	if err := f.Truncate(n); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	return mem
}

func memfd(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("pending", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "pending")
	t.Cleanup(func() { f.Close() })
	return f
}

func memfdBytes(t testing.TB, f *os.File) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// The memory of a 1 TiB disk takes up what is pending, not what could be, also when it is taken over.
func TestPendingSparse(t *testing.T) {
	img := filepath.Join(t.TempDir(), "a.cow")
	mustCreate(t, img, CreateOptions{Size: 1 << 40})
	d := mustOpen(t, img, Options{})
	f := memfd(t)
	mem := mapShared(t, f, d.PendingLen())
	if n := int64(len(mem)); n < 1<<28 || n > 1<<28+1<<16 {
		t.Fatalf("%d bytes for 1 TiB", n)
	}
	for range 3 {
		if err := d.SharePending(mem); err != nil {
			t.Fatal(err)
		}
		for _, off := range []int64{0, 1 << 39, 1<<40 - 4096} {
			if _, err := d.WriteAt([]byte{1}, off); err != nil {
				t.Fatal(err)
			}
		}
		abandon(d)
		d = mustOpen(t, img, Options{})
	}
	if err := d.SharePending(mem); err != nil {
		t.Fatal(err)
	}
	if n := d.Allocated(); n != 24 {
		t.Errorf("%d sectors, want 24", n)
	}
	if n := memfdBytes(t, f); n > 64<<10 {
		t.Errorf("%d bytes of memory for three bits", n)
	}
	b := []byte{0}
	if d.ReadAt(b, 1<<39); b[0] != 1 {
		t.Error("a completed write is lost")
	}
}

// pendingChild serves an image for ever: it writes, tells when a write is completed, and now and then flushes.
func pendingChild(img string, w io.Writer) error {
	d, err := Open(img, Options{})
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(3, 0, int(d.PendingLen()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	if err := d.SharePending(mem); err != nil {
		return err
	}
	var first int
	fmt.Sscan(os.Getenv("MOOVM_COWDISK_FIRST"), &first)
	for i := first; ; i++ {
		fmt.Fprintf(w, "begin %d\n", i)
		if err := killWrite(d, i); err != nil {
			return err
		}
		fmt.Fprintf(w, "end %d\n", i)
	}
}

// A process that writes is killed at any moment, again and again, its memory held by this one: no completed write is lost, flushed or not.
func TestPendingKill(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes; run without -short")
	}
	lives := 10
	if os.Getenv("MOOVM_TEST_LONG") != "" || os.Getenv("MOOVM_SOAK") != "" {
		lives = 200
	}
	dir := t.TempDir()
	img := filepath.Join(dir, "img")
	base := randomBytes(killDisk, 1)
	writeFile(t, filepath.Join(dir, "base"), base)
	mustCreate(t, img, CreateOptions{Backing: "base"})
	d := mustOpen(t, img, Options{})
	f := memfd(t)
	mem := mapShared(t, f, d.PendingLen())
	d.Close()
	m := newModel(base)
	first, pending := 0, 0
	for life := range lives {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=pending %s 0", killEnv, img), fmt.Sprint("MOOVM_COWDISK_FIRST=", first))
		cmd.ExtraFiles = []*os.File{f}
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
		for s, lines := bufio.NewScanner(out), 0; s.Scan(); {
			var what string
			var i int
			fmt.Sscan(s.Text(), &what, &i)
			off, p, flush := killOp(i)
			switch {
			case what == "begin" && !flush:
				m.before = append(m.before[:0], m.now...)
				copy(m.now[off:], p)
			case what == "end":
				m.before = nil
				first = i + 1
			}
			if lines++; lines == 3+life*7%50 {
				cmd.Process.Kill() // it goes on for a moment, up to what the pipe holds
			}
		}
		cmd.Wait()
		kill.Stop()
		d, err := Open(img, Options{})
		if err != nil {
			t.Fatal(err)
		}
		pending += len(pendingSectors(d, mem))
		if err := d.SharePending(mem); err != nil {
			t.Fatal(err)
		}
		got := contents(t, d)
		if err := m.verifyNow(got); err != nil {
			t.Fatalf("life %d: %v", life, err)
		}
		m.now, m.before = got, nil
		if first++; life%2 == 0 {
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		} else {
			abandon(d)
		}
	}
	if pending == 0 {
		t.Error("nobody was killed with pending bits")
	}
}
