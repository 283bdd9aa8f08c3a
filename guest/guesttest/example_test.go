package guesttest_test

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/moovm/moovm/guest/guesttest"
)

// All tests of a package run in a guest that has an empty disk of 1 GiB.
func ExampleMain() {
	_ = func(m *testing.M) { // TestMain
		guesttest.Main(m, func(c *guesttest.Config) {
			c.Disks = []guesttest.Disk{{Size: 1 << 30}}
		})
	}
}

// A host test that cuts a guest's power and looks what is left.
func ExampleStart() {
	_ = func(t *testing.T) {
		m := guesttest.Start(t, guesttest.Config{Base: "debian.img"})
		if r, err := m.Run(t.Context(), "sh", "-c", "echo text > /root/file; sync"); err != nil || r.Status != 0 {
			t.Fatal(r, err)
		}
		m.Reset()
		r, err := m.Run(context.Background(), "cat", "/root/file")
		if err != nil || r.Stdout != "text\n" {
			t.Error(r, err)
		}
	}
}

// A disk of 8 MiB with bad sectors, as `moovm test --disk` takes it.
func ExampleParseDisk() {
	size := func(s string) (int64, error) {
		n, err := strconv.ParseInt(strings.TrimRight(s, "KM"), 10, 64)
		return n << (10 * (strings.IndexAny("BKM", s[len(s)-1:]))), err
	}
	d, err := guesttest.ParseDisk("size=8M,fault=write:EIO@1M+4K,slow=2ms", size)
	fmt.Println(d.Size, d.Faults, d.Slow, err)
	// Output: 8388608 [{write 1048576 4096}] 2ms <nil>
}
