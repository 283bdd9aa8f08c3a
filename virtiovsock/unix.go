package virtiovsock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// UNIX sockets as Firecracker has them: to reach the guest a program connects to
// one, says "CONNECT port\n" and is answered "OK port\n", or nothing but the end;
// a connection of the guest's to port 52 goes to the socket PATH_52.

const (
	unixConns = 256 // that have not said where they want to
	greetTime = 30 * time.Second
)

// ServeUnix serves a socket for those who want to reach the guest, until l is
// closed; it then waits for its connections, which end with the device's.
func (d *Device) ServeUnix(l net.Listener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	var mu sync.Mutex
	greeting := map[net.Conn]struct{}{}
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		for c := range greeting {
			c.Close()
		}
	}()
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		mu.Lock()
		if len(greeting) >= unixConns {
			mu.Unlock()
			c.Close()
			continue
		}
		greeting[c] = struct{}{}
		mu.Unlock()
		wg.Go(func() {
			g, err := d.greet(c)
			mu.Lock()
			delete(greeting, c)
			mu.Unlock()
			if err != nil {
				c.Close()
				return
			}
			Join(g, c)
		})
	}
}

// greet reads where a program wants to, and connects.
func (d *Device) greet(c net.Conn) (net.Conn, error) {
	c.SetDeadline(time.Now().Add(greetTime))
	line, err := readLine(c)
	if err != nil {
		return nil, err
	}
	text, ok := strings.CutPrefix(line, "CONNECT ")
	port, err := strconv.ParseUint(text, 10, 32)
	if !ok || err != nil {
		return nil, fmt.Errorf("virtiovsock: %q is not CONNECT PORT", line)
	}
	ctx, cancel := context.WithTimeout(context.Background(), greetTime)
	defer cancel()
	g, err := d.Dial(ctx, uint32(port))
	if err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(c, "OK %d\n", g.LocalAddr().(Addr).Port); err != nil {
		g.Close()
		return nil, err
	}
	c.SetDeadline(time.Time{})
	return g, nil
}

// readLine reads a short line byte by byte: what follows it is not ours.
func readLine(r io.Reader) (string, error) {
	var line []byte
	for b := make([]byte, 1); len(line) < 32; {
		if _, err := io.ReadFull(r, b); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
	return "", errors.New("virtiovsock: the first line is too long")
}

// DialUnix reaches a port of the guest through a socket that ServeUnix serves,
// or Firecracker.
func DialUnix(ctx context.Context, path string, port uint32) (net.Conn, error) {
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	if _, err = fmt.Fprintf(c, "CONNECT %d\n", port); err == nil {
		var line string
		if line, err = readLine(c); err == nil && !strings.HasPrefix(line, "OK ") {
			err = fmt.Errorf("it says %q", line)
		}
	}
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("virtiovsock: port %d of the guest by %s: %w", port, path, err)
	}
	return c, nil
}
