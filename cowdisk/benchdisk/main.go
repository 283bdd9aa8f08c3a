//go:build linux

// Benchdisk measures cowdisk against raw pread/pwrite on the same file system and against qcow2 (qemu-img bench), all in one run, and
// prints a table in Markdown.
//
//	go run ./cowdisk/benchdisk -dir /var/tmp
//
// It takes a few minutes.
package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moovm/moovm/cowdisk"
	"golang.org/x/sys/unix"
)

// disk is what both sides offer.
type disk interface {
	io.ReaderAt
	io.WriterAt
	Flush() error
	Close() error
}

// rawFile is the limit: one system call an operation and nothing else. shift moves everything in the file to where the overlay has its
// data, which is not where the page cache likes it best: that is the price of the format, not of the program.
type rawFile struct {
	fd    int
	shift int64
}

func (f *rawFile) ReadAt(p []byte, off int64) (int, error)  { return unix.Pread(f.fd, p, off+f.shift) }
func (f *rawFile) WriteAt(p []byte, off int64) (int, error) { return unix.Pwrite(f.fd, p, off+f.shift) }
func (f *rawFile) Flush() error                             { return unix.Fdatasync(f.fd) }
func (f *rawFile) Close() error                             { return unix.Close(f.fd) }

// row is one line of the table.
type row struct {
	name    string
	want    float64
	block   int
	random  bool
	write   bool
	flush   bool
	base    bool // read from the backing file
	touched bool // the data is there before the measurement
	ops     int
}

var rows = []row{
	{name: "random read 4 KiB, allocated", want: 0.90, block: 4096, random: true, touched: true, ops: 100000},
	{name: "random read 4 KiB, from backing", want: 0.90, block: 4096, random: true, base: true, ops: 100000},
	{name: "random write 4 KiB, first touch", want: 0.80, block: 4096, random: true, write: true, ops: 30000},
	{name: "random write 4 KiB, second touch", want: 0.90, block: 4096, random: true, write: true, touched: true, ops: 30000},
	{name: "write 4 KiB + flush, first touch", want: 0.45, block: 4096, random: true, write: true, flush: true, ops: 150},
	{name: "write 4 KiB + flush, second touch", want: 0.90, block: 4096, random: true, write: true, flush: true, touched: true, ops: 150},
	{name: "sequential read 1 MiB, allocated", want: 0.95, block: 1 << 20, touched: true, ops: 256},
	{name: "sequential read 1 MiB, from backing", want: 0.95, block: 1 << 20, base: true, ops: 256},
	{name: "sequential write 1 MiB, first touch", want: 0.95, block: 1 << 20, write: true, ops: 256},
	{name: "sequential write 1 MiB, second touch", want: 0.95, block: 1 << 20, write: true, touched: true, ops: 256},
}

// diskSize is how much of the disk is used; more than the processor's caches hold, for three files at a time.
const diskSize = 128 << 20

// layout is one table: where the data area begins decides what the page cache can do, so there is one for each kind of beginning.
type layout struct {
	title   string
	variant cowdisk.Variant
	size    int64 // of the disk
	qemu    bool  // compare with qcow2, too
}

var layouts = []layout{
	{"v2, disk of 4090 MiB: the data area begins at a multiple of 1 MiB, as the raw file's does. This is what the program costs.", cowdisk.QEMUV2, 4090 << 20, true},
	{"v3, disk of 4096 MiB: the data area begins at a multiple of 4 KiB.", cowdisk.UMLV3, 4096 << 20, false},
	{"v2, disk of 4096 MiB: the data area begins at a multiple of 512 bytes, as it does for most sizes.", cowdisk.QEMUV2, 4096 << 20, false},
}

var (
	dir    = flag.String("dir", ".", "folder on the file system to measure")
	rounds = flag.Int("rounds", 5, "rounds; the tables show medians")
	out    = flag.String("o", "", "also write the tables to this file, below the line <!-- table -->")
	filter = flag.String("rows", "", "only rows whose name contains this")
	format = flag.String("layout", "", "only layouts whose title contains this")
	noQEMU = flag.Bool("no-qemu", false, "leave out qcow2")
)

func main() {
	flag.Parse()
	log.SetFlags(0)
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	runtime.LockOSThread()
	tmp, err := os.MkdirTemp(*dir, "benchdisk-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGINT, unix.SIGTERM)
	go func() {
		<-stop
		os.RemoveAll(tmp)
		os.Exit(130)
	}()
	var b strings.Builder
	w := io.MultiWriter(os.Stdout, &b)
	base := filepath.Join(tmp, "base.img")
	if err := fill(base); err != nil {
		return err
	}
	qemu := !*noQEMU
	if _, err := exec.LookPath("qemu-img"); qemu && err != nil {
		qemu = false
		log.Print("qemu-img is not installed (package qemu-utils): no comparison with qcow2")
	}
	start := time.Now()
	for _, l := range layouts {
		if !strings.Contains(l.title, *format) {
			continue
		}
		if err := l.table(w, tmp, base, qemu && l.qemu); err != nil {
			return err
		}
	}
	create, open, mem, err := openTimes(tmp, base)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "\nCreate: %v (wanted: under 1 ms)%s. Open of a 1 TiB overlay with nothing allocated: %v (under 1 ms)%s, %d KiB of memory (under 1 MiB)%s.\n",
		create, met(create < time.Millisecond), open, met(open < time.Millisecond), mem>>10, met(mem < 1<<20))
	fmt.Fprintf(os.Stderr, "%v in all\n", time.Since(start).Round(time.Second))
	if *out != "" {
		text, err := os.ReadFile(*out)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		head, _, _ := strings.Cut(string(text), "<!-- table -->")
		return os.WriteFile(*out, []byte(head+"<!-- table -->\n"+b.String()), 0o644)
	}
	return nil
}

func met(ok bool) string {
	if ok {
		return " ✓"
	}
	return " ✗"
}

// table measures all rows of one layout.
func (l layout) table(w io.Writer, tmp, base string, qemu bool) error {
	fmt.Fprintf(w, "\n%s\n\n| operation | raw ops/s | cowdisk ops/s | ratio | wanted | | ratio at the same file offset |", l.title)
	columns := 7
	if qemu {
		fmt.Fprint(w, " qcow2 64 KiB | qcow2 ext. L2 | cowdisk ÷ the better one | |")
		columns = 11
	}
	fmt.Fprintf(w, "\n|---%s|\n", strings.Repeat("|---:", columns-1))
	for _, r := range rows {
		if !strings.Contains(r.name, *filter) {
			continue
		}
		raw, cow, ratio, shifted, err := r.measure(l, tmp, base)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		fmt.Fprintf(w, "| %s | %.0f | %.0f | **%.2f** | %.2f |%s | %.2f |", r.name, raw, cow, ratio, r.want, met(ratio >= r.want), shifted)
		if qemu {
			q, ratio, err := r.qcow2(l, tmp, base)
			if err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
			fmt.Fprintf(w, " %.0f | %.0f | **%.1f** |%s |", q[0], q[1], ratio, met(ratio > 1))
		}
		fmt.Fprintln(w)
	}
	return nil
}

func fill(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, 1<<20)
	rnd := rand.NewChaCha8([32]byte{1})
	for off := int64(0); off < diskSize; off += int64(len(p)) {
		rnd.Read(p)
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
	}
	return f.Sync()
}

// measure keeps both sides open and alternates between them in short turns, so that what disturbs one disturbs the other. The ratio is the
// median over all turns of all rounds.
func (r row) measure(l layout, tmp, base string) (raw, cow, ratio, shifted float64, err error) {
	var raws, cows, ratios, shifteds []float64
	for i := range *rounds {
		var d [3]disk
		cow, err := r.openCOW(l, tmp, base)
		if err != nil {
			return 0, 0, 0, 0, err
		}
		d[1] = cow
		for s, shift := range map[int]int64{0: 0, 2: cow.Info().FormatSpecific.DataOffset} {
			if d[s], err = r.openRaw(tmp, base, shift); err != nil {
				return 0, 0, 0, 0, err
			}
		}
		n := int(diskSize) / r.block
		order := make([]int64, n)
		for i := range order {
			order[i] = int64(i) * int64(r.block)
		}
		if r.random {
			rnd := rand.New(rand.NewPCG(uint64(i), 1))
			rnd.Shuffle(n, func(i, j int) { order[i], order[j] = order[j], order[i] })
		}
		runtime.GC()
		turn := max(r.ops/100, 1)
		for at := 0; at < r.ops; at += turn {
			var t [3]float64
			for i := range d {
				s := (at/turn + i) % len(d)
				// Each side starts somewhere else: it must not find in the processor's cache what another one read.
				if t[s], err = r.turn(d[s], order, at+s*n/3, turn); err != nil {
					return 0, 0, 0, 0, err
				}
			}
			raws, cows = append(raws, float64(turn)/t[0]), append(cows, float64(turn)/t[1])
			ratios, shifteds = append(ratios, t[0]/t[1]), append(shifteds, t[2]/t[1])
		}
		if err = errors.Join(d[0].Close(), d[1].Close(), d[2].Close()); err != nil {
			return 0, 0, 0, 0, err
		}
	}
	return median(raws), median(cows), median(ratios), median(shifteds), nil
}

// now is the clock of a row: with flushes the time of day, else the processor time of this thread, in seconds. Operations in the page cache
// do not wait for anything, so on an idle machine the two are the same; on a busy one only the second says something.
func (r row) now() float64 {
	if r.flush {
		return time.Since(epoch).Seconds()
	}
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) != nil {
		return time.Since(epoch).Seconds()
	}
	return float64(t.Nano()) / 1e9
}

var epoch = time.Now()

// turn returns the seconds that n operations take.
func (r row) turn(d disk, order []int64, at, n int) (float64, error) {
	start := r.now()
	for i := range n {
		off := order[(at+i)%len(order)]
		var err error
		if r.write {
			_, err = d.WriteAt(buf[:r.block], off)
		} else {
			_, err = d.ReadAt(buf[:r.block], off)
		}
		if err == nil && r.flush {
			err = d.Flush()
		}
		if err != nil {
			return 0, err
		}
	}
	return r.now() - start, nil
}

var buf = func() []byte {
	p := make([]byte, 1<<20)
	for i := range p {
		p[i] = byte(i*7 + 1)
	}
	return p
}()

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

func (r row) openRaw(tmp, base string, shift int64) (disk, error) {
	if r.base {
		fd, err := unix.Open(base, unix.O_RDWR|unix.O_CLOEXEC, 0)
		return &rawFile{fd: fd}, err
	}
	p := filepath.Join(tmp, fmt.Sprint("raw", shift))
	os.Remove(p)
	fd, err := unix.Open(p, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Ftruncate(fd, diskSize+shift); err != nil {
		return nil, err
	}
	f := &rawFile{fd, shift}
	if err := r.touch(f); err != nil {
		return nil, err
	}
	return f, r.warm(p)
}

func (r row) openCOW(l layout, tmp, base string) (*cowdisk.Disk, error) {
	p := filepath.Join(tmp, "cow")
	os.Remove(p)
	if err := cowdisk.Create(p, cowdisk.CreateOptions{Backing: base, Size: l.size, Variant: l.variant}); err != nil {
		return nil, err
	}
	d, err := cowdisk.Open(p, cowdisk.Options{})
	if err != nil {
		return nil, err
	}
	if err := r.touch(d); err != nil {
		return nil, err
	}
	return d, r.warm(p)
}

// warm reads the file into the page cache anew, as it is after the image was opened again: how large the pieces of the page cache are
// would otherwise depend on how each side was filled. Rows that write leave it as it was written.
func (r row) warm(path string) error {
	if !r.touched || r.write {
		return nil
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	p := make([]byte, 1<<20)
	for off := int64(0); ; {
		n, err := unix.Pread(fd, p, off)
		if err != nil || n == 0 {
			return err
		}
		off += int64(n)
	}
}

// touch fills the disk, for rows that write in pieces as large as they write later: the kernel makes the pieces of the page cache as large
// as the first writes, or as it finds memory for, and in a large piece small writes are slow.
func (r row) touch(d disk) error {
	if r.touched {
		p := make([]byte, r.fillSize())
		for off := int64(0); off < diskSize; off += int64(len(p)) {
			if _, err := d.WriteAt(p, off); err != nil {
				return err
			}
		}
	}
	return d.Flush()
}

func (r row) fillSize() int {
	if r.write {
		return r.block
	}
	return 1 << 20
}

var runTime = regexp.MustCompile(`Run completed in ([0-9.]+) seconds`)

// qcow2 runs qemu-img bench, which strides over the disk, on images with clusters of 64 KiB and with extended L2 entries. ratio is
// what cowdisk does in between by itself ÷ the better of the two, the median of all rounds: a flush is dearer when it takes turns with those
// of other files.
func (r row) qcow2(l layout, tmp, base string) (qcow2 [2]float64, ratio float64, err error) {
	ops := 20000 // of the 32768 blocks there are
	times := min(*rounds, 3)
	switch {
	case r.flush: // many short rounds, as a device that others use has moods
		ops, times = 100, 7
	case r.block == 1<<20 && r.write && !r.touched:
		ops = diskSize >> 20
	case r.block == 1<<20:
		ops = 10 * diskSize >> 20
	}
	var results [2][]float64
	var ratios []float64
	for range times {
		best := 0.0
		for i, opts := range []string{"cluster_size=64k", "extended_l2=on"} {
			rate, err := r.qemuImg(filepath.Join(tmp, "q.qcow2"), base, opts, ops)
			if err != nil {
				return qcow2, 0, err
			}
			results[i] = append(results[i], rate)
			best = max(best, rate)
		}
		d, err := r.openCOW(l, tmp, base)
		if err != nil {
			return qcow2, 0, err
		}
		n := diskSize / r.block
		order := make([]int64, n)
		for i := range order {
			step := 1
			if r.random {
				step = 37
			}
			order[i] = int64(i * step % n * r.block)
		}
		t, err := r.turn(d, order, 0, ops)
		if err = errors.Join(err, d.Close()); err != nil {
			return qcow2, 0, err
		}
		ratios = append(ratios, float64(ops)/t/best)
	}
	return [2]float64{median(results[0]), median(results[1])}, median(ratios), nil
}

func (r row) qemuImg(img, base, opts string, ops int) (rate float64, err error) {
	os.Remove(img)
	qemu := func(args ...string) (seconds float64, err error) {
		cmd := exec.Command("qemu-img", args...)
		o, err := cmd.CombinedOutput()
		if err != nil {
			return 0, fmt.Errorf("qemu-img %s: %w: %s", args[0], err, o)
		}
		if !r.flush {
			return (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds(), nil
		}
		m := runTime.FindSubmatch(o)
		if m == nil {
			return 0, nil
		}
		return strconv.ParseFloat(string(m[1]), 64)
	}
	if _, err := qemu("create", "-q", "-f", "qcow2", "-o", opts, "-b", base, "-F", "raw", img, strconv.Itoa(diskSize)); err != nil {
		return 0, err
	}
	if r.touched {
		if _, err := qemu("bench", "-f", "qcow2", "-w", "-d", "1", "-s", strconv.Itoa(r.fillSize()), "-c", strconv.Itoa(diskSize/r.fillSize()), img); err != nil {
			return 0, err
		}
	}
	args := []string{"bench", "-f", "qcow2", "-d", "1", "-s", strconv.Itoa(r.block)}
	if r.random {
		args = append(args, "-S", strconv.Itoa(r.block*37))
	}
	idle := 0.0
	if !r.flush { // starting the program is no operation
		if idle, err = qemu("bench", "-f", "qcow2", "-c", "1", "-s", "4096", img); err != nil {
			return 0, err
		}
	}
	if r.write {
		args = append(args, "-w")
	}
	if r.flush {
		args = append(args, "--flush-interval=1")
	}
	t, err := qemu(append(args, "-c", strconv.Itoa(ops), img)...)
	return float64(ops) / (t - idle), err
}

func openTimes(tmp, base string) (create, open time.Duration, mem uint64, err error) {
	var creates, opens []time.Duration
	p := filepath.Join(tmp, "big")
	for range 51 {
		os.Remove(p)
		start := time.Now()
		if err = cowdisk.Create(p, cowdisk.CreateOptions{Backing: base, Size: 1 << 40}); err != nil {
			return
		}
		creates = append(creates, time.Since(start))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start = time.Now()
		var d *cowdisk.Disk
		if d, err = cowdisk.Open(p, cowdisk.Options{}); err != nil {
			return
		}
		opens = append(opens, time.Since(start))
		runtime.ReadMemStats(&after)
		mem = max(mem, after.TotalAlloc-before.TotalAlloc)
		d.Close()
	}
	slices.SortFunc(creates, cmp.Compare)
	slices.SortFunc(opens, cmp.Compare)
	return creates[25], opens[25], mem, nil
}
