package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// modprobe loads a module of the running kernel, which in the sandbox is the
// guests' kernel.
func modprobe(t *testing.T, module string) {
	t.Helper()
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	release := unix.ByteSliceToString(uts.Release[:])
	args := []string{module}
	if dir := filepath.Dir(filepath.Dir(kernel)); exists(filepath.Join(dir, "lib/modules", release)) {
		args = []string{"-d", dir, "-S", release, module}
	}
	if out, err := execOutput("modprobe", args...); err != nil {
		t.Skipf("needs the kernel module %s (%v: %s); run `make test-e2e`, which runs this in the sandbox", module, err, out)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// The tree on a socket, mounted by this machine's kernel: by path, and by a
// connection that somebody else has made; and asked by diod's client.
func TestServe9P(t *testing.T) {
	needKVM(t)
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount; run `make test-e2e`, which runs it in the sandbox")
	}
	modprobe(t, "9pnet_fd")
	dir := t.TempDir()
	dataDisks(t, dir)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cmd := command(ctx, dir, "serve", "9p", "--listen", "unix:sock", "top.cow,serial=DATA")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "sock")
	var conn net.Conn
	for end := time.Now().Add(patience); conn == nil; time.Sleep(10 * time.Millisecond) {
		var err error
		if conn, err = net.Dial("unix", socket); err != nil && time.Now().After(end) {
			t.Fatal(err)
		}
	}
	defer conn.Close()
	const options = "version=9p2000.L,msize=512000,cache=none,access=any"
	look := func(name, options string) {
		mnt := filepath.Join(dir, "mnt-"+name)
		if err := os.Mkdir(mnt, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(socket, mnt, "9p", unix.MS_RDONLY, options); err != nil {
			t.Fatalf("mount -o %s: %v", options, err)
		}
		defer func() {
			if err := unix.Unmount(mnt, 0); err != nil {
				t.Error(err)
			}
		}()
		if out, err := execOutput("cp", "-a", mnt+"/disks/vda", filepath.Join(dir, name)); err != nil || out != "" {
			t.Fatalf("cp: %v\n%s", err, out)
		}
		if to, err := os.Readlink(mnt + "/disks/by-serial/DATA"); to != "../vda" || err != nil {
			t.Errorf("by-serial: %s, %v", to, err)
		}
		wantTree(t, dir, filepath.Join(dir, name), "top.cow", map[string]string{"serial": "DATA", "read_only": "1"})
	}
	look("unix", "trans=unix,"+options)
	f, err := conn.(*net.UnixConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	look("fd", fmt.Sprintf("trans=fd,rfdno=%d,wfdno=%d,%s", f.Fd(), f.Fd(), options))

	if _, err := exec.LookPath("diodcat"); err != nil {
		t.Log("without diod's client: diodcat is not installed")
	} else {
		out, err := execOutput("diodcat", "-s", socket, "-a", "/", "version", "disks/vda/format")
		if err != nil || !strings.HasSuffix(out, "\ncow\n") {
			t.Errorf("diodcat: %q, %v", out, err)
		}
		out, err = execOutput("diodls", "-s", socket, "-a", "disks", "vda")
		if err != nil || strings.Join(strings.Fields(out), " ") != "allocated backing_file bitmap format header info map mtime read_only sector_size serial size stats variant chain" {
			t.Errorf("diodls: %q, %v", out, err)
		}
	}
	cancel()
	if err := cmd.Wait(); err != nil && cmd.ProcessState.ExitCode() != 0 {
		t.Errorf("serve 9p ended with %v", err)
	}
	if exists(socket) {
		t.Error("the socket is still there")
	}
}
