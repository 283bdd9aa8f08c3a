package sandbox

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/guest/guestinit"
	"github.com/moovm/moovm/internal/agent"
	"github.com/moovm/moovm/internal/bytejson"
	"github.com/moovm/moovm/internal/printable"
	"github.com/moovm/moovm/internal/reexec"
)

// A shared sandbox is an emulated host that takes commands from several
// programs of one user. The first of them starts a server, a process of its
// own that listens on a socket in the user's temporary folder and has the
// emulator as its child; it ends when nobody has been connected for a while.
//
//	Join ─┐                    ┌ server ┐          ┌ emulated host ┐
//	Join ─┼── unix socket ────▶│ relays │── agent ▶│ commands      │
//	Join ─┘  frames of agent   └────────┘  frames  └───────────────┘

const (
	// sharedVersion is part of the socket's name: it changes with the protocol.
	sharedVersion = "2"
	// sharedIdle is how long a server stays without clients.
	sharedIdle = 10 * time.Second
	// idleEnv overrides sharedIdle, for tests.
	idleEnv = "MOOVM_SANDBOX_IDLE"
)

// sharedConfig is what of a Config makes two shared sandboxes different, and
// what its server is told.
type sharedConfig struct {
	Kernel, Modules, QEMU string
	Memory                int64
	CPUs                  int

	Init string // not part of the key: any will do
	Path string // the places, without extension
}

// Session is a place in a shared sandbox. Its methods are for one goroutine.
type Session struct {
	conn    net.Conn
	client  *agent.Client
	scratch string
	log     string // the server's
}

// Join connects to the user's shared sandbox with that Kernel, Modules, QEMU,
// Memory and number of CPUs, and starts it when there is none; c.Init is its
// init then, and this program its server: it must give Server to reexec.Do
// first thing in main. The other fields of c mean nothing. Join waits until commands
// can be run. begin is called at most once, when there was no sandbox and one is
// started: of all calls that come to share it, by one.
func Join(ctx context.Context, c Config, begin func()) (*Session, error) {
	c.setDefaults()
	if _, err := exec.LookPath(c.QEMU); err != nil {
		return nil, fmt.Errorf("%w (%v)", ErrNoQEMU, err)
	}
	s := sharedConfig{Kernel: c.Kernel, Modules: c.Modules, QEMU: c.QEMU, Memory: c.Memory, CPUs: c.CPUs}
	var err error
	if s.Path, err = sharedPath(s); err != nil {
		return nil, err
	}
	s.Init = c.Init
	begin = sync.OnceFunc(begin)
	for try := 1; ; try++ {
		session, err := s.join(ctx, begin)
		// A server that was about to end when it was connected to is no error,
		// and an emulated host may fail to boot once: QEMU's emulation is not
		// without faults.
		var start *startError
		if !errors.Is(err, errServerGone) && !errors.As(err, &start) || try == sharedTries || ctx.Err() != nil {
			return session, err
		}
	}
}

// sharedTries is how often Join tries.
const sharedTries = 3

// startError is what a server says of a sandbox that did not start.
type startError struct{ text string }

func (e *startError) Error() string { return e.text }

var errServerGone = errors.New("the sandbox's server is gone before it was ready")

func (s *sharedConfig) join(ctx context.Context, begin func()) (*Session, error) {
	conn, err := s.connect(begin)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	r := bufio.NewReader(conn)
	line, err := r.ReadString('\n')
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fmt.Errorf("%w%s", errServerGone, tailOf(s.Path+".log"))
	}
	if problem, ok := strings.CutPrefix(line, "error "); ok {
		conn.Close()
		var text string
		_ = bytejson.Unmarshal([]byte(problem), &text)
		return nil, &startError{text}
	}
	scratch, err := os.MkdirTemp(s.Path+".d", "")
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &Session{conn: conn, client: agent.NewClient(r, conn), scratch: scratch, log: s.Path + ".log"}, nil
}

// Scratch is a folder that this machine and the sandbox both have, writable,
// under this name. It goes with the session.
func (s *Session) Scratch() string { return s.scratch }

// Run runs a command in the sandbox and returns its exit status. The signals
// are passed on; when the command does not end for long after one, it is
// killed.
func (s *Session) Run(cmd agent.Command, stdin io.Reader, stdout, stderr io.Writer, signals <-chan os.Signal) (int, error) {
	run, err := s.client.Start(cmd, stdin, stdout, stderr)
	if err != nil {
		return 0, err
	}
	var late <-chan time.Time
	for {
		select {
		case sig := <-signals:
			number, _ := sig.(syscall.Signal)
			_ = run.Signal(int(number))
			late = time.After(2 * grace)
		case <-late:
			run.Kill()
		case <-run.Done():
			exit, err := run.Wait()
			switch {
			case err != nil:
				return 0, fmt.Errorf("the sandbox ended before its command did: %w%s", err, tailOf(s.log))
			case exit.Error != "":
				return 0, fmt.Errorf("the sandbox could not start the command: %s", exit.Error)
			}
			return exit.Status, nil
		}
	}
}

// Close leaves the sandbox. What still runs there for this session is killed.
func (s *Session) Close() error {
	s.conn.Close()
	<-s.client.Done()
	return os.RemoveAll(s.scratch)
}

// sharedPath makes the user's folder for sockets and returns the name of this
// one's files, without extension.
func sharedPath(s sharedConfig) (string, error) {
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("moovm-%d", os.Getuid()))
	if len(dir) > 80 { // sun_path has 108 bytes
		dir = fmt.Sprintf("/tmp/moovm-%d", os.Getuid())
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Getuid() || st.Mode&0o077 != 0 {
		return "", fmt.Errorf("%s is not a private folder of this user; remove it", dir)
	}
	b, err := bytejson.Marshal(s)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append([]byte(sharedVersion), b...))
	return filepath.Join(dir, "sandbox-"+hex.EncodeToString(sum[:6])), nil
}

// lock takes the lock under which servers begin and end, and clients connect.
func (s *sharedConfig) lock() (unlock func(), err error) {
	f, err := os.OpenFile(s.Path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// connect connects to the server, which it starts if there is none. The
// socket is made here, so that the server need not be waited for. It calls begin if
// it started one.
func (s *sharedConfig) connect(begin func()) (net.Conn, error) {
	unlock, err := s.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	socket := s.Path + ".sock"
	conn, err := net.Dial("unix", socket)
	if err == nil {
		return conn, nil
	}
	_ = os.Remove(socket)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	f, err := l.File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	self, err := reexec.Path()
	if err != nil {
		return nil, err
	}
	log, err := os.Create(s.Path + ".log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	conf, err := bytejson.Marshal(s)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), Server().Env(string(conf)))
	cmd.Dir = "/"
	cmd.Stderr = log
	cmd.ExtraFiles = []*os.File{f} // 3
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the sandbox's server: %w", err)
	}
	go func() { _ = cmd.Wait() }() // it outlives this process, or not
	begin()
	return net.Dial("unix", socket)
}

// tailOf is the end of a log for an error message.
func tailOf(path string) string {
	b, _ := os.ReadFile(path)
	if b = b[max(0, len(b)-tailSize):]; len(b) == 0 {
		return ""
	}
	return "\n" + string(b)
}

// Server is the role of a shared sandbox's server, for reexec.Do.
func Server() reexec.Role { return reexec.Role{Name: "sandbox-server", Main: serverMain} }

func serverMain(conf string) int {
	var s sharedConfig
	err := bytejson.Unmarshal([]byte(conf), &s)
	if err == nil {
		err = s.serve()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "moovm:", printable.Lines(err.Error()))
		return 1
	}
	return 0
}

// server relays between its clients and the agent on the emulated host.
type server struct {
	conf  sharedConfig
	agent *agent.Writer

	mu      sync.Mutex
	ready   bool
	failed  error
	clients map[*client]bool
	routes  map[uint32]route
	next    uint32
	idle    time.Time // since when nobody has been connected
}

type route struct {
	c  *client
	id uint32 // as the client says it
}

func (s *sharedConfig) serve() error {
	f := os.NewFile(3, "socket")
	l, err := net.FileListener(f)
	if err != nil {
		return err
	}
	f.Close()
	listener := l.(*net.UnixListener)
	scratch := s.Path + ".d"
	_ = os.RemoveAll(scratch)
	if err := os.Mkdir(scratch, 0o700); err != nil {
		return err
	}
	fromServer, toAgent := io.Pipe()
	fromAgent, toServer := io.Pipe()
	v := &server{conf: *s, agent: agent.NewWriter(toAgent), clients: map[*client]bool{}, routes: map[uint32]route{}, idle: time.Now()}
	command := guestinit.AgentCommand(true)
	command.Dir = "/"
	conf := Config{
		Kernel: s.Kernel, Modules: s.Modules, QEMU: s.QEMU, Init: s.Init, Memory: s.Memory, CPUs: s.CPUs,
		Command: *command, Writable: []string{scratch},
		Stdin: fromServer, Stdout: toServer, Stderr: os.Stderr,
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	conf.OnStart = v.started
	ended := make(chan error, 1)
	go func() {
		status, err := Run(ctx, conf)
		if err == nil && status != 0 {
			err = fmt.Errorf("the agent of the sandbox ended with status %d", status)
		}
		toServer.Close()
		ended <- err
	}()
	go v.fromAgent(fromAgent)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			v.accept(conn)
		}
	}()

	return v.serveUntilIdle(listener, ended, func() { toAgent.Close() }, cancel)
}

// serveUntilIdle waits until nobody has been connected for a while, or the
// emulated host has ended. hangUp ends the agent, and the emulated host with it;
// kill ends that if it does not.
func (v *server) serveUntilIdle(l net.Listener, ended <-chan error, hangUp, kill func()) error {
	limit := sharedIdle
	if d, err := time.ParseDuration(os.Getenv(idleEnv)); err == nil {
		limit = d
	}
	look := time.NewTicker(min(limit, time.Second) / 2)
	defer look.Stop()
	for {
		select {
		case err := <-ended:
			unlock, err2 := v.conf.lock()
			if err2 != nil {
				return err2
			}
			defer unlock()
			v.conf.remove(l)
			if err == nil {
				err = errors.New("the sandbox ended by itself")
			}
			v.fail(err)
			return err
		case <-look.C:
			unlock, err := v.conf.lock()
			if err != nil {
				return err
			}
			// Nobody can connect now; who did before this has been accepted,
			// or will be in a moment.
			time.Sleep(5 * time.Millisecond)
			if !v.idleFor(limit) {
				unlock()
				continue
			}
			v.conf.remove(l)
			unlock()
			hangUp()
			select {
			case err := <-ended:
				return err
			case <-time.After(2 * grace):
				kill()
				return <-ended
			}
		}
	}
}

// remove takes the server's files away.
func (s *sharedConfig) remove(l net.Listener) {
	l.Close()
	_ = os.Remove(s.Path + ".sock")
	_ = os.RemoveAll(s.Path + ".d")
}

func (v *server) idleFor(d time.Duration) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.clients) == 0 && time.Since(v.idle) >= d
}

// client is a connection. What goes to it waits in a queue, so that one that
// does not read holds up nobody; its sessions' windows bound the queue.
type client struct {
	conn net.Conn

	mu     sync.Mutex
	cond   sync.Cond
	queue  [][]byte
	closed bool
}

func (v *server) accept(conn net.Conn) {
	c := &client{conn: conn}
	c.cond.L = &c.mu
	v.mu.Lock()
	v.clients[c] = true
	ready, failed := v.ready, v.failed
	v.mu.Unlock()
	if failed != nil {
		greetError(conn, failed)
		conn.Close()
		return
	}
	if ready {
		c.send([]byte("ready\n"))
	}
	go c.deliver()
	go v.fromClient(c)
}

// started tells who waits that commands can be run.
func (v *server) started(string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ready {
		return
	}
	v.ready = true
	for c := range v.clients {
		c.send([]byte("ready\n"))
	}
}

func greetError(conn net.Conn, err error) {
	b, _ := bytejson.Marshal(err.Error())
	_, _ = conn.Write(append(append([]byte("error "), b...), '\n'))
}

// fail ends all connections.
func (v *server) fail(err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.failed = err
	for c := range v.clients {
		if !v.ready {
			greetError(c.conn, err)
		}
		c.conn.Close()
	}
}

func (c *client) send(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue = append(c.queue, b)
	c.cond.Broadcast()
}

func (c *client) deliver() {
	for {
		c.mu.Lock()
		for len(c.queue) == 0 && !c.closed {
			c.cond.Wait()
		}
		if c.closed {
			c.mu.Unlock()
			return
		}
		b := c.queue[0]
		c.queue = c.queue[1:]
		c.mu.Unlock()
		if _, err := c.conn.Write(b); err != nil {
			return // fromClient sees it too
		}
	}
}

// fromClient relays a client's frames until it is gone, then kills what it
// had running.
func (v *server) fromClient(c *client) {
	defer func() {
		c.conn.Close()
		c.mu.Lock()
		c.closed = true
		c.cond.Broadcast()
		c.mu.Unlock()
		v.mu.Lock()
		var left []uint32
		for id, r := range v.routes {
			if r.c == c {
				left = append(left, id)
				delete(v.routes, id)
			}
		}
		delete(v.clients, c)
		v.idle = time.Now()
		v.mu.Unlock()
		for _, id := range left {
			_ = v.agent.Write(agent.Frame{ID: id, Kind: agent.KindKill})
		}
	}()
	r := bufio.NewReader(c.conn)
	for {
		f, err := agent.ReadFrame(r)
		if err != nil {
			return
		}
		v.mu.Lock()
		var id uint32
		if f.Kind == agent.KindStart {
			v.next++
			id = v.next
			v.routes[id] = route{c, f.ID}
		} else {
			for have, r := range v.routes {
				if r.c == c && r.id == f.ID {
					id = have
				}
			}
		}
		v.mu.Unlock()
		if id == 0 {
			continue // it has just ended
		}
		f.ID = id
		if err := v.agent.Write(f); err != nil {
			return
		}
	}
}

// fromAgent relays what comes from the emulated host.
func (v *server) fromAgent(r io.Reader) {
	for {
		f, err := agent.ReadFrame(r)
		if err != nil {
			return
		}
		v.mu.Lock()
		to, ok := v.routes[f.ID]
		if f.Kind == agent.KindExit {
			delete(v.routes, f.ID)
		}
		v.mu.Unlock()
		if !ok {
			continue // its client is gone
		}
		f.ID = to.id
		to.c.send(agent.AppendFrame(nil, f))
	}
}
