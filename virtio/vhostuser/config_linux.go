package vhostuser

import (
	"encoding/binary"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio/internal/vhostmsg"
)

const (
	maxConfig    = 256 // VHOST_USER_MAX_CONFIG_SIZE
	configHeader = 12  // offset, size, flags
)

// getConfig reads the configuration space.
func (s *session) getConfig(m *vhostmsg.Message) (*vhostmsg.Message, error) {
	off, n, err := configRange(m.Payload)
	if err != nil {
		return nil, err
	}
	b := make([]byte, configHeader+n)
	copy(b, m.Payload[:configHeader])
	s.dev.ReadConfig(off, b[configHeader:])
	return &vhostmsg.Message{Payload: b}, nil
}

// setConfig writes it.
func (s *session) setConfig(m *vhostmsg.Message) error {
	off, n, err := configRange(m.Payload)
	if err != nil {
		return err
	}
	s.dev.WriteConfig(off, m.Payload[configHeader:configHeader+n])
	return nil
}

// configRange is what a message says about the configuration space. Where it
// ends the driver may not know.
func configRange(p []byte) (off, n uint32, err error) {
	off, n = binary.LittleEndian.Uint32(p), binary.LittleEndian.Uint32(p[4:])
	switch {
	case uint64(n) > uint64(len(p)-configHeader):
		return 0, 0, bad("%d bytes at %d of the configuration space in %d bytes", n, off, len(p))
	case off > maxConfig || n > maxConfig-off:
		return 0, 0, errRefused
	}
	return off, n, nil
}

// setBackendReqFD takes the socket on which changes of the configuration are
// told.
func (s *session) setBackendReqFD(m *vhostmsg.Message) error {
	if t, err := unix.GetsockoptInt(m.FDs[0], unix.SOL_SOCKET, unix.SO_TYPE); err != nil || t != unix.SOCK_STREAM {
		return bad("the descriptor is no stream socket")
	}
	s.notifier.set(m.FDs[0])
	m.FDs = nil
	return nil
}

// notifier sends configuration changes to the front-end (virtio.ConfigNotifier).
type notifier struct {
	mu sync.Mutex
	fd int // -1: the front-end does not want to know
}

func (n *notifier) set(fd int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fd >= 0 {
		unix.Close(n.fd)
	}
	n.fd = fd
}

// ConfigChanged implements virtio.ConfigNotifier. A front-end that does not
// read its messages misses some.
func (n *notifier) ConfigChanged() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fd >= 0 {
		m := vhostmsg.Message{Type: vhostmsg.BackendConfigChange}
		unix.SendmsgN(n.fd, m.Bytes(), nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	}
}
