package guesttest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/virtioblk"
)

func parseSize(s string) (int64, error) {
	unit := int64(1)
	for i, c := range "KMG" {
		if rest, ok := strings.CutSuffix(s, string(c)); ok {
			s, unit = rest, 1<<(10*(i+1))
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n * unit, err
}

func TestParseDisk(t *testing.T) {
	for in, want := range map[string]Disk{
		"size=1G":                    {Size: 1 << 30},
		"size=1M,ro,serial=x":        {Size: 1 << 20, ReadOnly: true, Serial: "x"},
		"data.img,slow=5ms,volatile": {Image: "data.img", Slow: 5 * time.Millisecond, VolatileCache: true},
		"data.img,format=raw":        {Image: "data.img", Format: cowdisk.FormatRaw},
		"./a=b,,c,ro,format=cow":     {Image: "./a=b,c", Format: cowdisk.FormatCOW, ReadOnly: true},
		"size=4K,fault=EIO@1M+4K,fault=write:EIO,fault=flush:EIO@8K": {Size: 4096,
			Faults: []Fault{{"", 1 << 20, 4096}, {"write", 0, 0}, {"flush", 8192, 0}}},
	} {
		if got, err := ParseDisk(in, parseSize); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "ro", "size=", "size=100", "size=-1K", "size=1M,colour=red", "a.img,size=1M", "a.img,format=qcow2", "size=1M,fault=EPERM",
		"size=1M,fault=EIO@x", "size=1M,fault=burn:EIO", "size=1M,slow=-1s", "size=1M,serial=" + strings.Repeat("x", 21)} {
		if d, err := ParseDisk(in, parseSize); err == nil || !strings.Contains(err.Error(), "--disk "+in) {
			t.Errorf("%s: %+v, %v", in, d, err)
		}
	}
}

func TestFaults(t *testing.T) {
	d := Disk{Faults: []Fault{{Offset: 4096, Length: 4096}, {Op: "write", Offset: 16384}, {Op: "flush"}}}
	b := d.faulty(virtioblk.NewRAM(32768))
	p := make([]byte, 4096)
	for _, c := range []struct {
		off         int64
		read, write bool // fail
	}{{0, false, false}, {512, true, true}, {4096, true, true}, {8192, false, false}, {12288, false, false}, {16384, false, true}, {20480, false, true}} {
		_, err := b.ReadAt(p, c.off)
		if got := errors.Is(err, syscall.EIO); got != c.read {
			t.Errorf("read at %d: %v", c.off, err)
		}
		_, err = b.WriteAt(p, c.off)
		if got := errors.Is(err, syscall.EIO); got != c.write {
			t.Errorf("write at %d: %v", c.off, err)
		}
	}
	if err := b.Flush(); !errors.Is(err, syscall.EIO) {
		t.Errorf("flush: %v", err)
	}
	none := Disk{}
	if r := virtioblk.NewRAM(512); none.faulty(r) != virtioblk.Backend(r) {
		t.Error("a disk without faults is not itself")
	}
}

// What was flushed survives every power cut; what was not is, sector by
// sector, the old or the new.
func TestVolatileCache(t *testing.T) {
	const size = 64 * sector
	ram := virtioblk.NewRAM(size)
	v := newVolatileCache(ram)
	model := make([]byte, size) // what the guest sees
	flushed := make([]byte, size)
	lost, kept := 0, 0
	for round := range 300 {
		for range rand.IntN(20) {
			off, n := rand.Int64N(60)*sector, (1+rand.Int64N(4))*sector
			p := bytes.Repeat([]byte{byte(rand.Int())}, int(n))
			if _, err := v.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
			copy(model[off:], p)
			off = rand.Int64N(size - 1000)
			got := make([]byte, 1000)
			if _, err := v.ReadAt(got, off); err != nil || !bytes.Equal(got, model[off:off+1000]) {
				t.Fatalf("round %d: read at %d is not what was written (%v)", round, off, err)
			}
		}
		if rand.IntN(2) == 0 {
			if err := v.Flush(); err != nil {
				t.Fatal(err)
			}
			copy(flushed, model)
		}
		if rand.IntN(3) > 0 {
			continue
		}
		if err := v.powerCut(); err != nil {
			t.Fatal(err)
		}
		now := make([]byte, size)
		if _, err := ram.ReadAt(now, 0); err != nil {
			t.Fatal(err)
		}
		for s := 0; s < size; s += sector {
			old, written, got := flushed[s:s+sector], model[s:s+sector], now[s:s+sector]
			switch {
			case bytes.Equal(old, written):
				if !bytes.Equal(got, old) {
					t.Fatalf("round %d: flushed sector %d was lost", round, s/sector)
				}
			case bytes.Equal(got, old):
				lost++
			case bytes.Equal(got, written):
				kept++
			default:
				t.Fatalf("round %d: sector %d is neither old nor new", round, s/sector)
			}
		}
		copy(model, now)
		copy(flushed, now)
	}
	if lost == 0 || kept == 0 {
		t.Errorf("%d sectors lost, %d kept: not much of a power cut", lost, kept)
	}
}
