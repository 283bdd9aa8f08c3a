package vhostuser_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/virtio/vhostuser"
	"github.com/moovm/moovm/virtioblk"
)

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
// reads back, and started again: the guest notices nothing.
func TestQEMUServerKilled(t *testing.T) {
	if testing.Short() || os.Getenv("MOOVM_TEST_LONG") == "" {
		t.Skip("takes 10 seconds: set MOOVM_TEST_LONG=1")
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is missing: apt-get install qemu-system-x86")
	}
	dir := t.TempDir()
	disk := make([]byte, 1<<20)
	code, err := hex.DecodeString(verifySector)
	if err != nil {
		t.Fatal(err)
	}
	copy(disk, code)
	copy(disk[510:], "\x55\xaa")
	img, sock := filepath.Join(dir, "disk"), filepath.Join(dir, "s")
	if err := os.WriteFile(img, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	start := func() *exec.Cmd {
		p := serverProcess(t, "raw", img, sock, 1)
		if err := p.Start(); err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := start()
	defer func() {
		p.Process.Kill()
		p.Wait()
	}()
	for n := 0; ; n++ { // QEMU wants it to be there
		if _, err := os.Stat(sock); err == nil {
			break
		}
		if n == 1000 {
			t.Fatal("no server")
		}
		time.Sleep(10 * time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	var out, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, qemu, "-accel", "tcg", "-m", "64", "-display", "none", "-nodefaults", "-no-reboot",
		"-object", "memory-backend-memfd,id=m,size=64M,share=on", "-machine", "pc,memory-backend=m",
		"-chardev", "socket,id=c,reconnect=1,path="+sock, "-device", "vhost-user-blk-pci,chardev=c,bootindex=0",
		"-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=1")
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); cmd.Wait() }()
	kills := 0
	for running := true; running; {
		select {
		case <-ended:
			running = false
		case <-time.After(1500 * time.Millisecond): // QEMU comes back after a second
			if kills < 4 {
				p.Process.Kill()
				p.Wait()
				p = start()
				kills++
			}
		}
	}
	if cmd.ProcessState.ExitCode() != 33 || !strings.Contains(out.String(), "verify ok") {
		t.Fatalf("%v after %d kills\n%s\n%s", cmd.ProcessState, kills, out.String(), stderr.String())
	}
	if kills == 0 {
		t.Error("the guest was done before the first kill")
	}
	t.Logf("%d kills", kills)
}

// QEMU and its SeaBIOS, which nobody here wrote, boot from our disk, read and
// write it.
func TestQEMUBoots(t *testing.T) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is missing: apt-get install qemu-system-x86")
	}
	dir := t.TempDir()
	disk := make([]byte, 1<<20)
	code, err := hex.DecodeString(bootSector)
	if err != nil {
		t.Fatal(err)
	}
	copy(disk, code)
	copy(disk[510:], "\x55\xaa")
	for i := range 4096 {
		disk[512+i] = byte(i*7 + i/256)
	}
	base, img := filepath.Join(dir, "base"), filepath.Join(dir, "image.cow")
	if err := os.WriteFile(base, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := cowdisk.Create(img, cowdisk.CreateOptions{Backing: "base"}); err != nil {
		t.Fatal(err)
	}
	cow, err := cowdisk.Open(img, cowdisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer cow.Close()
	dev := blkDevice(t, virtioblk.Config{Backend: cow, Queues: 2, QueueSize: 256})
	sock := filepath.Join(dir, "s")
	l, err := vhostuser.Listen(sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- vhostuser.Serve(ctx, l, dev, vhostuser.Options{}) }()
	defer func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	qctx, qcancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer qcancel()
	cmd := exec.CommandContext(qctx, qemu, "-accel", "tcg", "-m", "64", "-display", "none", "-nodefaults", "-no-reboot",
		"-object", "memory-backend-memfd,id=m,size=64M,share=on", "-machine", "pc,memory-backend=m",
		"-chardev", "socket,id=c,path="+sock, "-device", "vhost-user-blk-pci,chardev=c,num-queues=2,queue-size=256,bootindex=0",
		"-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=1")
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	err = cmd.Run()
	// isa-debug-exit ends with twice the value plus one.
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != 33 || !strings.Contains(out.String(), "moovm: boot ok") {
		t.Fatalf("QEMU: %v\n%s\n%s", err, out.String(), stderr.String())
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
