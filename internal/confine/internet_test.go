//go:build linux && amd64

package confine_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/internal/confine"
)

// internetChild confines itself and tries what a process with Needs.Internet
// can and cannot do. The argument is the address of a TCP server and a folder.
func internetChild(argument string) {
	server, dir, _ := strings.Cut(argument, ",")
	try := func(name string, err error) {
		if err != nil {
			fmt.Println(name + ": refused")
			return
		}
		fmt.Println(name + ": done")
	}
	if _, err := confine.Apply(confine.Needs{Internet: true}); err != nil {
		fmt.Println("apply:", err)
		return
	}
	c, err := net.DialTimeout("tcp4", server, time.Minute)
	if err == nil {
		_, err = c.Write([]byte("x"))
		c.Close()
	}
	try("tcp", err)
	u, err := net.Dial("udp4", server)
	if err == nil {
		_, err = u.Write([]byte("x"))
	}
	try("udp", err)
	_, err = net.Dial("unix", filepath.Join(dir, "socket"))
	try("unix", err)
	_, err = os.ReadFile(filepath.Join(dir, "file"))
	try("file", err)
	_, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, 0)
	try("netlink", err)
	_, err = unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	try("vsock", err)
	_, err = net.Listen("tcp4", "127.0.0.1:0")
	try("listen", err)
	try("program", exec.Command("/bin/true").Run())
}

func TestInternet(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := t.TempDir()
	s, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o666); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "CONFINE_INTERNET="+l.Addr().String()+","+dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if strings.Contains(string(out), confine.ErrUnsupported.Error()) {
		t.Skip("needs a kernel with Landlock or seccomp filters")
	}
	want := "tcp: done\nudp: done\nunix: refused\nfile: refused\nnetlink: refused\nvsock: refused\nlisten: refused\nprogram: refused\n"
	if string(out) != want {
		t.Errorf("got\n%s\nwant\n%s", out, want)
	}
}
