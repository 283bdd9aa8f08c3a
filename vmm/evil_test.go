package vmm

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/internal/confine"
	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtiorng"
)

// evil is a device that a guest has taken over: when the guest reads its
// configuration, it goes for the host, on the vCPU's thread and on one of its
// own.
type evil struct {
	virtio.Device // what a device should do
	dir           string
	once          sync.Once
}

func (e *evil) ReadConfig(off uint32, p []byte) {
	e.once.Do(func() {
		e.attack("vCPU ")
		done := make(chan struct{})
		go func() {
			e.attack("worker ")
			close(done)
		}()
		<-done
	})
	clear(p)
}

func (e *evil) attack(who string) {
	try := func(what string, err error) { fmt.Printf("%s%s: %v\n", who, what, err) }
	_, err := os.ReadFile("/etc/shadow")
	try("read /etc/shadow", err)
	try("write", os.WriteFile(filepath.Join(e.dir, "owned"), nil, 0o666))
	try("exec", exec.Command("/bin/sh", "-c", "touch "+filepath.Join(e.dir, "owned")).Run())
	_, err = net.Dial("unix", filepath.Join(e.dir, "socket"))
	try("connect", err)
	_, err = net.Dial("tcp", "127.0.0.1:80")
	try("connect by TCP", err)
	_, err = os.OpenFile(DefaultKVM, os.O_RDWR, 0)
	try("open KVM", err)
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err == nil {
		_, err = unix.FcntlInt(uintptr(p[0]), unix.F_SETOWN, os.Getppid())
		try("signal by a pipe", err)
		unix.Close(p[0])
		unix.Close(p[1])
	}
	try("change a mode", unix.Chmod(filepath.Join(e.dir, "disk"), 0o666))
	try("prctl", unix.Prctl(unix.PR_GET_DUMPABLE, 0, 0, 0, 0))
	_, err = os.OpenFile("/proc/self/mem", os.O_RDWR, 0)
	try("open its own memory", err)
	// Nor is there a descriptor through which more could be reached: no folder,
	// nothing of /proc but what this test has opened.
	for fd := range 256 {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			try(fmt.Sprintf("open folder %d", fd), nil)
		}
		var fs unix.Statfs_t
		if unix.Fstatfs(fd, &fs) == nil && fs.Type == unix.PROC_SUPER_MAGIC {
			try(fmt.Sprintf("open file of /proc %d", fd), nil)
		}
	}
}

const evilEnv = "VMM_TEST_EVIL"

// evilMachine runs in a process of its own: a machine with an evil device,
// confined as moovm run does it.
func evilMachine(dir string) {
	fail := func(err error) {
		if err != nil {
			fmt.Println("evilMachine:", err)
			os.Exit(1)
		}
	}
	disk, err := os.OpenFile(filepath.Join(dir, "disk"), os.O_RDWR, 0)
	fail(err)
	// mov ebx, its configuration space; mov eax, [rbx]
	at := addrWindows + 0x100
	m, err := New(Config{
		Memory: 4 << 20, CPUs: 2, Transport: TransportMMIO,
		Kernel:  asm{}.bytes(0xbb, byte(at), byte(at>>8), byte(at>>16), byte(at>>24), 0x8b, 0x03).print("the guest goes on\n").powerOff().kernel(),
		Devices: []virtio.Device{&evil{Device: virtiorng.Device{}, dir: dir}},
		Console: Serial{Out: os.Stdout},
	})
	fail(err)
	if os.Getenv(evilEnv+"_FREE") == "" {
		_, err = confine.Apply(confine.Needs{})
		fail(err)
	}
	r, err := m.Run(context.Background())
	fail(err)
	_, err = disk.WriteAt([]byte("still open"), 0)
	fail(err)
	fail(m.Close())
	fmt.Println("ended by", r)
}

func TestEvilDevice(t *testing.T) {
	needKVM(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "disk"), nil, 0o666); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	run := func(env ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, os.Args[0])
		cmd.Env = append(append(os.Environ(), env...), evilEnv+"="+dir)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Run(); err != nil {
			if strings.Contains(out.String(), confine.ErrUnsupported.Error()) {
				t.Skip("needs a kernel with seccomp filters (CONFIG_SECCOMP_FILTER) or Landlock (CONFIG_SECURITY_LANDLOCK)")
			}
			t.Fatalf("%v\n%s", err, out.String())
		}
		return out.String()
	}
	said := run()
	for _, who := range []string{"vCPU ", "worker "} {
		for _, what := range []string{"read /etc/shadow", "write", "exec", "connect", "connect by TCP", "open KVM",
			"signal by a pipe", "change a mode", "prctl", "open its own memory"} {
			_, rest, ok := strings.Cut(said, who+what+": ")
			line, _, _ := strings.Cut(rest, "\n")
			if !ok || !strings.HasSuffix(line, unix.EPERM.Error()) && !strings.HasSuffix(line, unix.EACCES.Error()) {
				t.Errorf("%s%s: %q; it was to be refused", who, what, line)
			}
		}
	}
	if strings.Contains(said, "open folder") || strings.Contains(said, "open file of /proc") {
		t.Errorf("descriptors that lead on are open:\n%s", said)
	}
	if !strings.Contains(said, "the guest goes on\n") || !strings.Contains(said, "ended by power-off") {
		t.Errorf("the machine did not go on:\n%s", said)
	}
	if _, err := os.Stat(filepath.Join(dir, "owned")); err == nil {
		t.Error("the device wrote a file")
	}
	// What the device tries is possible where nothing stops it.
	if said := run(evilEnv + "_FREE=1"); !strings.Contains(said, "vCPU exec: <nil>") || !strings.Contains(said, "worker connect: <nil>") {
		t.Errorf("without confinement:\n%s", said)
	}
}
