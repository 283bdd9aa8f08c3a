package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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

	"github.com/moovm/moovm/guest"
)

// speedMark begins a line of results on the console.
const speedMark = "share-speed "

// speedInit is PID 1 of the guests of TestLongShareSpeed: this test binary. It
// mounts the share again and again, reads and walks it, and says on the
// console how long that took.
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
	modules, err := filepath.Glob(guest.ModulesPath + "/*") // sorted
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
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	for _, word := range strings.Fields(string(cmdline)) {
		what, ok := strings.CutPrefix(word, "share-speed=")
		if !ok {
			continue
		}
		for _, options := range strings.Split(what, "/") {
			if err := unix.Mount("speed", "/m", "9p", unix.MS_RDONLY, "trans=virtio,version=9p2000.L,"+options); err != nil {
				return fmt.Errorf("mount -o %s: %w", options, err)
			}
			for _, c := range []struct {
				name string
				run  func() error
			}{
				{"read", speedRead},
				{"find", func() error { return speedFind(false, "") }},
				// A tenth of the files: a stat is three requests, each of which takes milliseconds in the sandbox.
				{"find-ls", func() error { return speedFind(true, "0", "1", "2", "3", "4", "5", "6", "7", "8", "9") }},
			} {
				if strings.Contains(options, "cache=loose") && c.name != "read" {
					continue
				}
				start := time.Now()
				if err := c.run(); err != nil {
					return fmt.Errorf("%s: %w", c.name, err)
				}
				fmt.Printf("%s%s %s %d\n", speedMark, options, c.name, time.Since(start).Microseconds())
			}
			if err := unix.Unmount("/m", 0); err != nil {
				return err
			}
		}
	}
	fmt.Println(speedMark + "done")
	return nil
}

func speedRead() error {
	f, err := os.Open("/m/big")
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 1<<20)
	for {
		if _, err := f.Read(b); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// speedFind walks folders of the tree, as find does, and asks for each file's
// attributes if stat is set.
func speedFind(stat bool, folders ...string) error {
	n := 0
	for _, f := range folders {
		err := filepath.WalkDir("/m/tree/"+f, func(_ string, e fs.DirEntry, err error) error {
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
	if n < 1000 {
		return fmt.Errorf("%d files", n)
	}
	return nil
}

// Our 9P device next to QEMU's, as guests of the same host: the same kernel,
// initramfs, folder and mount options. It measures, and asserts only that
// both worked; docs/BENCH-9P.md has the results.
//
//	MOOVM_SHARE_MIB, MOOVM_SHARE_FILES, MOOVM_SHARE_ROUNDS, MOOVM_SHARE_OPTIONS
//
// change the file's size, the number of files, how often, and the mounts.
func TestLongShareSpeed(t *testing.T) {
	long(t)
	needKVM(t)
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("needs qemu-system-x86_64; run make setup")
	}
	number := func(name string, def int) int {
		if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
			return n
		}
		return def
	}
	mib, files, rounds := number("MOOVM_SHARE_MIB", 1024), number("MOOVM_SHARE_FILES", 10_000), number("MOOVM_SHARE_ROUNDS", 3)
	mounts := os.Getenv("MOOVM_SHARE_OPTIONS")
	if mounts == "" {
		mounts = "msize=512000,cache=none/msize=512000,cache=loose"
	}

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
	for i := range files {
		sub := filepath.Join(share, "tree", strconv.Itoa(i/100))
		if i%100 == 0 {
			if err := os.MkdirAll(sub, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(sub, "file"+strconv.Itoa(i)), nil, 0o644); err != nil {
			t.Fatal(err)
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
	initrd := writeTo(t, filepath.Join(dir, "initrd"), &guest.Initramfs{Init: self, Modules: need})

	word := "share-speed=" + mounts
	vmms := map[string][]string{
		"moovm": {moovmBin, "run", "--accel", "kvm", "--kernel", vmlinux, "--initrd", initrd, "--memory", "512M",
			"--append", word, "--share", "speed=" + share, "--no-9p", "--console", "-"},
		"qemu": {qemu, "-M", "q35", "-accel", "kvm", "-cpu", "host", "-m", "512", "-nodefaults", "-display", "none", "-no-reboot",
			"-serial", "stdio", "-kernel", vmlinux, "-initrd", initrd, "-append", "console=ttyS0 panic=-1 pci=noearly quiet " + word,
			"-fsdev", "local,id=s,path=" + share + ",security_model=none,readonly=on", "-device", "virtio-9p-pci,fsdev=s,mount_tag=speed"},
	}
	results := make(map[string]map[string][]float64) // options and test, machine, seconds
	names := []string{}
	for round := range rounds {
		for _, vmm := range []string{"moovm", "qemu"} {
			for try := 0; ; try++ {
				got, err := speedBoot(t, dir, vmms[vmm])
				if err != nil && try < 2 {
					t.Logf("round %d: %s: %v; again", round, vmm, err)
					continue
				}
				if err != nil {
					t.Fatalf("%s: %v", vmm, err)
				}
				t.Logf("round %d: %s: %v", round, vmm, got)
				for name, seconds := range got {
					if results[name] == nil {
						results[name] = make(map[string][]float64)
						names = append(names, name)
					}
					results[name][vmm] = append(results[name][vmm], seconds)
				}
				break
			}
		}
	}
	slices.Sort(names)
	median := func(v []float64) float64 {
		v = slices.Clone(v)
		slices.Sort(v)
		return v[len(v)/2]
	}
	var table strings.Builder
	fmt.Fprintf(&table, "read: %d MiB; find: %d files; find-ls: 1000 of them; medians of %d\n| mount options, test | moovm s | QEMU s | QEMU/moovm |\n|---|---|---|---|\n", mib, files, rounds)
	for _, name := range names {
		m, q := results[name]["moovm"], results[name]["qemu"]
		fmt.Fprintf(&table, "| %s | %.2f | %.2f | **%.2f** | %.2f %.2f\n", name, median(m), median(q), median(q)/median(m), m, q)
	}
	t.Log("\n" + table.String())
	if len(names) == 0 {
		t.Error("nothing was measured")
	}
}

// speedBoot runs a guest of speedInit to its end.
func speedBoot(t *testing.T, dir string, args []string) (map[string]float64, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%w\n%s", err, out)
	}
	got, done := make(map[string]float64), false
	for s := bufio.NewScanner(bytes.NewReader(out)); s.Scan(); {
		line, ok := strings.CutPrefix(strings.TrimSpace(s.Text()), speedMark)
		f := strings.Fields(line)
		if !ok || len(f) == 0 {
			continue
		}
		if f[0] == "failed" {
			return nil, errors.New(line)
		}
		done = done || f[0] == "done"
		if len(f) == 3 {
			us, err := strconv.ParseFloat(f[2], 64)
			if err != nil {
				return nil, err
			}
			got[f[0]+" "+f[1]] = us / 1e6
		}
	}
	if !done || len(got) == 0 {
		return nil, fmt.Errorf("the guest ended too early:\n%s", out)
	}
	return got, nil
}
