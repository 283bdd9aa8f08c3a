package guestinit

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/internal/bytejson"
	"golang.org/x/sys/unix"
)

// guestLine is the guest's end of the control line. A nil line swallows
// everything.
type guestLine struct {
	out, in *os.File   // the same, but for a share
	serial  bool       // slow, and with small buffers
	mu      sync.Mutex // one frame at a time
}

// openGuestLine opens a serial port, and makes it transparent, or a port of a
// virtio console, which is so already.
func openGuestLine(path string) (*guestLine, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if errors.Is(err, unix.ENOTTY) {
		return &guestLine{out: f, in: f}, nil
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s is not a serial port that works: %w", path, err)
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = unix.B115200 | unix.CS8 | unix.CREAD | unix.CLOCAL
	t.Ispeed, t.Ospeed = unix.B115200, unix.B115200
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s cannot be set up: %w", path, err)
	}
	return &guestLine{out: f, in: f, serial: true}, nil
}

// openControlShare opens the files of a controlShare. They stay open without
// the mount.
func openControlShare(tag string) (*guestLine, error) {
	const dir = "/moovm/control"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := mountOne(control.Mount{Source: tag, Target: dir, Type: "9p", Options: "trans=virtio,version=9p2000.L,msize=65536,cache=none"}); err != nil {
		return nil, err
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	out, err := os.OpenFile(dir+"/"+control.ToHost, os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	in, err := os.OpenFile(dir+"/"+control.FromHost, os.O_RDONLY, 0)
	if err != nil {
		out.Close()
		return nil, err
	}
	return &guestLine{out: out, in: in}, nil
}

// frameSize is how much output is sent at a time.
func (l *guestLine) frameSize() int {
	if l != nil && l.serial {
		return control.SerialFrame
	}
	return control.MaxFrame
}

// window is how much stdin the host may send in advance.
func (l *guestLine) window() int {
	if l.serial {
		return control.SerialCredit
	}
	return control.MaxCredit
}

// send writes one frame. That the host does not listen is not the guest's
// concern.
func (l *guestLine) send(kind control.FrameKind, payload []byte) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, _ = l.out.Write(control.AppendFrame(nil, kind, payload))
}

func (l *guestLine) sendJSON(kind control.FrameKind, v any) {
	b, err := bytejson.Marshal(v)
	if err == nil && len(b) <= control.MaxFrame {
		l.send(kind, b)
	}
}

func (l *guestLine) hello() {
	l.sendJSON(control.FrameHello, control.Hello{Version: control.ConfigVersion, Release: unameRelease()})
}

func (l *guestLine) fail(e control.GuestError) {
	e.Message = e.Message[:min(len(e.Message), control.MaxText/2)]
	l.sendJSON(control.FrameError, e)
}

func (l *guestLine) warn(text string) {
	l.send(control.FrameWarn, []byte(text[:min(len(text), control.MaxText)]))
}
func (l *guestLine) start(what string) {
	l.send(control.FrameStart, []byte(what[:min(len(what), control.MaxText)]))
}
func (l *guestLine) bye() { l.send(control.FrameBye, nil) }

func (l *guestLine) exit(status, signal int) {
	b := binary.LittleEndian.AppendUint32(nil, uint32(status))
	l.send(control.FrameExit, binary.LittleEndian.AppendUint32(b, uint32(signal)))
}

func (l *guestLine) credit(n int) {
	l.send(control.FrameCredit, binary.LittleEndian.AppendUint32(nil, uint32(n)))
}

// Read reads from the host. A share says end of file when there is nothing to
// read for a while, a virtio port while nobody has it open on the host.
func (l *guestLine) Read(p []byte) (int, error) {
	for {
		n, err := l.in.Read(p)
		if n == 0 && errors.Is(err, io.EOF) {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		return n, err
	}
}

// drain waits until everything has left the serial port.
func (l *guestLine) drain() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = unix.IoctlSetInt(int(l.out.Fd()), unix.TCSBRK, 1) // tcdrain(3)
}
