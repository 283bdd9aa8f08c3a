package virtionet

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Tap is a Link to a tap interface of the host (Documentation/networking/
// tuntap.rst).
type Tap struct {
	f    *os.File
	name string
	wg   sync.WaitGroup

	mu       sync.Mutex
	attached bool
	closed   bool
}

// OpenTap opens the tap interface of the given name, and makes one that lasts
// until Close if there is none; that takes CAP_NET_ADMIN. The name may have a
// %d in it, for which the kernel puts a number.
func OpenTap(name string) (*Tap, error) {
	bad := func(what string, err error) (*Tap, error) {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
			return nil, fmt.Errorf("virtionet: tap %q: %s: %w (make one that belongs to you: ip tuntap add dev NAME mode tap user USER vnet_hdr)", name, what, err)
		}
		return nil, fmt.Errorf("virtionet: tap %q: %s: %w", name, what, err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil || name == "" {
		return bad("not a name for an interface (1 to 15 bytes)", unix.EINVAL)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return bad("open /dev/net/tun", err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		return bad("TUNSETIFF", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, HeaderSize); err != nil {
		unix.Close(fd)
		return bad("TUNSETVNETHDRSZ", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
		unix.Close(fd)
		return bad("TUNSETOFFLOAD", err)
	}
	return &Tap{f: os.NewFile(uintptr(fd), "/dev/net/tun"), name: ifr.Name()}, nil
}

// Name is the interface's name.
func (t *Tap) Name() string { return t.name }

// Attach implements Link.
func (t *Tap) Attach(r Receiver) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.attached || t.closed {
		return ErrAttached
	}
	t.attached = true
	r.SetLink(true)
	t.wg.Go(func() {
		p := make([]byte, HeaderSize+maxFrame)
		for {
			n, err := t.f.Read(p)
			switch {
			case err == nil:
				r.Receive(p[:n])
			case errors.Is(err, os.ErrClosed):
				return
			default: // the interface was removed
				r.SetLink(false)
				return
			}
		}
	})
	return nil
}

// Send implements Link. What the interface does not take, because it is down
// or full, is lost.
func (t *Tap) Send(packet []byte) { t.f.Write(packet) }

// Offloads implements Link.
func (t *Tap) Offloads() Offloads { return Offloads{Checksum: true, Segmentation: true} }

// Close implements Link.
func (t *Tap) Close() error {
	t.mu.Lock()
	closed := t.closed
	t.closed = true
	t.mu.Unlock()
	if closed {
		return nil
	}
	err := t.f.Close()
	t.wg.Wait()
	return err
}
