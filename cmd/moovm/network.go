package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/internal/bytejson"
	"github.com/moovm/moovm/internal/confine"
	"github.com/moovm/moovm/internal/reexec"
	"github.com/moovm/moovm/usernet"
	"github.com/moovm/moovm/virtionet"
)

// The user-mode network runs in a process of its own, which has sockets and no
// guest: the process that runs the guest gets none. A socket pair with frames
// joins them. When the network's process ends the guest's link is down.

// networkRole is that process.
func networkRole() reexec.Role { return reexec.Role{Name: "network", Main: networkMain} }

// networkJob is what it is told. Descriptor 3 leads to the guest, 4 and on are
// the listeners of the forwards.
type networkJob struct {
	Policy  usernet.Policy
	MTU     int
	Ports   []uint16 // of the guest's, one for each listener
	Confine bool
	Level   slog.Level
}

const firstFile = 3

func networkMain(argument string) int {
	if err := runNetwork(argument); err != nil {
		fmt.Fprintln(os.Stderr, "moovm: the network:", err)
		return exitFailed
	}
	return exitOK
}

func runNetwork(argument string) error {
	var job networkJob
	if err := bytejson.Unmarshal([]byte(argument), &job); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: job.Level}))
	guest, err := inherited(firstFile, net.FileConn)
	if err != nil {
		return err
	}
	n, err := usernet.New(usernet.Config{Policy: job.Policy, MTU: job.MTU, Logger: log})
	if err != nil {
		return err
	}
	defer n.Close()
	for i, port := range job.Ports {
		l, err := inherited(firstFile+1+i, net.FileListener)
		if err != nil {
			return err
		}
		if err := n.Forward(l, port); err != nil {
			return err
		}
	}
	if job.Confine {
		if err := confineSelf(log, confine.Needs{Internet: true}); err != nil {
			return err
		}
	}
	return virtionet.Plug(guest, n)
}

// inherited makes something of a descriptor that this process was started
// with.
func inherited[T any](fd int, open func(*os.File) (T, error)) (T, error) {
	f := os.NewFile(uintptr(fd), "inherited")
	defer f.Close()
	return open(f)
}

// openNetwork makes the guest's interface. What it returns ends with the guest.
func (r *machineRequest) openNetwork(log *slog.Logger) (n guest.Network, end io.Closer, err error) {
	f := r.net
	n.MAC, n.MTU = f.mac, f.mtu
	if n.MAC == nil {
		n.MAC = guest.MACAddress("eth0")
	}
	if !f.user {
		t, err := virtionet.OpenTap(f.tap)
		if err != nil {
			return n, nil, fmt.Errorf("--net: %w", err)
		}
		n.Link = t
		return n, t, nil
	}
	s, err := startNetwork(f, r.confine, log)
	if err != nil {
		return n, nil, fmt.Errorf("--net: %w", err)
	}
	n.Link = s
	n.Address = netip.PrefixFrom(usernet.GuestAddr(), usernet.Subnet().Bits())
	n.Gateway, n.DNS = usernet.RouterAddr(), usernet.RouterAddr()
	return n, s, nil
}

// startNetwork starts the network's process.
func startNetwork(f *netFlag, confined bool, log *slog.Logger) (*virtionet.Stream, error) {
	var files []*os.File // of the other process
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	here, there, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		return nil, err
	}
	defer here.Close()
	files = append(files, there)
	job := networkJob{Policy: f.policy, MTU: f.mtu, Confine: confined, Level: slog.LevelWarn}
	if !log.Enabled(nil, slog.LevelWarn) { //nolint:staticcheck // no context is asked
		job.Level = slog.LevelError
	}
	for _, p := range f.forwards {
		l, err := p.Open()
		if err != nil {
			return nil, err
		}
		file, err := l.File()
		l.Close()
		if err != nil {
			return nil, err
		}
		files, job.Ports = append(files, file), append(job.Ports, p.Port)
		if p.Listen.Port() == 0 {
			log.Warn("a forward listens", "on", l.Addr().String(), "guest_port", p.Port)
		}
	}
	argument, err := bytejson.Marshal(job)
	if err != nil {
		return nil, err
	}
	conn, err := net.FileConn(here)
	if err != nil {
		return nil, err
	}
	if u, ok := conn.(*net.UnixConn); ok {
		_ = u.SetWriteBuffer(1 << 20) // a smaller one is slower, no more
	}
	if err := startHelper(networkRole(), string(argument), files, log); err != nil {
		conn.Close()
		return nil, err
	}
	return virtionet.NewStream(conn, virtionet.Offloads{Checksum: true, Segmentation: true}), nil
}

// socketPair is two ends of a line.
func socketPair(typ int) (a, b *os.File, err error) {
	p, err := unix.Socketpair(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(p[0]), "line"), os.NewFile(uintptr(p[1]), "line"), nil
}

// startHelper starts this program in another role, with files from descriptor
// 3 on. It ends when its line does; a terminal's signals do not reach it.
func startHelper(role reexec.Role, argument string, files []*os.File, log *slog.Logger) error {
	self, err := reexec.Path()
	if err != nil {
		return err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), role.Env(argument))
	cmd.Stderr, cmd.ExtraFiles = os.Stderr, files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("the %s process: %w", role.Name, err)
	}
	go func() {
		var exit *exec.ExitError
		if err := cmd.Wait(); errors.As(err, &exit) {
			log.Warn("a process of the machine has ended", "role", role.Name, "status", exit.String())
		}
	}()
	return nil
}
