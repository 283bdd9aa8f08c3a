package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/initramfs"
)

// speedMark begins a line of results on the console.
const speedMark = "share-speed "

// speedInit is PID 1 of the guests of TestLongShareSpeed: this test binary. It
// does what it is told on the console, and says there how long that took.
func speedInit() {
	err := errors.Join(os.MkdirAll("/proc", 0o755), os.MkdirAll("/m", 0o755), os.MkdirAll("/dev", 0o755))
	if err == nil {
		err = unix.Mount("dev", "/dev", "devtmpfs", 0, "")
	}
	if err == nil {
		err = unix.Mount("proc", "/proc", "proc", 0, "")
	}
	if err == nil {
		err = speedRun()
	}
	if err != nil {
		fmt.Println(speedMark+"failed", err)
	}
	unix.Sync()
	time.Sleep(100 * time.Millisecond) // the console's last bytes
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func speedRun() error {
	modules, err := filepath.Glob(initramfs.ModulesPath + "/*") // sorted
	if err != nil {
		return err
	}
	for _, m := range modules {
		b, err := os.ReadFile(m)
		if err == nil {
			err = unix.InitModule(b, "")
		}
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("%s: %w", m, err)
		}
	}
	fmt.Println(speedMark + "ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var options, test string
		var from, to int
		if n, _ := fmt.Sscan(in.Text(), &options, &test, &from, &to); n != 4 {
			break // the end
		}
		took, err := speedTest(options, test, from, to)
		if err != nil {
			return fmt.Errorf("%s: %w", in.Text(), err)
		}
		fmt.Printf("%stook %d\n", speedMark, took.Microseconds())
	}
	return nil
}

// speedTest reads a part of the file, in MiB, or walks some of the folders, in
// a fresh mount.
func speedTest(options, test string, from, to int) (took time.Duration, err error) {
	if err := unix.Mount("speed", "/m", "9p", unix.MS_RDONLY, "trans=virtio,version=9p2000.L,"+options); err != nil {
		return 0, fmt.Errorf("mount -o %s: %w", options, err)
	}
	start := time.Now()
	switch test {
	case "read":
		err = speedRead(int64(from)<<20, int64(to)<<20)
	case "find":
		err = speedFind(false, from, to)
	case "find-ls":
		err = speedFind(true, from, to)
	default:
		err = errors.ErrUnsupported
	}
	took = time.Since(start)
	return took, errors.Join(err, unix.Unmount("/m", 0))
}

func speedRead(from, to int64) error {
	f, err := os.Open("/m/big")
	if err != nil {
		return err
	}
	defer f.Close()
	for b := make([]byte, 1<<20); from < to; from += int64(len(b)) {
		if _, err := f.ReadAt(b, from); err != nil {
			return err
		}
	}
	return nil
}

// speedFind walks folders of the tree, as find does, and asks for each file's
// attributes if stat is set.
func speedFind(stat bool, from, to int) error {
	n := 0
	for i := from; i < to; i++ {
		err := filepath.WalkDir("/m/tree/"+strconv.Itoa(i), func(_ string, e fs.DirEntry, err error) error {
			n++
			if err == nil && stat {
				_, err = e.Info()
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	if n != (to-from)*(speedFolder+1) {
		return fmt.Errorf("%d files in %d folders", n, to-from)
	}
	return nil
}

// speedFolder is how many files there are in each folder of the tree.
const speedFolder = 20

// Our 9P device next to QEMU's, as guests of the same host: the same kernel,
// initramfs, folder and mount options. Both guests run, and take turns: a file
// of 1 GiB and a tree of 10 000 files are read by parts, each by one and by the
// other right after, because how fast a machine is changes from minute to
// minute. It measures, and asserts only that both worked; docs/BENCH-9P.md has
// the results.
//
//	MOOVM_SHARE_MIB, MOOVM_SHARE_FILES, MOOVM_SHARE_PARTS
//
// change the file's size, the number of files, and in how many parts.
func TestLongShareSpeed(t *testing.T) {
	long(t)
	needKVM(t)
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("needs qemu-system-x86_64; run make setup")
	}
	number := func(name string, def int) int {
		if n, err := strconv.Atoi(os.Getenv(name)); err == nil && n > 0 {
			return n
		}
		return def
	}
	mib, folders, parts := number("MOOVM_SHARE_MIB", 1024), number("MOOVM_SHARE_FILES", 10_000)/speedFolder, number("MOOVM_SHARE_PARTS", 25)

	dir := t.TempDir()
	share := filepath.Join(dir, "share")
	if err := os.Mkdir(share, 0o755); err != nil {
		t.Fatal(err)
	}
	if os.Getuid() == 0 { // out of the way of other file systems
		if err := unix.Mount("tmpfs", share, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(share, unix.MNT_DETACH)
	}
	big, err := os.Create(filepath.Join(share, "big"))
	if err != nil {
		t.Fatal(err)
	}
	for range mib {
		if _, err := big.Write(bytes.Repeat([]byte("moovm9P\n"), 1<<17)); err != nil {
			t.Fatal(err)
		}
	}
	big.Close()
	for i := range folders {
		sub := filepath.Join(share, "tree", strconv.Itoa(i))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		for n := range speedFolder {
			if err := os.WriteFile(filepath.Join(sub, "file"+strconv.Itoa(n)), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}

	k, modules := kernelWithModules(t)
	need, err := modules.Resolve("virtio_pci", "9pnet_virtio", "9p")
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	vmlinux := writeTo(t, filepath.Join(dir, "vmlinux"), k)
	initrd := writeTo(t, filepath.Join(dir, "initrd"), &initramfs.Archive{Init: self, Modules: need})
	ours := startSpeedGuest(t, dir, moovmBin, "run", "--accel", "kvm", "--kernel", vmlinux, "--initrd", initrd, "--memory", "512M",
		"--share", "speed="+share, "--no-9p", "--console", "-")
	theirs := startSpeedGuest(t, dir, qemu, "-M", "q35", "-accel", "kvm", "-cpu", "host", "-m", "512", "-nodefaults", "-display", "none", "-no-reboot",
		"-serial", "stdio", "-kernel", vmlinux, "-initrd", initrd, "-append", "console=ttyS0 panic=-1 pci=noearly quiet",
		"-fsdev", "local,id=s,path="+share+",security_model=none,readonly=on", "-device", "virtio-9p-pci,fsdev=s,mount_tag=speed")

	var table strings.Builder
	fmt.Fprintf(&table, "%d MiB, %d files, in %d parts\n| mount options | test | moovm s | QEMU s | QEMU/moovm, median of parts | quartiles |\n|---|---|---|---|---|---|\n",
		mib, folders*speedFolder, parts)
	for _, c := range []struct {
		options, test string
		size          int
	}{
		{"msize=131072,cache=none", "read", mib}, // Linux's default
		{"msize=512000,cache=none", "read", mib},
		{"msize=512000,cache=loose", "read", mib},
		{"msize=512000,cache=none", "find", folders},
		// A tenth of the files: a stat is three requests, each of which takes milliseconds in the sandbox.
		{"msize=512000,cache=none", "find-ls", folders / 10},
	} {
		var sums [2]time.Duration
		var ratios []float64
		for part := range parts {
			line := fmt.Sprintf("%s %s %d %d", c.options, c.test, c.size*part/parts, c.size*(part+1)/parts)
			var took [2]time.Duration
			for i := range took {
				if who := (part + i) % 2; who == 0 {
					took[0] = speedMeasure(ours, line)
				} else {
					took[1] = speedMeasure(theirs, line)
				}
			}
			sums[0] += took[0]
			sums[1] += took[1]
			ratios = append(ratios, took[1].Seconds()/took[0].Seconds())
		}
		slices.Sort(ratios)
		fmt.Fprintf(&table, "| %s | %s | %.1f | %.1f | **%.2f** | %.2f–%.2f |\n", c.options, c.test, sums[0].Seconds(), sums[1].Seconds(),
			ratios[parts/2], ratios[parts/4], ratios[parts*3/4])
		t.Log("\n" + table.String())
	}
	speedEnd(ours)
	speedEnd(theirs)
}

// startSpeedGuest starts a machine whose first process is speedInit.
func startSpeedGuest(t *testing.T, dir, name string, args ...string) *console {
	t.Helper()
	c := startProgram(t, dir, name, args...)
	speedLine(c, "ready")
	return c
}

// speedMeasure lets the guest do what a line says.
func speedMeasure(c *console, line string) time.Duration {
	c.t.Helper()
	c.send(line)
	us, err := strconv.Atoi(speedLine(c, "took"))
	if err != nil || us <= 0 {
		c.t.Fatalf("%s: %d µs, %v", c.cmd.Path, us, err)
	}
	return time.Duration(us) * time.Microsecond
}

// speedLine waits for the next line of results, which has to begin with a
// word, and returns the rest.
func speedLine(c *console, word string) string {
	c.t.Helper()
	c.expect(speedMark)
	begin := c.from
	c.expect("\n")
	line := c.output()[begin:c.from]
	rest, ok := strings.CutPrefix(line, word)
	if !ok {
		c.t.Fatalf("%s: %s", c.cmd.Path, line)
	}
	return strings.TrimSpace(rest)
}

func speedEnd(c *console) {
	c.t.Helper()
	c.send("end")
	if status := c.wait(); status != 0 {
		c.t.Errorf("%s: status %d", c.cmd.Path, status)
	}
}
