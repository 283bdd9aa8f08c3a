package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A real Debian with systemd comes up to its login prompt, lets root in over
// the serial console and powers off when told to.
func TestDebianLogin(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	before := checksum(t, filepath.Join(dir, "base.img"))
	overlay(t, dir)

	c := start(t, dir, runArgs("--memory", "512M")...)
	c.expect("moovm login: ")
	c.send("root")
	c.expect("root@moovm")
	c.send("stty -echo; systemctl --no-pager --failed; systemctl is-active multi-user.target")
	c.expect("0 loaded units listed")
	c.send("findmnt -no SOURCE,FSTYPE /; findmnt -no SOURCE,FSTYPE /run/moovm; cat /run/moovm/disks/vda/format")
	c.expect("/dev/vda")
	c.expect("ext4")
	c.expect("moovm")
	c.expect("9p")
	c.expect("cow")
	c.send("echo kept > /root/kept; sync; echo synced=$?")
	c.expect("synced=0")
	c.send("systemctl poweroff")
	if status := c.wait(); status != 0 {
		t.Fatalf("exit status %d after systemctl poweroff", status)
	}

	r := moovm(t, dir, runArgs(sh("cat /root/kept")...)...)
	r.wantStatus(t, 0)
	if r.stdout != "kept\n" {
		t.Fatalf("after a new boot the file says %q\n%v", r.stdout, r)
	}
	fsck(t, dir, "root.cow", false)
	if after := checksum(t, filepath.Join(dir, "base.img")); after != before {
		t.Fatal("the base image changed")
	}
}

// A command's status is the machine's, its output is all of stdout, and an
// ephemeral overlay leaves nothing behind.
func TestCommandStatus(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	before := checksum(t, filepath.Join(dir, "base.img"))
	r := moovm(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img",
		"--", "sh", "-c", "echo out; echo err >&2; echo lost > /lost; ulimit -Sn; ulimit -Hn; exit 7")
	r.wantStatus(t, 7)
	if r.stdout != "out\n1024\n524288\n" { // open files as systemd allows
		t.Errorf("stdout is %q", r.stdout)
	}
	r.wantStderr(t, "err\n")
	onlyBase(t, dir)
	r = moovm(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img", "--", "test", "-e", "/lost")
	r.wantStatus(t, 1)
	if after := checksum(t, filepath.Join(dir, "base.img")); after != before {
		t.Fatal("the base image changed")
	}
}

// onlyBase fails if dir has other files than the base image.
func onlyBase(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "base.img" {
			t.Errorf("left behind: %s", e.Name())
		}
	}
}

// Standard input reaches the command, to its end.
func TestCommandStdin(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := command(ctx, dir, "run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img", "--", "sha256sum")
	cmd.Stdin = bytes.NewReader(bytes.Repeat([]byte("0123456789abcde\n"), 4096))
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := string(out[:64]); got != sha256Text(strings.Repeat("0123456789abcde\n", 4096)) {
		t.Fatalf("the guest got another input: sha256 %s", got)
	}
}

// Ctrl-C and kill -9 leave neither an overlay file nor a changed base.
func TestEphemeralInterrupted(t *testing.T) {
	needKVM(t)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			dir := folder(t)
			tmp := t.TempDir()
			t.Setenv("TMPDIR", tmp)
			c := start(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img",
				"--", "sh", "-c", "echo junk > /junk; sync; echo up; sleep 1000")
			c.expect("up")
			if err := c.cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			if status := c.wait(); status == 0 {
				t.Error("exit status 0 after ", sig)
			}
			onlyBase(t, dir)
			left, err := os.ReadDir(tmp)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range left {
				t.Errorf("left behind in the temporary folder: %s", e.Name())
			}
			r := moovm(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img", "--", "test", "!", "-e", "/junk")
			r.wantStatus(t, 0)
		})
	}
}

func TestKernelPanic(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	overlay(t, dir)
	r := moovm(t, dir, runArgs(sh("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 100")...)...)
	r.wantStatus(t, 126)
	r.wantStderr(t, "Kernel panic - not syncing: sysrq triggered crash")
	r.wantStderr(t, "sysrq_handle_crash") // the last lines of the console, not only the headline
}

func TestTimeout(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	overlay(t, dir)
	r := moovm(t, dir, runArgs(append([]string{"--timeout", "20s"}, sh("sleep 1000")...)...)...)
	r.wantStatus(t, 124)
	r.wantStderr(t, "20s")
	// The machine's end is a power cut for the guest: the disk is usable.
	moovm(t, dir, runArgs(sh("true")...)...).wantStatus(t, 0)
}

// The 9P tree says what moovm says on the host, follows the guest's writes and
// refuses writes to itself.
func TestMetadataTree(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	overlay(t, dir)
	info := moovm(t, dir, "info", "--json", "root.cow")
	info.wantStatus(t, 0)

	r := moovm(t, dir, runArgs(sh(`
		cd /run/moovm/disks/vda
		echo "fs=$(findmnt -no FSTYPE /run/moovm)"
		echo "info=$(tr -d '\n' < info)"
		echo "allocated=$(cat allocated)"
		echo "map=$(sha256sum < map)"
		dd if=/dev/urandom of=/new bs=1M count=8 conv=fsync 2>/dev/null
		echo "allocated=$(cat allocated)"
		echo "map=$(sha256sum < map)"
		echo "writes=$(grep '^writes ' stats)"
		touch x 2>&1 || echo "touch=$?"
		echo 1 2>&1 > allocated || echo "write=$?"
		rm info 2>&1 || echo "rm=$?"
	`)...)...)
	r.wantStatus(t, 0)
	values := make(map[string][]string)
	for _, line := range strings.Split(r.stdout, "\n") {
		if k, v, ok := strings.Cut(line, "="); ok {
			values[k] = append(values[k], v)
		}
	}
	if got := values["fs"]; len(got) != 1 || got[0] != "9p" {
		t.Errorf("/run/moovm is %v, want 9p", got)
	}
	if diff := sameInfo(t, values["info"], info.stdout); diff != "" {
		t.Error(diff)
	}
	var before, after int
	if got := values["allocated"]; len(got) != 2 {
		t.Fatalf("allocated: %v\n%v", got, r)
	} else {
		fmt.Sscan(got[0], &before)
		fmt.Sscan(got[1], &after)
	}
	if after-before < 8<<20/512 {
		t.Errorf("8 MiB written, allocated went from %d to %d sectors", before, after)
	}
	if m := values["map"]; len(m) != 2 || m[0] == m[1] {
		t.Errorf("the map did not change: %v", m)
	}
	if len(values["touch"]) == 0 || len(values["rm"]) == 0 {
		t.Errorf("the tree took a write\n%v", r)
	}
	if n := strings.Count(r.stdout+r.stderr, "Read-only file system"); n < 2 {
		t.Errorf("%d of the writes were refused with EROFS\n%v", n, r)
	}
}

// sameInfo compares the guest's info with the host's, field by field, but for
// those that move while the guest runs.
func sameInfo(t *testing.T, guest []string, host string) string {
	t.Helper()
	if len(guest) != 1 {
		return fmt.Sprintf("info in the guest: %q", guest)
	}
	var g, h map[string]any
	if err := json.Unmarshal([]byte(guest[0]), &g); err != nil {
		return "info in the guest: " + err.Error()
	}
	if err := json.Unmarshal([]byte(host), &h); err != nil {
		return "info on the host: " + err.Error()
	}
	for _, m := range []map[string]any{g, h} {
		delete(m, "actual-size")
		delete(m, "full-backing-filename") // a host path, not for guests
		if s, ok := m["format-specific"].(map[string]any); ok {
			delete(s, "allocated-sectors")
			if d, ok := s["data"].(map[string]any); ok {
				delete(d, "allocated-sectors")
			}
		}
	}
	a, _ := json.Marshal(g)
	b, _ := json.Marshal(h)
	if !bytes.Equal(a, b) {
		return fmt.Sprintf("info differs:\nguest %s\nhost  %s", a, b)
	}
	return ""
}

// Two guests run on two overlays of one base; one overlay takes one writer.
func TestTwoGuests(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	overlay(t, dir)
	moovm(t, dir, "create", "-b", "base.img", "other.cow").wantStatus(t, 0)

	one := start(t, dir, runArgs(sh("echo one > /which; sync; echo ready; read line; cat /which")...)...)
	one.expect("ready")
	second := moovm(t, dir, runArgs(sh("true")...)...)
	second.wantStatus(t, 125)
	second.wantStderr(t, "root.cow")
	second.wantStderr(t, "in use")

	two := moovm(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--disk", "other.cow", "--", "sh", "-c", "test ! -e /which; echo two > /which; cat /which")
	two.wantStatus(t, 0)
	if two.stdout != "two\n" {
		t.Errorf("the second guest says %q", two.stdout)
	}
	one.send("go")
	one.expect("one")
	if status := one.wait(); status != 0 {
		t.Errorf("the first guest ended with %d", status)
	}
	fsck(t, dir, "root.cow", false)
	fsck(t, dir, "other.cow", false)
}

// A gigabyte written and synced is there after a reboot.
func TestGigabyte(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	overlay(t, dir)
	sum := regexp.MustCompile(`(?m)^([0-9a-f]{32})  `)
	r := moovm(t, dir, runArgs(sh("dd if=/dev/urandom of=/big bs=1M count=1024 conv=fsync 2>&1; md5sum /big")...)...)
	r.wantStatus(t, 0)
	wrote := sum.FindStringSubmatch(r.stdout)
	r = moovm(t, dir, runArgs(sh("md5sum /big; stat -c size=%s /big")...)...)
	r.wantStatus(t, 0)
	read := sum.FindStringSubmatch(r.stdout)
	if wrote == nil || read == nil || wrote[1] != read[1] {
		t.Fatalf("wrote %v, read %v", wrote, read)
	}
	if !strings.Contains(r.stdout, "size=1073741824") {
		t.Fatalf("not a gigabyte: %s", r.stdout)
	}
	fsck(t, dir, "root.cow", false)
}

// The VMM is killed in the middle of a sync-heavy load: the image opens, e2fsck
// repairs only the journal, and every file whose fsync had returned is whole.
func TestKillDuringSync(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	overlay(t, dir)
	c := start(t, dir, runArgs(sh(`
		mkdir /work; i=0
		while :; do
			i=$((i+1))
			dd if=/dev/urandom of=/work/$i bs=16k count=$((i % 7 + 1)) conv=fsync 2>/dev/null
			sync /work
			echo "done $i $(md5sum < /work/$i)"
		done
	`)...)...)
	c.expect("done 20 ")
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	c.wait()

	moovm(t, dir, "info", "root.cow").wantStatus(t, 0)
	fsck(t, dir, "root.cow", true)
	promised := regexp.MustCompile(`(?m)^done (\d+) ([0-9a-f]{32})  -$`).FindAllStringSubmatch(c.output(), -1)
	if len(promised) < 20 {
		t.Fatalf("only %d files were promised", len(promised))
	}
	var script strings.Builder
	for _, p := range promised {
		fmt.Fprintf(&script, "echo '%s  /work/%s'\n", p[2], p[1])
	}
	// The list comes on standard input: it may be too long for a command line.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	check := command(ctx, dir, runArgs("--", "sh", "-c", "sh | md5sum -c --quiet")...)
	check.Stdin = strings.NewReader(script.String())
	if out, err := check.CombinedOutput(); err != nil {
		t.Fatalf("of %d files that were synced, not all are whole: %v\n%s", len(promised), err, out)
	}
	t.Logf("%d synced files are whole", len(promised))
}

// A full disk below the overlay is an I/O error in the guest and leaves the
// image consistent.
func TestHostDiskFull(t *testing.T) {
	needKVM(t)
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount a small tmpfs; run `make test-e2e`, which runs it in the sandbox")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=400m"); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	unmount := func() { once.Do(func() { syscall.Unmount(dir, syscall.MNT_DETACH) }) }
	t.Cleanup(unmount)
	linkBase(t, dir) // about 300 MiB of it
	overlay(t, dir)
	// Past the page cache: ext4 of Linux 6.1 takes buffered writes after its journal is gone, with a superblock write and
	// five lines on the console for each of their pages, which is minutes of it.
	r := moovm(t, dir, runArgs(sh("dd if=/dev/urandom of=/big bs=1M count=300 oflag=direct 2>&1 || echo dd=$?")...)...)
	if !strings.Contains(r.stdout, "dd=1") || !strings.Contains(r.stdout, "error") && !strings.Contains(r.stdout, "Read-only") {
		t.Fatalf("the guest saw no I/O error\n%v", r)
	}
	moovm(t, dir, "info", "root.cow").wantStatus(t, 0)
	check := moovm(t, dir, "check", "root.cow")
	check.wantStatus(t, 0)

	// With room again the same image works on.
	roomy := t.TempDir()
	linkBase(t, roomy)
	stat, err := os.Stat(filepath.Join(dir, "base.img"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(filepath.Join(roomy, "base.img"), stat.ModTime(), stat.ModTime()); err != nil {
		t.Fatal(err)
	}
	if out, err := execOutput("cp", "--sparse=always", filepath.Join(dir, "root.cow"), filepath.Join(roomy, "root.cow")); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	moovm(t, roomy, runArgs(sh("echo fine > /fine; sync; cat /fine")...)...).wantStatus(t, 0)
}

// Debian's reboot is seen as such.
func TestReset(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	overlay(t, dir)
	start := time.Now()
	r := moovm(t, dir, runArgs(sh("echo b > /proc/sysrq-trigger; sleep 1000")...)...)
	if r.status != 125 || time.Since(start) > patience/2 {
		t.Fatalf("a guest that resets before its command ended: %v", r)
	}
	r.wantStderr(t, "reset")
}

// --base and --disk go together: the base's overlay is vda, the disk follows
// and keeps what was written.
func TestBaseAndDisk(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	before := checksum(t, filepath.Join(dir, "base.img"))
	if err := os.WriteFile(filepath.Join(dir, "data.img"), make([]byte, 1<<20), 0o666); err != nil {
		t.Fatal(err)
	}
	r := moovm(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img", "--disk", "data.img,format=raw,serial=data", "--",
		"sh", "-c", "findmnt -n -o SOURCE /; cat /sys/block/vda/size /sys/block/vdb/size; echo kept > /dev/vdb; echo lost > /lost; sync; "+
			"grep xfs /proc/filesystems; mount -t xfs /dev/vdb /mnt 2>/dev/null; grep xfs /proc/filesystems; [ ! -e /sbin/modprobe ]")
	r.wantStatus(t, 0)
	st, err := os.Stat(filepath.Join(dir, "base.img"))
	if err != nil {
		t.Fatal(err)
	}
	// The kernel knows xfs from when somebody wants it, though the base has no modprobe.
	if want := fmt.Sprintf("/dev/vda\n%d\n2048\n\txfs\n", st.Size()/512); r.stdout != want {
		t.Errorf("stdout %q, want %q", r.stdout, want)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "data.img")); err != nil || !strings.HasPrefix(string(b), "kept\n") {
		t.Errorf("the disk: %q, %v", b[:min(len(b), 16)], err)
	}
	if after := checksum(t, filepath.Join(dir, "base.img")); after != before {
		t.Error("the base was changed")
	}
}
