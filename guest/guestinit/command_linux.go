package guestinit

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/internal/pipe"
	"golang.org/x/sys/unix"
)

// runCommand runs the command as a child, reports how it ended, and switches
// the machine off. It returns only when the command could not be started.
func (in *initProcess) runCommand(c control.Command) error {
	in.prepareUserspace()
	if in.cfg.CorePattern != "" {
		_ = os.WriteFile("/proc/sys/kernel/core_pattern", []byte(in.cfg.CorePattern), 0)
		_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
	}
	who, err := lookAccount(c.User)
	if err != nil {
		return err
	}
	env := c.Env
	if who != nil {
		env = append(who.env, env...)
	}
	env = commandEnv(env)
	if err := in.setup(c, env); err != nil {
		return err
	}
	program, err := lookProgram(c.Args[0], envValue(env, "PATH"), c.Dir)
	if err != nil {
		return err
	}
	p, err := startCommand(c, program, env, who)
	if err != nil {
		if c.Dir != "" {
			if _, err := os.Stat(c.Dir); err != nil {
				return &stageError{control.FailCommand, 127, fmt.Errorf("the guest has no working folder %s: %w", c.Dir, errCause(err))}
			}
		}
		return startError(c.Args[0], err)
	}
	in.line.start(c.Args[0])
	go in.input(p)
	var copies sync.WaitGroup
	copies.Go(func() { in.output(p.stdout, control.FrameStdout) })
	if p.stderr != nil {
		copies.Go(func() { in.output(p.stderr, control.FrameStderr) })
	}
	ws := reap(p.pid)
	endOthers()
	copies.Wait()
	if ws.Signaled() {
		in.line.exit(128+int(ws.Signal()), int(ws.Signal()))
	} else {
		in.line.exit(ws.ExitStatus(), 0)
	}
	in.powerOff()
	return nil
}

// lookProgram finds a program as a shell does, in path unless its name has a
// slash.
func lookProgram(name, path, dir string) (string, error) {
	if strings.Contains(name, "/") {
		full := name
		if !filepath.IsAbs(full) {
			full = filepath.Join("/", dir, name)
		}
		if st, err := os.Stat(full); err != nil {
			return "", startError(name, err)
		} else if st.IsDir() || st.Mode()&0o111 == 0 {
			return "", startError(name, unix.EACCES)
		}
		return full, nil
	}
	err := error(unix.ENOENT)
	for _, d := range filepath.SplitList(path) {
		p := filepath.Join("/", d, name)
		if st, e := os.Stat(p); e == nil && st.Mode().IsRegular() {
			if st.Mode()&0o111 != 0 {
				return p, nil
			}
			err = unix.EACCES
		}
	}
	return "", startError(name, err)
}

// startError explains why a command cannot be started, with the exit status
// that a shell gives it.
func startError(name string, err error) error {
	e := &stageError{control.FailCommand, 126, fmt.Errorf("%s cannot be run in the guest: %w", name, errCause(err))}
	switch {
	case errors.Is(err, unix.ENOENT):
		e.status, e.err = 127, fmt.Errorf("%s: not found in the guest", name)
	case errors.Is(err, unix.ENOEXEC):
		e.err = fmt.Errorf("%s cannot be run in the guest: not a program for it", name)
	}
	return e
}

// process is the running command. stdin may be the same file as stdout.
type process struct {
	pid      int
	stdin    *os.File
	stdout   *os.File
	stderr   *os.File // nil with a terminal, or when it is stdout
	terminal bool
}

func startCommand(c control.Command, program string, env []string, who *account) (*process, error) {
	if c.Terminal {
		return startOnTerminal(c, program, env, who)
	}
	var ends []*os.File
	closeAll := func() {
		for _, f := range ends {
			f.Close()
		}
	}
	pipes := [3][2]*os.File{}
	for i := range pipes {
		if i == 2 && c.Merge {
			pipes[2] = pipes[1]
			break
		}
		r, w, err := os.Pipe()
		if err != nil {
			closeAll()
			return nil, err
		}
		pipes[i] = [2]*os.File{r, w}
		ends = append(ends, r, w)
	}
	who.own(ends...)
	pid, err := syscall.ForkExec(program, c.Args, &syscall.ProcAttr{
		Dir:   workDir(c),
		Env:   env,
		Files: []uintptr{pipes[0][0].Fd(), pipes[1][1].Fd(), pipes[2][1].Fd()},
		// A group, for signals, but no session of its own: a session's leader
		// would get every terminal that it opens as its controlling one.
		Sys: who.attributes(&syscall.SysProcAttr{Setpgid: true}),
	})
	if err != nil {
		closeAll()
		return nil, err
	}
	pipes[0][0].Close()
	pipes[1][1].Close()
	p := &process{pid: pid, stdin: pipes[0][1], stdout: pipes[1][0]}
	if !c.Merge {
		pipes[2][1].Close()
		p.stderr = pipes[2][0]
	}
	return p, nil
}

func startOnTerminal(c control.Command, program string, env []string, who *account) (*process, error) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	fd := int(master.Fd())
	err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	var n int
	if err == nil {
		n, err = unix.IoctlGetInt(fd, unix.TIOCGPTN)
	}
	if err != nil {
		master.Close()
		return nil, fmt.Errorf("no terminal: %w", err)
	}
	if c.Rows > 0 && c.Columns > 0 {
		_ = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: c.Rows, Col: c.Columns})
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		master.Close()
		return nil, err
	}
	defer slave.Close()
	who.own(slave)
	pid, err := syscall.ForkExec(program, c.Args, &syscall.ProcAttr{
		Dir:   workDir(c),
		Env:   env,
		Files: []uintptr{slave.Fd(), slave.Fd(), slave.Fd()},
		Sys:   who.attributes(&syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}),
	})
	if err != nil {
		master.Close()
		return nil, err
	}
	return &process{pid: pid, stdin: master, stdout: master, terminal: true}, nil
}

func workDir(c control.Command) string {
	if c.Dir == "" {
		return "/"
	}
	return c.Dir
}

// output sends what the command writes. A terminal ends with EIO when the last
// program on it has gone.
func (in *initProcess) output(r *os.File, kind control.FrameKind) {
	buf := make([]byte, in.line.frameSize())
	for {
		n, err := r.Read(buf)
		if n > 0 {
			in.line.send(kind, buf[:n])
		}
		if err != nil {
			return
		}
	}
}

// input serves what the host sends: stdin, signals, window sizes. Stdin goes
// through a pipe of its own, so that a command that does not read holds up
// nothing else; the credit bounds what is in it.
func (in *initProcess) input(p *process) {
	if in.line == nil {
		p.stdin.Close()
		return
	}
	stdin := pipe.New()
	go func() {
		buf := make([]byte, control.MaxFrame)
		gone := false
		for {
			n, err := stdin.Read(buf)
			if err != nil {
				break
			}
			if !gone {
				_, err := p.stdin.Write(buf[:n])
				gone = err != nil // the command closed it: swallow the rest
			}
			in.line.credit(n)
		}
		if p.terminal {
			_, _ = p.stdin.Write([]byte{4}) // VEOF
		} else {
			p.stdin.Close()
		}
	}()
	in.line.credit(in.line.window())
	frames := control.NewFrameReader(in.line)
	for {
		f, err := frames.Next()
		if err != nil {
			return
		}
		switch f.Kind {
		case control.FrameStdin:
			_, _ = stdin.Write(f.Payload)
		case control.FrameStdinEOF:
			stdin.Close()
		case control.FrameSignal:
			if len(f.Payload) == 1 {
				_ = unix.Kill(-p.pid, unix.Signal(f.Payload[0]))
			}
		case control.FrameResize:
			if len(f.Payload) == 4 && p.terminal {
				_ = unix.IoctlSetWinsize(int(p.stdin.Fd()), unix.TIOCSWINSZ, &unix.Winsize{
					Row: binary.LittleEndian.Uint16(f.Payload), Col: binary.LittleEndian.Uint16(f.Payload[2:]),
				})
			}
		}
	}
}

// reap waits for the command, and for every orphan that dies before it: PID 1
// inherits them all.
func reap(pid int) syscall.WaitStatus {
	for {
		var ws syscall.WaitStatus
		p, err := syscall.Wait4(-1, &ws, 0, nil)
		if p == pid && (ws.Exited() || ws.Signaled()) {
			return ws
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return ws
		}
	}
}

// endOthers ends what the command left running: politely, then not.
func endOthers() {
	for _, step := range []struct {
		signal unix.Signal
		wait   time.Duration
	}{{unix.SIGTERM, time.Second}, {unix.SIGKILL, 2 * time.Second}} {
		if unix.Kill(-1, step.signal) != nil {
			return // nobody there
		}
		for deadline := time.Now().Add(step.wait); time.Now().Before(deadline); {
			p, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
			if errors.Is(err, unix.ECHILD) {
				return
			}
			if p == 0 {
				time.Sleep(5 * time.Millisecond)
			}
		}
	}
}

// errCause takes the path off a file system error, for messages that have it
// already.
func errCause(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
