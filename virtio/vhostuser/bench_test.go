package vhostuser_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/virtio/virtiotest"
)

// BenchmarkCompare runs the same vhost-user front-end against this package and
// against qemu-storage-daemon, each in a process of its own, with a raw image
// and with an overlay (ours: COW, QEMU's: qcow2) on a raw base. MOOVM_BENCH=1
// turns it on; `make bench-virtio` does. MOOVM_BENCH_TABLE=FILE writes a table.
//
// A request is 4 KiB at a random place, or 128 KiB in sequence. "first" is the
// first write to each place of an overlay, "again" a write to what is
// allocated. cpu-ns/op is the CPU time of the server process per request.
func BenchmarkCompare(b *testing.B) {
	if os.Getenv("MOOVM_BENCH") == "" {
		b.Skip("takes minutes: set MOOVM_BENCH=1")
	}
	qsd, err := exec.LookPath("qemu-storage-daemon")
	if err != nil {
		b.Skip("qemu-storage-daemon is missing: apt-get install qemu-system-common")
	}
	ours := func(kind string) server {
		return func(b *testing.B, img, sock string, queues int) *exec.Cmd {
			return serverProcess(b, kind, img, sock, queues)
		}
	}
	theirs := func(format string) server {
		return func(b *testing.B, img, sock string, queues int) *exec.Cmd {
			return exec.Command(qsd, "--blockdev", "file,node-name=f,filename="+img,
				"--blockdev", format+",node-name=d,file=f", "--export",
				fmt.Sprintf("vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=%s,writable=on,num-queues=%d", sock, queues))
		}
	}
	images := map[string]func(b *testing.B, dir string) string{
		"raw": func(b *testing.B, dir string) string { return base(b, dir) },
		"cow": func(b *testing.B, dir string) string {
			base(b, dir)
			img := filepath.Join(dir, "image.cow")
			if err := cowdisk.Create(img, cowdisk.CreateOptions{Backing: "base"}); err != nil {
				b.Fatal(err)
			}
			return img
		},
		"qcow2": func(b *testing.B, dir string) string {
			img := filepath.Join(dir, "image.qcow2")
			if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base(b, dir), img).CombinedOutput(); err != nil {
				b.Fatalf("qemu-img: %v\n%s", err, out)
			}
			return img
		},
	}
	servers := []struct {
		name, image string
		start       server
	}{
		{"moovm-raw", "raw", ours("raw")}, {"qemu-raw", "raw", theirs("raw")},
		{"moovm-cow", "cow", ours("cow")}, {"qemu-qcow2", "qcow2", theirs("qcow2")},
	}
	for _, row := range loads {
		for _, s := range servers {
			var last sample
			name := fmt.Sprintf("%s/depth=%d/queues=%d", row.name, row.depth, row.queues)
			if b.Run(name+"/"+s.name, func(b *testing.B) {
				dir := benchDir(b)
				last = compare(b, row, images[s.image](b, dir), filepath.Join(dir, "s"), s.start)
			}) && last.op > 0 {
				compared[name+"/"+s.name] = append(compared[name+"/"+s.name], last)
			}
		}
	}
	if p := os.Getenv("MOOVM_BENCH_TABLE"); p != "" {
		if err := os.WriteFile(p, []byte(compareTable()), 0o644); err != nil {
			b.Error(err)
		}
	}
}

// sample is the time of a request, and of the server's processor for it, in ns.
type sample struct{ op, cpu float64 }

// compared are all measurements so far, by row and server: -count makes several.
var compared = map[string][]sample{}

// compareTable is a table of the medians.
func compareTable() string {
	var t strings.Builder
	t.WriteString("| request | depth | queues | our raw | qemu raw | ratio | our cow | qemu qcow2 | ratio |\n|---|---|---|---|---|---|---|---|---|\n")
	median := func(name string, of func(sample) float64) float64 {
		var v []float64
		for _, s := range compared[name] {
			v = append(v, of(s))
		}
		if len(v) == 0 {
			return math.NaN()
		}
		slices.Sort(v)
		return v[len(v)/2] / 1000
	}
	for _, row := range loads {
		name := fmt.Sprintf("%s/depth=%d/queues=%d", row.name, row.depth, row.queues)
		fmt.Fprintf(&t, "| %s | %d | %d", row.name, row.depth, row.queues)
		for _, pair := range [][2]string{{"/moovm-raw", "/qemu-raw"}, {"/moovm-cow", "/qemu-qcow2"}} {
			var op [2]float64
			for i, s := range pair {
				op[i] = median(name+s, func(s sample) float64 { return s.op })
				fmt.Fprintf(&t, " | %.1f (%.1f)", op[i], median(name+s, func(s sample) float64 { return s.cpu }))
			}
			fmt.Fprintf(&t, " | %.2f", op[1]/op[0])
		}
		t.WriteString(" |\n")
	}
	return t.String()
}

// loads are the rows. A sequential request is 128 KiB, others are 4 KiB at
// random places.
var loads = []load{
	{"random read", virtiotest.BlkIn, 1, 1, 4096, false},
	{"random read", virtiotest.BlkIn, 32, 1, 4096, false},
	{"random read", virtiotest.BlkIn, 2, 2, 4096, false},
	{"random read", virtiotest.BlkIn, 32, 2, 4096, false},
	{"first write", virtiotest.BlkOut, 1, 1, 4096, false},
	{"first write", virtiotest.BlkOut, 32, 1, 4096, false},
	{"first write", virtiotest.BlkOut, 2, 2, 4096, false},
	{"first write", virtiotest.BlkOut, 32, 2, 4096, false},
	{"write again", virtiotest.BlkOut, 1, 1, 4096, true},
	{"write again", virtiotest.BlkOut, 32, 1, 4096, true},
	{"write again", virtiotest.BlkOut, 2, 2, 4096, true},
	{"write again", virtiotest.BlkOut, 32, 2, 4096, true},
	{"sequential read", virtiotest.BlkIn, 8, 1, 128 << 10, false},
	{"sequential read", virtiotest.BlkIn, 8, 2, 128 << 10, false},
	{"sequential write again", virtiotest.BlkOut, 8, 1, 128 << 10, true},
	{"sequential write again", virtiotest.BlkOut, 8, 2, 128 << 10, true},
}

type server func(b *testing.B, img, sock string, queues int) *exec.Cmd

type load struct {
	name          string
	typ           uint32
	depth, queues int
	size          int
	warm          bool // everything is written once before
}

const benchDisk = 64 << 20

// benchDir is in memory if possible: the disk of the machine is not what is
// measured.
func benchDir(b *testing.B) string {
	dir, err := os.MkdirTemp("/dev/shm", "moovm-bench")
	if err != nil {
		return b.TempDir()
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func base(b *testing.B, dir string) string {
	p := filepath.Join(dir, "base")
	if err := os.WriteFile(p, bytes.Repeat([]byte("0123456789abcdef"), benchDisk/16), 0o600); err != nil {
		b.Fatal(err)
	}
	return p
}

func compare(b *testing.B, row load, img, sock string, serve server) sample {
	cmd := serve(b, img, sock, row.queues)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() {
		cmd.Process.Signal(unix.SIGTERM)
		cmd.Wait()
	}()
	mem, err := virtiotest.NewSharedMemory(64 << 20)
	if err != nil {
		b.Fatal(err)
	}
	defer mem.Close()
	c := dial(b, sock)
	v := virtiotest.NewVhostUser(b, c, mem)
	defer v.Close()
	g := virtiotest.NewGuestOn(mem.Bytes)
	d := virtiotest.Start(b, v, g, virtiotest.BlockFeatures, 128)

	slots := make([]slot, row.depth)
	for i := range slots {
		at, m := g.Alloc(64, 64)
		data, _ := g.Alloc(uint64(row.size), 4096)
		binary.LittleEndian.PutUint32(m, row.typ)
		slots[i] = slot{m, [3]virtiotest.Buf{{Addr: at, Len: 16}, {Addr: data, Len: uint32(row.size), Write: row.typ == virtiotest.BlkIn},
			{Addr: at + 32, Len: 1, Write: true}}}
	}
	places := benchDisk / row.size
	order := rand.New(rand.NewSource(1)).Perm(places)
	seq := row.size > 4096
	next := func(i int) uint64 {
		if seq {
			return uint64(i%places) * uint64(row.size/512)
		}
		return uint64(order[i%places]) * uint64(row.size/512)
	}
	if row.warm {
		drive(b, d, slots, places, row.queues, next)
	} else {
		drive(b, d, slots, 200, row.queues, func(i int) uint64 { return next(places - 1 - i%200) })
	}
	// There are only so many first writes, whatever b.N is.
	n := b.N
	if row.typ == virtiotest.BlkOut && !row.warm {
		n = places - 200
	}
	before := cpuTime(b, cmd.Process.Pid)
	b.SetBytes(int64(row.size))
	b.ResetTimer()
	start := time.Now()
	drive(b, d, slots, n, row.queues, next)
	b.StopTimer()
	m := sample{float64(time.Since(start)) / float64(n), float64(cpuTime(b, cmd.Process.Pid)-before) / float64(n)}
	b.ReportMetric(m.op, "ns/op")
	b.ReportMetric(m.cpu, "cpu-ns/op")
	return m
}

type slot struct {
	hdr  []byte
	bufs [3]virtiotest.Buf
}

// drive keeps all slots in flight until n requests are done. It polls the used
// rings and asks for no interrupts, so that what is measured is the server.
func drive(b *testing.B, d *virtiotest.Driver, slots []slot, n, queues int, next func(i int) uint64) {
	b.Helper()
	sent, got := 0, 0
	owner := make([][]int, queues)
	for q := range owner {
		owner[q] = make([]int, d.Rings[q].Size)
	}
	add := func(q, i int) {
		s := &slots[i]
		binary.LittleEndian.PutUint64(s.hdr[8:], next(sent))
		s.hdr[32] = 0xff
		head, err := d.Rings[q].Add(s.bufs[:]...)
		if err != nil {
			b.Fatal(err)
		}
		owner[q][head] = i
		sent++
	}
	for i := range slots {
		if sent < n {
			add(i%queues, i)
		}
	}
	for q := range queues {
		d.Kick(q)
	}
	deadline := time.Now().Add(2 * time.Minute)
	for got < n {
		progress := false
		for q := range queues {
			for {
				head, _, ok := d.Rings[q].Used()
				if !ok {
					break
				}
				i := owner[q][head]
				if st := slots[i].hdr[32]; st != 0 {
					b.Fatalf("status %d", st)
				}
				got++
				progress = true
				if sent < n {
					add(q, i)
				}
			}
			d.Kick(q)
		}
		if !progress {
			if time.Now().After(deadline) {
				b.Fatal("no progress")
			}
			runtime.Gosched()
		}
	}
}

// cpuTime is the CPU time of a process so far, in nanoseconds.
func cpuTime(b *testing.B, pid int) int64 {
	b.Helper()
	s, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	f := strings.Fields(string(s[bytes.LastIndexByte(s, ')')+2:]))
	user, _ := strconv.ParseInt(f[11], 10, 64)
	sys, _ := strconv.ParseInt(f[12], 10, 64)
	return (user + sys) * int64(time.Second) / 100
}
