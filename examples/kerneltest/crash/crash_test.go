package crash

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/guest/guesttest"
)

func TestMain(m *testing.M) {
	guesttest.Hook() // before anything else: this binary is also the guests' init
	if os.Getenv("MOOVM_KERNEL") == "" && !guesttest.InGuest() {
		fmt.Println("crash: skipped: set MOOVM_KERNEL to a vmlinuz with its modules beside it")
		os.Exit(0)
	}
	guesttest.HostMain(m)
}

// dir is where the guest has the file system.
const dir = "/tmp/fs"

// keep is how many files there are at a time.
const keep = 50

// content is what file i has: 1 to 64 KiB.
func content(i uint64) []byte {
	r := rand.NewChaCha8([32]byte{byte(i), byte(i >> 8), byte(i >> 16)})
	b := make([]byte, 1024+r.Uint64()%(63<<10))
	_, _ = r.Read(b)
	return b
}

func name(i uint64) string { return filepath.Join(dir, fmt.Sprintf("file%06d", i)) }

// TestWriter runs in the guest: it writes a file, syncs it, says its number,
// and so on until the power is gone.
func TestWriter(t *testing.T) {
	first, err := strconv.ParseUint(os.Getenv("CRASH_FIRST"), 10, 64)
	if !guesttest.InGuest() || err != nil {
		t.Skip("runs in the guest of TestCrashes")
	}
	counter, err := os.OpenFile(filepath.Join(dir, "counter"), os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		t.Fatal(err)
	}
	for i := first; ; i++ {
		f, err := os.Create(name(i))
		if err == nil {
			_, err = f.Write(content(i))
		}
		if err == nil {
			err = f.Sync()
		}
		if err == nil {
			err = f.Close()
		}
		if err == nil {
			_, err = counter.WriteAt(binary.LittleEndian.AppendUint64(nil, i), 0)
		}
		if err == nil {
			err = counter.Sync()
		}
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("synced", i)
		if i > keep {
			os.Remove(name(i - keep))
		}
	}
}

// TestChecker runs in the guest: all that was synced is there.
func TestChecker(t *testing.T) {
	last, err := strconv.ParseUint(os.Getenv("CRASH_LAST"), 10, 64)
	if !guesttest.InGuest() || err != nil {
		t.Skip("runs in the guest of TestCrashes")
	}
	if last == 0 {
		return
	}
	b, err := os.ReadFile(filepath.Join(dir, "counter"))
	if err != nil || len(b) != 8 {
		t.Fatalf("the counter: %x, %v", b, err)
	}
	// More may have been synced than the host was told in time.
	n := binary.LittleEndian.Uint64(b)
	if n < last {
		t.Errorf("the counter says %d after %d was synced", n, last)
	}
	for i := n; i > 0 && i+keep > n; i-- {
		b, err := os.ReadFile(name(i))
		if err != nil {
			t.Error(err)
		} else if !bytes.Equal(b, content(i)) {
			t.Errorf("%s is not what was synced", name(i))
		}
	}
	fmt.Println("last", n)
}

// TestCrashes cuts the power of a guest, CRASHES times (3 if not set). The
// disk has a write cache that loses, at each cut, a random part of what was
// not flushed.
func TestCrashes(t *testing.T) {
	if guesttest.InGuest() {
		t.Skip("runs on the host")
	}
	crashes := 3
	if n, err := strconv.Atoi(os.Getenv("CRASHES")); err == nil {
		crashes = n
	}
	ctx := t.Context()
	m := guesttest.Start(t, guesttest.Config{Memory: 512 << 20, Disks: []guesttest.Disk{{Size: 64 << 20, VolatileCache: true}}})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	sh := func(script string) string {
		t.Helper()
		r, err := m.Run(ctx, "sh", "-ec", script)
		if err != nil || r.Status != 0 {
			t.Fatalf("%s: status %d, %v\n%s%s", script, r.Status, err, r.Stdout, r.Stderr)
		}
		return r.Stdout
	}
	sh("mke2fs -q -t ext4 /dev/vda")
	last := uint64(0)
	for crash := range crashes + 1 {
		sh("mkdir -p " + dir + "; mount -t ext4 /dev/vda " + dir)
		said := sh(fmt.Sprintf("CRASH_LAST=%d %s -test.run='^TestChecker$'", last, self))
		if _, n, ok := strings.Cut(said, "last "); ok {
			last, _ = strconv.ParseUint(strings.Fields(n)[0], 10, 64)
		}
		sh("umount " + dir + "; e2fsck -fn /dev/vda")
		if crash == crashes {
			break
		}
		sh("mount -t ext4 /dev/vda " + dir)
		last = write(t, ctx, m, self, last)
		m.Reset()
	}
	t.Logf("%d power cuts, %d files synced", crashes, last)
}

// write lets the guest write, cuts the power at some moment, and returns the
// number of the last file that was synced.
func write(t *testing.T, ctx context.Context, m *guesttest.Machine, self string, last uint64) uint64 {
	r, w := io.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer w.Close()
		_, _ = m.RunWith(ctx, guesttest.Streams{Stdout: w}, "env", "CRASH_FIRST="+strconv.FormatUint(last+1, 10), self, "-test.run=^TestWriter$")
	}()
	lines := bufio.NewScanner(r)
	files := 1 + rand.IntN(30)
	for n := 0; lines.Scan(); {
		if i, ok := strings.CutPrefix(lines.Text(), "synced "); ok {
			last, _ = strconv.ParseUint(i, 10, 64)
			if n++; n == files {
				// Anywhere between two syncs.
				time.AfterFunc(time.Duration(rand.IntN(50))*time.Millisecond, m.Kill)
			}
		}
	}
	<-ended
	return last
}
