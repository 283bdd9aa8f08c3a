package cowdisk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// tool finds a program that others wrote.
func tool(t *testing.T, name, pkg string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		for _, dir := range []string{"/usr/sbin", "/sbin"} {
			if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
				return filepath.Join(dir, name)
			}
		}
		t.Skipf("%s is not installed: apt-get install %s", name, pkg)
	}
	return p
}

// toolTime is enough for what another program does in a test; one that waits forever is killed then.
const toolTime = 2 * time.Minute

// toolCommand runs another program for toolTime at most.
func toolCommand(t *testing.T, name string, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(t.Context(), toolTime)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = 10 * time.Second // for what it left behind with its output
	return cmd
}

func runTool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := toolCommand(t, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// What uml_mkcow makes we read and write, and uml_moo reads it back.
func TestInteropMkcow(t *testing.T) {
	mkcow, moo := tool(t, "uml_mkcow", "uml-utilities"), tool(t, "uml_moo", "uml-utilities")
	for _, size := range []int{4096, 1<<20 + 512, 3<<20 + 700} {
		dir := t.TempDir()
		base, want := baseFile(t, dir, size)
		img := filepath.Join(dir, "a.cow")
		runTool(t, mkcow, img, base)
		// Ours is the same, byte for byte.
		ours := filepath.Join(dir, "ours.cow")
		mustCreate(t, ours, CreateOptions{Backing: "base.img", Variant: UMLV3})
		a, _ := os.ReadFile(img)
		b, _ := os.ReadFile(ours)
		copy(a[32+len(base)+1:], "moovmRAW") // what no other program looks at: behind the path's NUL
		wantSame(t, "v3 image", b, a)
		for _, p := range []string{img, ours} {
			want := bytes.Clone(want)
			d := mustOpen(t, p, Options{})
			for i := range 30 {
				off := rand.IntN(size)
				p := randomBytes(min(9000, size-off), uint64(i))
				copy(want[off:], p)
				if _, err := d.WriteAt(p, int64(off)); err != nil {
					t.Fatal(err)
				}
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			out := filepath.Join(dir, "out.img")
			runTool(t, moo, p, out)
			got, _ := os.ReadFile(out)
			whole := size &^ 511 // uml_moo leaves out a last sector that is not whole
			wantSame(t, "uml_moo of "+filepath.Base(p), got[:whole], want[:whole])
			os.Remove(out)
		}
	}
}

// uml_moo reads every UML layout; for images in the older ones, with any mixture of sectors, it and we agree.
func TestInteropMoo(t *testing.T) {
	moo := tool(t, "uml_moo", "uml-utilities")
	for _, f := range []fixture{{variant: UMLV1, little: true}, {variant: UMLV2}, {variant: UMLV3, align: 4096}} {
		t.Run(f.String(), func(t *testing.T) {
			dir := t.TempDir()
			base, want := baseFile(t, dir, 1<<20)
			st, _ := os.Stat(base)
			f.backing, f.size, f.mtime = base, 1<<20, uint32(st.ModTime().Unix())
			over := randomBytes(1<<20, 3)
			img := filepath.Join(dir, "a.cow")
			writeFile(t, img, f.image(over, func(s int) bool {
				if s*2654435761%7 < 3 {
					copy(want[s*512:s*512+512], over[s*512:])
					return true
				}
				return false
			}))
			check := func(when string) {
				out := filepath.Join(dir, "out.img")
				if o, err := toolCommand(t, moo, img, out).CombinedOutput(); err != nil {
					if f.variant != UMLV3 && strings.Contains(string(o), "magic") {
						t.Skipf("this uml_moo does not read %v: %s", f.variant, o)
					}
					t.Fatalf("uml_moo: %v: %s", err, o)
				}
				got, _ := os.ReadFile(out)
				wantSame(t, "uml_moo "+when, got, want)
				os.Remove(out)
			}
			check("before")
			d := mustOpen(t, img, Options{})
			wantSame(t, "ours", contents(t, d), want)
			p := randomBytes(100000, 9)
			copy(want[70001:], p)
			if _, err := d.WriteAt(p, 70001); err != nil {
				t.Fatal(err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			check("after our writes")
		})
	}
}

// What flatten writes is read by QEMU and by ext4's own checker.
func TestInteropFlatten(t *testing.T) {
	mke2fs, e2fsck, qemu, qio := tool(t, "mke2fs", "e2fsprogs"), tool(t, "e2fsck", "e2fsprogs"), tool(t, "qemu-img", "qemu-utils"), tool(t, "qemu-io", "qemu-utils")
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	os.MkdirAll(filepath.Join(tree, "a/b"), 0o755)
	base, other := filepath.Join(dir, "base.img"), filepath.Join(dir, "other.img")
	runTool(t, mke2fs, "-q", "-t", "ext4", "-d", tree, base, "16M")
	writeFile(t, filepath.Join(tree, "a/b/c"), randomBytes(300000, 5))
	runTool(t, mke2fs, "-q", "-t", "ext4", "-d", tree, other, "16M")
	a, _ := os.ReadFile(base)
	b, _ := os.ReadFile(other)
	img, out := filepath.Join(dir, "a.cow"), filepath.Join(dir, "out.img")
	mustCreate(t, img, CreateOptions{Backing: "base.img"})
	d := mustOpen(t, img, Options{})
	for off := 0; off < len(a); off += 1024 {
		if !bytes.Equal(a[off:off+1024], b[off:off+1024]) {
			if _, err := d.WriteAt(b[off:off+1024], int64(off)); err != nil {
				t.Fatal(err)
			}
		}
	}
	d.Close()
	if err := Flatten(t.Context(), img, out, VariantUnknown, ToolOptions{Options: Options{Format: FormatCOW}}); err != nil {
		t.Fatal(err)
	}
	runTool(t, e2fsck, "-fn", out)
	runTool(t, qemu, "compare", "-f", "raw", "-F", "raw", out, other)
	if o := runTool(t, qio, "-r", "-f", "raw", "-c", fmt.Sprintf("read -v %d 16", 1024), out); !strings.Contains(o, "read 16/16 bytes") {
		t.Errorf("qemu-io: %s", o)
	}
	st, err := os.Stat(out)
	if err != nil || st.Size() != 16<<20 {
		t.Fatalf("%v %v", st, err)
	}
	if f, err := (HostFS{}).Open(out, OpenMode{}); err != nil {
		t.Fatal(err)
	} else {
		i, _ := f.Stat()
		f.Close()
		if i.Allocated > 8<<20 {
			t.Errorf("flatten is not sparse: %d bytes", i.Allocated)
		}
	}
	c, err := Compare(t.Context(), img, other, ToolOptions{Options: Options{Format: FormatCOW}})
	if err != nil || !c.Equal {
		t.Errorf("compare: %+v %v", c, err)
	}
}

// What flatten writes is served by qemu-nbd, and read and written there by qemu-io; an overlay on it shows what was written.
func TestInteropNBD(t *testing.T) {
	nbd, qemu, qio := tool(t, "qemu-nbd", "qemu-utils"), tool(t, "qemu-img", "qemu-utils"), tool(t, "qemu-io", "qemu-utils")
	dir := t.TempDir()
	_, want := baseFile(t, dir, 4<<20)
	img, out, plain := filepath.Join(dir, "a.cow"), filepath.Join(dir, "out.img"), filepath.Join(dir, "plain.img")
	mustCreate(t, img, CreateOptions{Backing: "base.img"})
	d := mustOpen(t, img, Options{})
	copy(want[1<<20+77:], randomBytes(300000, 3))
	d.WriteAt(want[1<<20+77:1<<20+77+300000], 1<<20+77)
	clear(want[3<<20:])
	d.Discard(3<<20, 1<<20)
	d.Close()
	if err := Flatten(t.Context(), img, out, VariantUnknown, ToolOptions{Options: Options{Format: FormatCOW}}); err != nil {
		t.Fatal(err)
	}
	writeFile(t, plain, want)
	socket := filepath.Join(dir, "nbd")
	url := "nbd+unix:///?socket=" + socket
	server := toolCommand(t, nbd, "-f", "raw", "-k", socket, "-t", out)
	var says bytes.Buffer
	server.Stdout, server.Stderr = &says, &says
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer server.Wait()
	defer server.Process.Signal(syscall.SIGTERM)
	for range 600 {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	runTool(t, qemu, "compare", "-f", "raw", "-F", "raw", url, plain)
	if o := runTool(t, qio, "-f", "raw", "-c", "read -P 0 3M 1M", "-c", "write -P 0xa5 5000 70000", "-c", "read -P 0xa5 5000 70000", "-c", "flush", url); strings.Contains(o, "failed") || strings.Contains(o, "error") {
		t.Fatalf("qemu-io: %s", o)
	}
	server.Process.Signal(syscall.SIGTERM)
	if err := server.Wait(); err != nil && says.Len() > 0 {
		t.Fatalf("qemu-nbd: %v: %s", err, &says)
	}
	for i := range 70000 {
		want[5000+i] = 0xa5
	}
	over := filepath.Join(dir, "over.cow")
	mustCreate(t, over, CreateOptions{Backing: "out.img"})
	wantSame(t, "what qemu-io wrote", contents(t, mustOpen(t, over, Options{})), want)
}

// cpio makes an initramfs archive (newc).
func cpio(files map[string][]byte, order []string) []byte {
	var b bytes.Buffer
	add := func(name string, mode int, data []byte) {
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", 0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
		b.WriteString(name + "\x00")
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
		b.Write(data)
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
	}
	for _, name := range order {
		if data, ok := files[name]; ok {
			add(name, 0o100755, data)
		} else {
			add(name, 0o40755, nil)
		}
	}
	add("TRAILER!!!", 0, nil)
	return b.Bytes()
}

// runUML boots User Mode Linux, if need be with help for processors whose extended state is larger than it knows.
func runUML(t *testing.T, linux, dir, initrd, img string) ([]byte, error) {
	t.Helper()
	var env []string
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, linux, "mem=64M", "initrd="+initrd, "ubd0="+img, "con=null", "con0=fd:0,fd:1", "umid=moovm"+filepath.Base(filepath.Dir(dir)), "uml_dir="+dir)
		cmd.Dir, cmd.Env, cmd.WaitDelay = dir, append(os.Environ(), env...), 10*time.Second // its processes hold the output
		out, err := cmd.CombinedOutput()
		switch {
		case bytes.Contains(out, []byte("Run /init")) && !bytes.Contains(out, []byte("PTRACE_SETREG")):
			return out, err
		case env != nil:
			t.Skipf("linux.uml does not run on this machine, nor with testdata/umlxstate.c: %v\n%s", err, out)
		}
		shim := filepath.Join(dir, "umlxstate.so")
		runTool(t, tool(t, "cc", "gcc"), "-shared", "-fPIC", "-o", shim, "testdata/umlxstate.c", "-ldl")
		env = []string{"LD_PRELOAD=" + shim}
	}
}

// A running User Mode Linux reads what we wrote and writes what we then read, in all layouts it knows.
func TestInteropUML(t *testing.T) {
	if testing.Short() {
		t.Skip("boots User Mode Linux; run without -short")
	}
	linux, busybox := tool(t, "linux.uml", "user-mode-linux"), tool(t, "busybox", "busybox-static")
	bb, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	const size = 1 << 20
	for _, f := range []fixture{{variant: UMLV3, align: 4096}, {variant: UMLV2}, {variant: UMLV1, little: true}} {
		t.Run(f.String(), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			base, want := baseFile(t, dir, size)
			st, _ := os.Stat(base)
			f.backing, f.size, f.mtime = base, size, uint32(st.ModTime().Unix())
			img := filepath.Join(dir, "a.cow")
			over := randomBytes(size, 8)
			writeFile(t, img, f.image(over, func(s int) bool { // whole units: UML misreads others
				if s/8%5 == 1 {
					copy(want[s*512:s*512+512], over[s*512:])
					return true
				}
				return false
			}))
			d := mustOpen(t, img, Options{})
			for i := range 10 {
				p := randomBytes(7000, uint64(i))
				copy(want[i*90001:], p)
				if _, err := d.WriteAt(p, int64(i*90001)); err != nil {
					t.Fatal(err)
				}
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			guest := randomBytes(5*4096, 77)
			initrd := filepath.Join(dir, "initrd")
			writeFile(t, initrd, cpio(map[string][]byte{"bin/busybox": bb, "data": guest, "init": []byte(`#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs d /dev
echo "read: $($b sha256sum < /dev/ubda)"
$b dd if=/data of=/dev/ubda bs=4096 seek=30 count=5 conv=notrunc,fsync 2>/dev/null
$b dd if=/data of=/dev/ubda bs=4096 seek=6 count=1 conv=notrunc,fsync 2>/dev/null
echo "wrote: $($b sha256sum < /dev/ubda)"
$b poweroff -f
`)}, []string{"bin", "dev", "bin/busybox", "data", "init"}))
			out, err := runUML(t, linux, dir, initrd, img)
			if err != nil && !bytes.Contains(out, []byte("wrote: ")) {
				t.Fatalf("linux.uml: %v\n%s", err, out)
			}
			line := func(name string, b []byte) {
				t.Helper()
				if sum := fmt.Sprintf("%s: %x", name, sha256Sum(b)); !bytes.Contains(out, []byte(sum)) {
					t.Fatalf("UML did not say %q:\n%s", sum, out)
				}
			}
			line("read", want)
			copy(want[30*4096:], guest)
			copy(want[6*4096:], guest[:4096])
			line("wrote", want)
			d = mustOpen(t, img, Options{})
			wantSame(t, "what UML wrote", contents(t, d), want)
			d.Close()
			if r, err := Check(t.Context(), img, false, ToolOptions{}); err != nil || len(r.Problems) != 0 {
				t.Errorf("check: %+v %v", r, err)
			}
		})
	}
}

func sha256Sum(b []byte) []byte {
	s := sha256.Sum256(b)
	return s[:]
}
