package sandbox

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"

	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/internal/filefs"
	"github.com/moovm/moovm/virtio/vhostuser"
)

const (
	// filesTag names the file system of the writable files, filesMount is where
	// the emulated host has it, before each file is put over its own path.
	filesTag   = "files"
	filesMount = "/run/moovm-files"
	// filesFD is QEMU's end of the socket on which they are served.
	filesFD = 6
)

// fileServer serves the writable files to QEMU.
type fileServer struct {
	theirs *os.File // QEMU's end
	files  []*os.File
	stop   context.CancelFunc
	done   chan struct{}
}

// serveFiles begins to serve the writable files; nil if there are none.
func serveFiles(c *Config) (_ *fileServer, err error) {
	_, paths := c.writable()
	if len(paths) == 0 {
		return nil, nil
	}
	s := &fileServer{stop: func() {}, done: make(chan struct{})}
	defer func() {
		if err != nil {
			close(s.done)
			s.Close()
		}
	}()
	for _, path := range paths {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return nil, fmt.Errorf("sandbox: writable file: %w", err)
		}
		s.files = append(s.files, f)
	}
	dev, err := filefs.New(filesTag, s.files)
	if err != nil {
		return nil, err
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	s.theirs = theirs
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, fmt.Errorf("sandbox: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	go func() {
		defer close(s.done)
		if err := vhostuser.ServeConn(ctx, conn.(*net.UnixConn), dev, vhostuser.Options{Logger: c.Logger}); err != nil {
			c.Logger.Warn("sandbox: the writable files are no longer served", "err", err)
		}
	}()
	return s, nil
}

// Close ends the server. QEMU must be gone, or must not be started any more.
func (s *fileServer) Close() {
	if s == nil {
		return
	}
	s.stop()
	if s.theirs != nil {
		s.theirs.Close()
	}
	<-s.done
	for _, f := range s.files {
		f.Close()
	}
}

// filesArgs are QEMU's arguments for it. The server sees the emulated host's
// memory.
func filesArgs(c *Config) []string {
	return []string{
		"-object", "memory-backend-memfd,id=memory,size=" + strconv.FormatInt(c.Memory>>20, 10) + "M,share=on",
		"-machine", "memory-backend=memory",
		"-chardev", "socket,id=" + filesTag + ",fd=" + strconv.Itoa(filesFD),
		"-device", "vhost-user-fs-pci,chardev=" + filesTag + ",tag=" + filesTag + ",queue-size=" + strconv.Itoa(filefs.QueueSize),
	}
}

// fileMounts puts each file over its path.
func fileMounts(paths []string) (mounts []control.Mount) {
	if len(paths) > 0 {
		mounts = append(mounts, control.Mount{Source: filesTag, Target: filesMount, Type: "virtiofs"})
	}
	for i, path := range paths {
		mounts = append(mounts, control.Mount{Source: filesMount + "/" + strconv.Itoa(i), Target: path, Options: "bind"})
	}
	return mounts
}
