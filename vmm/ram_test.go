package vmm

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRAMAroundTheHole(t *testing.T) {
	r, err := newRAM(addrHole+1<<20, false) // lazily touched: costs nothing
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for addr, ok := range map[uint64]bool{
		0: true, addrHole - 8: true, addrHole: false, addrAbove4G - 8: false,
		addrAbove4G: true, addrAbove4G + 1<<20 - 8: true, addrAbove4G + 1<<20: false, 1<<64 - 8: false,
	} {
		p := []byte("8 bytes!")
		if err := r.mem.Write(addr, p); (err == nil) != ok {
			t.Errorf("write at %#x: %v", addr, err)
		}
		q := make([]byte, 8)
		if err := r.mem.Read(addr, q); (err == nil) != ok || ok && !bytes.Equal(p, q) {
			t.Errorf("read at %#x: %q, %v", addr, q, err)
		}
	}
	if _, err := r.mem.Slice(addrHole-4, 8); err == nil {
		t.Error("a slice reaches into the hole")
	}
	// What is not touched is not there.
	if kib := statusKiB(t, "RssShmem"); kib > 64<<10 {
		t.Errorf("%d KiB of a 3 GiB guest are resident", kib)
	}
}

func statusKiB(t *testing.T, key string) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skip("needs /proc/self/status")
	}
	for _, line := range strings.Split(string(b), "\n") {
		if rest, ok := strings.CutPrefix(line, key+":"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	return 0
}

func TestHugePages(t *testing.T) {
	if _, err := newRAM(3<<20, true); err == nil || !strings.Contains(err.Error(), "huge page") {
		t.Errorf("3 MiB: %v", err)
	}
	r, err := newRAM(4<<20, true)
	switch {
	case errors.Is(err, unix.ENOMEM):
		if !strings.Contains(err.Error(), "vm.nr_hugepages=2") {
			t.Errorf("the error does not help: %v", err)
		}
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOSYS):
		t.Skipf("needs a kernel with 2 MiB pages (CONFIG_HUGETLBFS): %v", err)
	case err != nil:
		t.Fatal(err)
	default:
		defer r.Close()
		if err := r.mem.Write(0, []byte("huge")); err != nil {
			t.Error(err)
		}
	}
}
