package e2e

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moovm/moovm/virtiovsock"
)

// networkScript is what the guest does. $1 is the TCP port of the host's server,
// $2 that of UDP, $3 the size of a large file, $4 that of one to send.
const networkScript = `
set -eu
echo "resolv: $(cat /etc/resolv.conf)"
echo "host: $(getent ahostsv4 host.moovm.internal | head -n 1 | cut -d' ' -f1)"
exec 3<>/dev/tcp/host.moovm.internal/$1
printf 'GET /large HTTP/1.0\r\n\r\n' >&3
echo "down: $(tail -c $3 <&3 | sha256sum | cut -d' ' -f1)"
exec 3<>/dev/tcp/host.moovm.internal/$1
{ printf 'PUT /sum HTTP/1.0\r\nContent-Length: %d\r\n\r\n' $4; yes moovm | head -c $4; } >&3
echo "up: $(tail -n 1 <&3)"
exec 4<>/dev/udp/host.moovm.internal/$2
echo hello >&4
echo "udp: $(head -c 6 <&4)"
for a in 10.1.2.3 169.254.169.254 10.0.2.2; do
	if (exec 5<>/dev/tcp/$a/$1) 2>/dev/null; then echo "REACHED $a"; fi
done
perl -MSocket -e '
	socket(S, PF_INET, SOCK_RAW, 1) or die $!;
	send(S, "\x08\0\xf7\xfc\0\1\0\2", 0, pack_sockaddr_in(0, inet_aton("10.0.2.2"))) or die $!;
	recv(S, $m, 100, 0);
	print "ping: ", unpack("H*", substr($m, 20)), "\n";
	# The host by socket device: port 52 echoes.
	socket(V, 40, SOCK_STREAM, 0) or die "vsock: $!";
	connect(V, pack("SSLLx4", 40, 0, 52, 2)) or die "vsock connect: $!";
	syswrite(V, "by vsock\n"); shutdown(V, 1);
	print "vsock: ", <V>;
	# From the host, both ways.
	socket(L, PF_INET, SOCK_STREAM, 6); bind(L, pack_sockaddr_in(80, INADDR_ANY)) or die $!; listen(L, 5);
	socket(W, 40, SOCK_STREAM, 0); bind(W, pack("SSLLx4", 40, 0, 99, 0xffffffff)) or die $!; listen(W, 5);
	$| = 1;
	print "listening\n";
	accept(C, L) or die $!; $l = <C>; syswrite(C, "forwarded $l"); close(C);
	accept(C, W) or die $!; $l = <C>; syswrite(C, "connected $l"); close(C);
'
`

// A stock guest has a network and a socket device by moovm run: both ways, with
// what it may not reach out of reach, while the process that runs it is
// confined.
func TestNetwork(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	const size, up = 64 << 20, 6 << 20
	large := strings.Repeat("0123456789abcde\n", size/16)
	sum := func(s string) string {
		h := sha256.Sum256([]byte(s))
		return hex.EncodeToString(h[:])
	}
	server, udpPort := startServers(t, large)
	vsock := filepath.Join(dir, "v")
	echoUnix(t, vsock+"_52")
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	forward := free.Addr().(*net.TCPAddr)
	free.Close()

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := command(ctx, dir, "run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img",
		"--net", fmt.Sprintf("user,host,allow=good.example,forward=%d:80", forward.Port), "--vsock", "7,unix:v", "--",
		"bash", "-c", networkScript, "bash", fmt.Sprint(server), fmt.Sprint(udpPort), fmt.Sprint(size), fmt.Sprint(up))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		t.Logf("%v: %s", time.Since(start).Round(time.Millisecond), lines.Text())
		name, value, _ := strings.Cut(lines.Text(), ": ")
		got[name] = value
		if name == "listening" {
			got["forward"] = talk(t, func() (net.Conn, error) { return net.Dial("tcp", forward.String()) })
			got["into"] = talk(t, func() (net.Conn, error) { return virtiovsock.DialUnix(ctx, vsock, 99) })
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, stderr.String())
	}
	for name, want := range map[string]string{
		"resolv": "nameserver 10.0.2.2", "host": "10.0.2.3", "down": sum(large), "up": sum(strings.Repeat("moovm\n", up/6)), "udp": "hello",
		"ping": "0000fffc00010002", "vsock": "by vsock", "forward": "forwarded hi\n", "into": "connected hi\n",
	} {
		if got[name] != want {
			t.Errorf("%s: %q, want %q", name, got[name], want)
		}
	}
	for name := range got {
		if strings.HasPrefix(name, "REACHED") {
			t.Error(name)
		}
	}
	if _, err := os.Lstat(vsock); !os.IsNotExist(err) {
		t.Errorf("the socket stayed: %v", err)
	}
}

// startServers are the host's: one for HTTP, one that echoes datagrams.
func startServers(t *testing.T, large string) (tcp, udp int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			h := sha256.New()
			io.Copy(h, r.Body)
			fmt.Fprintf(w, "\n%x\n", h.Sum(nil))
			return
		}
		io.WriteString(w, large)
	})}
	var wg sync.WaitGroup
	wg.Go(func() { s.Serve(l) })
	wg.Go(func() {
		p := make([]byte, 2000)
		for {
			n, from, err := u.ReadFrom(p)
			if err != nil {
				return
			}
			u.WriteTo(p[:n], from)
		}
	})
	t.Cleanup(func() { s.Close(); u.Close(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).Port, u.LocalAddr().(*net.UDPAddr).Port
}

// echoUnix echoes one connection to a socket.
func echoUnix(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		io.Copy(struct{ io.Writer }{c}, c)
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
}

// talk says hi and returns the answer.
func talk(t *testing.T, dial func() (net.Conn, error)) string {
	t.Helper()
	c, err := dial()
	if err != nil {
		t.Error(err)
		return ""
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprint(c, "hi\n")
	b, err := io.ReadAll(c)
	if err != nil {
		t.Error(err)
	}
	return string(b)
}
