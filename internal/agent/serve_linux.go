package agent

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/internal/bytejson"
)

// leftover is how long the output of what a command left running is read.
const leftover = time.Second

// Serve is the agent: it runs what arrives on r until that ends, then kills
// what is still running.
func Serve(r io.Reader, w io.Writer, h Hooks) error {
	a := &server{w: NewWriter(w), hooks: h, running: map[uint32]*process{}}
	defer a.end()
	for {
		f, err := ReadFrame(r)
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if f.Kind == KindHold {
			if err := a.hold(r); err != nil {
				return err
			}
			continue
		}
		if f.Kind == KindStart {
			if h.Before != nil {
				h.Before()
			}
			a.start(f)
			continue
		}
		a.mu.Lock()
		p := a.running[f.ID]
		a.mu.Unlock()
		if p != nil { // else it has just ended
			p.handle(f)
		}
	}
}

// hold lets the stream stand still at this end until the client says go.
func (a *server) hold(r io.Reader) error {
	a.w.mu.Lock()
	defer a.w.mu.Unlock()
	if a.hooks.Hold != nil {
		a.hooks.Hold()
	}
	if err := a.w.writeLocked(Frame{Kind: KindHeld}); err != nil {
		return err
	}
	f, err := ReadFrame(r)
	var id Identity
	if err == nil && f.Kind != KindGo {
		err = fmt.Errorf("%w: %d in a stream that stands still", ErrFrame, f.Kind)
	} else if err == nil {
		err = bytejson.Unmarshal(f.Payload, &id)
	}
	if err != nil {
		return err
	}
	if id.Clone {
		a.mu.Lock()
		for _, p := range a.running {
			p.disown()
		}
		a.mu.Unlock()
	}
	var failed string
	if a.hooks.Go != nil {
		if err := a.hooks.Go(id); err != nil {
			failed = err.Error()
		}
	}
	return a.w.writeLocked(Frame{Kind: KindGone, Payload: []byte(failed[:min(len(failed), MaxPayload)])})
}

type server struct {
	w     *Writer
	hooks Hooks
	wg    sync.WaitGroup

	mu      sync.Mutex
	running map[uint32]*process
}

func (a *server) end() {
	a.mu.Lock()
	for _, p := range a.running {
		p.kill()
	}
	a.mu.Unlock()
	a.wg.Wait()
}

// process is a running command.
type process struct {
	a     *server
	id    uint32
	proc  *os.Process
	out   *budget // of stdout and stderr together
	stdin *queue
}

func (a *server) start(f Frame) {
	fail := func(status int, err error) {
		b, _ := bytejson.Marshal(Exit{Status: status, Error: err.Error()})
		_ = a.w.Write(Frame{f.ID, KindExit, b})
	}
	var c Command
	if err := bytejson.Unmarshal(f.Payload, &c); err != nil || len(c.Args) == 0 {
		fail(126, fmt.Errorf("not a command: %v", err))
		return
	}
	if c.Dir == "" {
		c.Dir = "/"
	}
	if _, err := os.Stat(c.Dir); err != nil {
		fail(127, fmt.Errorf("there is no working folder %s: %w", c.Dir, err))
		return
	}
	program, err := lookProgram(c)
	if err != nil {
		status := 126
		if errors.Is(err, fs.ErrNotExist) {
			status = 127
		}
		fail(status, err)
		return
	}
	var files [3]*os.File // the command's
	var ours [3]*os.File
	for i := range files {
		if i == 2 && c.Merge {
			files[2] = files[1]
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			closeFiles(files[:])
			closeFiles(ours[:])
			fail(126, err)
			return
		}
		files[i], ours[i] = w, r
		if i == 0 {
			files[i], ours[i] = r, w
		}
	}
	proc, err := os.StartProcess(program, c.Args, &os.ProcAttr{
		Dir: c.Dir, Env: c.Env, Files: files[:], Sys: &syscall.SysProcAttr{Setpgid: true}, // not the leader of a session: it may open terminals
	})
	closeFiles(files[:])
	if err != nil {
		closeFiles(ours[:])
		fail(126, err)
		return
	}
	p := &process{a: a, id: f.ID, proc: proc, out: newBudget(), stdin: newQueue()}
	a.mu.Lock()
	a.running[f.ID] = p
	a.mu.Unlock()
	a.wg.Go(func() { p.run(ours) })
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close() // a second Close of a shared one does no harm
		}
	}
}

// lookProgram finds the program as a shell does.
func lookProgram(c Command) (string, error) {
	name := c.Args[0]
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(c.Dir, name)
		}
		st, err := os.Stat(name)
		if err == nil && (st.IsDir() || st.Mode()&0o111 == 0) {
			err = fs.ErrPermission
		}
		if err != nil {
			return "", fmt.Errorf("%s cannot be run: %w", c.Args[0], err)
		}
		return name, nil
	}
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, e := range c.Env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	for _, d := range filepath.SplitList(path) {
		p := filepath.Join("/", d, name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: %w in %s", name, fs.ErrNotExist, path)
}

// run moves the streams and reports the end.
func (p *process) run(ours [3]*os.File) {
	var copies sync.WaitGroup
	for i, kind := range []Kind{1: KindStdout, 2: KindStderr} {
		if kind != 0 && ours[i] != nil {
			copies.Go(func() { _ = p.out.send(p.a.w, p.id, kind, ours[i]) })
		}
	}
	fed := make(chan struct{})
	go func() {
		defer close(fed)
		defer ours[0].Close()
		for {
			f, ok := p.stdin.take()
			if !ok {
				return
			}
			if _, err := ours[0].Write(f.Payload); err != nil {
				return // the command does not read
			}
			_ = p.a.w.credit(p.id, len(f.Payload))
		}
	}()
	st, err := p.proc.Wait()
	// What it left running may hold the pipes open.
	done := make(chan struct{})
	go func() { copies.Wait(); close(done) }()
	timer := time.AfterFunc(leftover, func() {
		p.kill()
		for _, f := range ours[1:] {
			if f != nil {
				_ = f.SetReadDeadline(time.Now())
			}
		}
	})
	<-done
	timer.Stop()
	closeFiles(ours[1:])
	p.stdin.drop()
	_ = ours[0].SetWriteDeadline(time.Now())
	p.a.mu.Lock()
	delete(p.a.running, p.id)
	p.out.close()
	p.a.mu.Unlock()
	if p.a.hooks.After != nil {
		p.a.hooks.After()
	}
	e := Exit{Status: 126}
	if err != nil {
		e.Error = err.Error()
	} else if ws, ok := st.Sys().(syscall.WaitStatus); ok {
		if e.Status = ws.ExitStatus(); ws.Signaled() {
			e.Signal = int(ws.Signal())
			e.Status = 128 + e.Signal
		}
	}
	b, _ := bytejson.Marshal(e)
	_ = p.a.w.Write(Frame{p.id, KindExit, b})
	<-fed
}

// handle is called from one goroutine only.
func (p *process) handle(f Frame) {
	switch f.Kind {
	case KindStdin:
		p.stdin.put(f) // more than was granted is dropped
	case KindStdinEOF:
		p.stdin.close()
	case KindSignal:
		if len(f.Payload) == 1 {
			_ = unix.Kill(-p.proc.Pid, unix.Signal(f.Payload[0]))
		}
	case KindKill:
		p.kill()
	case KindCredit:
		p.out.add(creditOf(f))
	}
}

// disown lets a process run on whose client is the one of another machine: its
// input ends, and what it writes is thrown away.
func (p *process) disown() {
	p.stdin.close()
	p.out.discard()
}

// kill ends the process with its group, and its output.
func (p *process) kill() {
	_ = unix.Kill(-p.proc.Pid, unix.SIGKILL)
	p.out.close()
}
