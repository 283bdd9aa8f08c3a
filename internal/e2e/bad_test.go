package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// What cannot work ends with one sentence and the right status, and leaves
// everything as it was.
func TestBadInput(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	overlay(t, dir)
	before := checksum(t, filepath.Join(dir, "root.cow"))
	for name, size := range map[string]int64{"huge.cpio": 600 << 20} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	vmlinuz, err := os.ReadFile(kernel)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"half":  vmlinuz[:len(vmlinuz)/2], // a download that broke off
		"text":  []byte("hello\n"),
		"empty": nil,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	noModules := t.TempDir()

	for _, c := range []struct {
		name  string
		args  []string
		wants []string // in stderr
	}{
		{"initrd larger than memory", []string{"--initrd", "huge.cpio", "--memory", "256M"}, []string{"initrd", "memory"}},
		{"memory of 1 MiB", []string{"--memory", "1M"}, []string{"memory"}},
		{"memory too small for the kernel", []string{"--memory", "24M"}, []string{"memory"}},
		{"half a kernel", []string{"--kernel", "half"}, []string{"half"}},
		{"no kernel", []string{"--kernel", "text"}, []string{"text", "kernel"}},
		{"empty kernel", []string{"--kernel", "empty"}, []string{"empty"}},
		{"no modules", []string{"--modules", noModules}, []string{"modules"}},
		{"unknown root", []string{"--append", "root=/dev/vdq"}, []string{"/dev/vdq", "vda"}},
		{"unknown root by label", []string{"--append", "root=LABEL=nowhere"}, []string{"nowhere", "vda"}},
		{"root= that names nothing", []string{"--append", "root=UUID="}, []string{"root=UUID="}},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := c.args
			if args[0] != "--initrd" {
				args = append(args, sh("true")...)
			}
			r := moovm(t, dir, runArgs(args...)...)
			r.wantStatus(t, 125)
			for _, want := range c.wants {
				r.wantStderr(t, want)
			}
			if strings.Contains(r.stderr, "panic:") || strings.Contains(r.stderr, "goroutine ") {
				t.Errorf("not a sentence:\n%s", r.stderr)
			}
		})
	}
	if after := checksum(t, filepath.Join(dir, "root.cow")); after != before {
		t.Error("the overlay changed")
	}
}

// A command that the disk does not have is 127, as in a shell.
func TestCommandNotFound(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	r := moovm(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img", "--", "no-such-command")
	r.wantStatus(t, 127)
	r.wantStderr(t, "no-such-command")
}

// A read-only file system: looking works, writing is refused by name.
func TestReadOnlyFileSystem(t *testing.T) {
	needKVM(t)
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount a file system read-only; run `make test-e2e`, which runs it in the sandbox")
	}
	dir := folder(t)
	overlay(t, dir)
	if err := syscall.Mount(dir, dir, "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	if err := syscall.Mount("", dir, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	moovm(t, dir, "info", "root.cow").wantStatus(t, 0)
	r := moovm(t, dir, "create", "-b", "base.img", "new.cow")
	r.wantStatus(t, 1)
	r.wantStderr(t, "new.cow")
	r.wantStderr(t, "read-only file system")
	r = moovm(t, dir, runArgs(sh("true")...)...)
	r.wantStatus(t, 125)
	r.wantStderr(t, "root.cow")
	r.wantStderr(t, "read-only file system")
	// The disk can still be read.
	r = moovm(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--disk", "root.cow,ro", "--", "cat", "/etc/hostname")
	r.wantStatus(t, 0)
	if r.stdout != "moovm\n" {
		t.Errorf("the guest read %q", r.stdout)
	}
}

// A KVM that is none is status 125 with a sentence that says what to do.
func TestUnusableKVM(t *testing.T) {
	needKVM(t)
	if os.Getuid() != 0 {
		t.Skip("needs root, to hide /dev/kvm; run `make test-e2e`, which runs it in the sandbox")
	}
	dir := folder(t)
	overlay(t, dir)
	if err := syscall.Mount("/dev/null", "/dev/kvm", "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer syscall.Unmount("/dev/kvm", 0)
	r := moovm(t, dir, runArgs(sh("true")...)...)
	r.wantStatus(t, 125)
	r.wantStderr(t, "/dev/kvm")
	r.wantStderr(t, "--accel sandbox")
	d := moovm(t, dir, "doctor", "--json")
	if !strings.Contains(d.stdout, `"accel": "sandbox"`) && !strings.Contains(d.stdout, `"accel": "none"`) {
		t.Errorf("the doctor does not see it: %v", d)
	}
}

// A shared folder is at /mnt/TAG, read-only unless it was given to write to.
func TestShares(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	ro, rw := filepath.Join(dir, "ro"), filepath.Join(dir, "rw")
	for _, d := range []string{ro, rw} {
		if err := os.Mkdir(d, 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d, "file"), []byte("host\n"), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	r := moovm(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img", "--share", "a=ro", "--share", "b=rw,rw",
		"--", "sh", "-c", "cat /mnt/a/file /mnt/b/file; echo guest > /mnt/b/file; mkdir /mnt/b/new; ! touch /mnt/a/x")
	r.wantStatus(t, 0)
	if r.stdout != "host\nhost\n" {
		t.Errorf("the guest read %q", r.stdout)
	}
	if got, err := os.ReadFile(filepath.Join(rw, "file")); err != nil || string(got) != "guest\n" {
		t.Errorf("after the guest wrote: %q, %v", got, err)
	}
	if st, err := os.Stat(filepath.Join(rw, "new")); err != nil || !st.IsDir() {
		t.Errorf("the folder that the guest made: %v", err)
	}
	if left, _ := os.ReadDir(ro); len(left) != 1 {
		t.Errorf("the read-only share has %d files", len(left))
	}
}

// A Linux guest changes what it has open after the name has gone or is another
// file's.
func TestShareRemovedWhileOpen(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	rw := filepath.Join(dir, "rw")
	if err := os.Mkdir(rw, 0o777); err != nil {
		t.Fatal(err)
	}
	const script = `
chdir "/mnt/b" or die "chdir: $!";
sub make { open(my $f, "+>", $_[0]) or die "$_[0]: $!"; syswrite($f, "text") == 4 or die "write: $!"; $f }
sub change {
	my ($f, $what) = @_;
	truncate($f, 2) or die "$what: ftruncate: $!";
	chmod(0604, $f) or die "$what: fchmod: $!";
	utime(1, 2, $f) or die "$what: futimens: $!";
	chown(0, 0, $f) or die "$what: fchown: $!";
	my @st = stat($f);
	$st[7] == 2 && ($st[2] & 0777) == 0604 && $st[9] == 2 or die "$what: @st";
}
my $f = make("a"); unlink("a") or die $!; change($f, "unlink");
$f = make("b"); make("c"); rename("c", "b") or die $!; change($f, "rename");
$f = make("d"); link("d", "e") or die $!; unlink("d") or die $!; change($f, "link");
$f = make("g"); link("g", "h") or die $!; rename("g", "h") or die $!; change($f, "same");
open(my $again, "+<", "h") or die "open after a rename of one link to another: $!";
print "good\n";
`
	r := moovm(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img", "--share", "b=rw,rw", "--", "perl", "-e", script)
	r.wantStatus(t, 0)
	if r.stdout != "good\n" {
		t.Errorf("the guest said %q", r.stdout)
	}
}
