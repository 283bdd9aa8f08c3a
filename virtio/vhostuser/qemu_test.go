package vhostuser_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/virtioblk"
)

// qemu is a running QEMU with nothing but a serial port and our disks.
type qemu struct {
	t      *testing.T
	cmd    *exec.Cmd
	in     io.WriteCloser // what is typed on the serial port
	out    lockedBuffer   // what it prints
	stderr bytes.Buffer
	ended  chan struct{}
}

// vhostDisk are the arguments for a disk with a server at sock; QEMU connects
// again when the server is gone.
func vhostDisk(sock, options string) []string {
	id := fmt.Sprintf("c%x", []byte(filepath.Base(filepath.Dir(sock))+filepath.Base(sock)))
	return []string{"-chardev", "socket,id=" + id + ",reconnect=1,path=" + sock, "-device", "vhost-user-blk-pci,chardev=" + id + options}
}

// startQEMU starts a machine by software emulation, with so many MiB of memory
// that it shares with the servers. It is killed at the end of the test, or
// after limit.
func startQEMU(t *testing.T, machine string, memory int, limit time.Duration, args ...string) *qemu {
	t.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is missing: apt-get install qemu-system-x86")
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	q := &qemu{t: t, ended: make(chan struct{})}
	q.cmd = exec.CommandContext(ctx, path, append([]string{"-accel", "tcg,thread=multi", "-cpu", "max", "-display", "none", "-nodefaults", "-no-reboot",
		"-m", fmt.Sprint(memory), "-object", fmt.Sprintf("memory-backend-memfd,id=m,size=%dM,share=on", memory), "-machine", machine + ",memory-backend=m",
		"-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"}, args...)...)
	q.cmd.Stdout, q.cmd.Stderr = &q.out, &q.stderr
	if q.in, err = q.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := q.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { defer close(q.ended); q.cmd.Wait() }()
	t.Cleanup(func() {
		cancel()
		<-q.ended
		if t.Failed() {
			t.Logf("%v\n%s\n%s", q.cmd.ProcessState, q.out.String(), q.stderr.String())
		}
	})
	return q
}

// says waits until the machine has printed text, after what was waited for
// before; false if it ended first.
func (q *qemu) says(text string) bool {
	for {
		ended := false
		select {
		case <-q.ended:
			ended = true
		case <-time.After(10 * time.Millisecond):
		}
		if strings.Contains(q.out.String(), text) {
			return true
		}
		if ended {
			return false
		}
	}
}

// expect is says, or the end of the test.
func (q *qemu) expect(text string) {
	q.t.Helper()
	if !q.says(text) {
		q.t.Fatalf("the machine ended before it said %q", text)
	}
}

// killing kills a server every so often, at most n times, until the machine
// ends.
func (q *qemu) killing(d *daemon, every time.Duration, n int) {
	for {
		select {
		case <-q.ended:
			return
		case <-time.After(every):
			if d.kills < n {
				d.kill()
			}
		}
	}
}

// bootDisk writes a disk of 1 MiB with a boot sector.
func bootDisk(t *testing.T, path, sector string) []byte {
	t.Helper()
	disk := make([]byte, 1<<20)
	code, err := hex.DecodeString(sector)
	if err != nil {
		t.Fatal(err)
	}
	copy(disk, code)
	copy(disk[510:], "\x55\xaa")
	for i := range 4096 {
		disk[512+i] = byte(i*7 + i/256)
	}
	if err := os.WriteFile(path, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	return disk
}

// debugExit is QEMU's exit status after the boot sectors' last instruction:
// twice the value plus one.
const debugExit = 33

// bootSector is a 16-bit program: through the BIOS (INT 13h) it reads 8 sectors
// from sector 1 on, inverts every byte and writes them to sector 16; then it
// prints how that went on the first serial port and ends the machine through
// port 0xf4. Its source is in testdata/boot.s.
const bootSector = "fa31c08ed88ec08ed0bc007cfb8816897cbe537cb442cd137224bf0080b90010" +
	"f61547e2fbc7065b7c1000be537c8a16897cb80043cd137205be637ceb03be74" +
	"7cac84c07406baf803eeebf5b010e6f4f4ebfd10000800008000000100000000" +
	"0000006d6f6f766d3a20626f6f74206f6b0d0a006d6f6f766d3a20626f6f7420" +
	"6661696c65640d0a00"

// verifySector writes and reads back 4 KiB 3000 times; see testdata/verify.s.
const verifySector = "fa31c08ed88ec08ed0bc007cfb8816dc7cbeaf7ce87c00c706dd7c0000a1dd7c" +
	"d1e040bf0080b90008ab40e2fca1dd7c83e03fc1e00383c040a3a77cc706a37c" +
	"0080be9f7c8a16dc7cb80043cd137236c706a37c0090be9f7c8a16dc7cb442cd" +
	"137223be0080bf0090b90008f3a77511ff06dd7c813edd7cb80b75a1beb77ceb" +
	"08bec37ceb03bed07ce80700b010e6f4f4ebfdac84c07406baf803eeebf5c310" +
	"000800000000000000000000000000626567696e0d0a00766572696679206f6b" +
	"0d0a0077726f6e6720646174610d0a00492f4f206572726f720d0a00000000"

// The server is killed with SIGKILL again and again while a guest writes and
// reads back, and started again: the guest notices nothing. With an overlay, no
// write that had completed is lost although none was flushed.
func TestQEMUServerKilled(t *testing.T) {
	if testing.Short() || os.Getenv("MOOVM_TEST_LONG") == "" {
		t.Skip("takes 10 seconds: set MOOVM_TEST_LONG=1")
	}
	t.Parallel()
	for _, kind := range []string{"raw", "cow"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			img := filepath.Join(dir, "disk")
			bootDisk(t, img, verifySector)
			if kind == "cow" {
				overlayOn(t, dir, img).Close()
				img = filepath.Join(dir, "overlay.cow")
			}
			d := startDaemon(t, kind, img, 1)
			q := startQEMU(t, "pc", 64, 90*time.Second, vhostDisk(d.sock, ",bootindex=0")...)
			q.killing(d, 1500*time.Millisecond, 4) // QEMU comes back after a second
			if q.cmd.ProcessState.ExitCode() != debugExit || !strings.Contains(q.out.String(), "verify ok") {
				t.Errorf("the guest failed after %d kills", d.kills)
			}
			if d.kills == 0 {
				t.Error("the guest was done before the first kill")
			}
			t.Logf("%d kills", d.kills)
		})
	}
}

// QEMU and its SeaBIOS, which nobody here wrote, boot from our disk, read and
// write it.
func TestQEMUBoots(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	disk := bootDisk(t, base, bootSector)
	cow := overlayOn(t, dir, base)
	dev := blkDevice(t, virtioblk.Config{Backend: cow, Queues: 2, QueueSize: 256})
	sock := filepath.Join(dir, "s")
	serveHere(t, sock, dev)
	q := startQEMU(t, "pc", 64, 60*time.Second, vhostDisk(sock, ",num-queues=2,queue-size=256,bootindex=0")...)
	<-q.ended
	if q.cmd.ProcessState.ExitCode() != debugExit || !strings.Contains(q.out.String(), "moovm: boot ok") {
		t.Fatal("the guest failed")
	}
	got := make([]byte, 4096)
	if _, err := cow.ReadAt(got, 16*512); err != nil {
		t.Fatal(err)
	}
	for i, b := range got {
		if b != ^disk[512+i] {
			t.Fatalf("byte %d is %#x, want %#x", i, b, ^disk[512+i])
		}
	}
	if b, err := os.ReadFile(base); err != nil || !bytes.Equal(b, disk) {
		t.Errorf("the base image changed (%v)", err)
	}
	if s := dev.Stats(); s.Reads == 0 || s.Writes == 0 || s.Errors != 0 {
		t.Errorf("%+v", s)
	}
}
