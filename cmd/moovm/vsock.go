package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/internal/reexec"
	"github.com/moovm/moovm/internal/unixsock"
	"github.com/moovm/moovm/virtiovsock"
)

// The process that runs the guest may connect to nothing. For the guest's
// connections to port N, a process of its own connects to PATH_N and to nothing
// else, and hands the descriptor over.

// vsockRole is that process. Its argument is PATH, descriptor 3 its line.
func vsockRole() reexec.Role { return reexec.Role{Name: "vsock", Main: vsockMain} }

func vsockMain(path string) int {
	for p := make([]byte, 4); ; {
		n, err := unix.Read(firstFile, p)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n != len(p) {
			return exitOK // nobody asks any more
		}
		answer, rights := []byte{0}, []byte(nil)
		fd, err := connectUnix(path + "_" + strconv.FormatUint(uint64(binary.NativeEndian.Uint32(p)), 10))
		if err == nil {
			answer[0], rights = 1, unix.UnixRights(fd)
		}
		err = unix.Sendmsg(firstFile, answer, rights, nil, 0)
		if rights != nil {
			unix.Close(fd)
		}
		if err != nil {
			return exitOK
		}
	}
}

// connectUnix does not wait for a server that is busy.
func connectUnix(path string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// connector is its client.
type connector struct {
	mu   sync.Mutex
	line *os.File
}

// connect is virtiovsock.Config.Connect.
func (c *connector) connect(port uint32) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fd := int(c.line.Fd())
	if _, err := unix.Write(fd, binary.NativeEndian.AppendUint32(nil, port)); err != nil {
		return nil, err
	}
	answer, rights := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	n, rn, _, _, err := unix.Recvmsg(fd, answer, rights, unix.MSG_CMSG_CLOEXEC)
	if err != nil || n != 1 || answer[0] != 1 {
		return nil, virtiovsock.ErrRefused
	}
	messages, err := unix.ParseSocketControlMessage(rights[:rn])
	if err != nil || len(messages) != 1 {
		return nil, virtiovsock.ErrRefused
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, virtiovsock.ErrRefused
	}
	f := os.NewFile(uintptr(fds[0]), "vsock")
	defer f.Close()
	return net.FileConn(f)
}

// vsockServer is the guest's socket device and its sockets here.
type vsockServer struct {
	dev *virtiovsock.Device
	l   net.Listener
	c   *connector
	wg  sync.WaitGroup
}

func (s *vsockServer) Close() error {
	err := s.l.Close()
	s.c.line.Close()
	s.dev.Close()
	s.wg.Wait()
	return err
}

var _ io.Closer = (*vsockServer)(nil)

// openVsock makes the socket device.
func (r *machineRequest) openVsock(log *slog.Logger) (_ *vsockServer, err error) {
	path, err := absPath(r.vsock.path)
	if err != nil {
		return nil, fmt.Errorf("--vsock: %w", err)
	}
	l, err := unixsock.Listen(r.vsock.path)
	if err != nil {
		return nil, fmt.Errorf("--vsock: %w", err)
	}
	defer func() {
		if err != nil {
			l.Close()
		}
	}()
	here, there, err := socketPair(unix.SOCK_SEQPACKET)
	if err != nil {
		return nil, err
	}
	defer there.Close()
	s := &vsockServer{l: l, c: &connector{line: here}}
	if err = startHelper(vsockRole(), path, []*os.File{there}, log); err != nil {
		here.Close()
		return nil, err
	}
	if s.dev, err = virtiovsock.New(virtiovsock.Config{CID: r.vsock.cid, Connect: s.c.connect, Logger: log}); err != nil {
		here.Close()
		return nil, err
	}
	s.wg.Go(func() {
		if err := s.dev.ServeUnix(l); err != nil {
			log.Warn("the guest's socket device takes no more connections", "error", err)
		}
	})
	return s, nil
}
