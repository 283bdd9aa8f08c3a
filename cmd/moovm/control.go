package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moovm/moovm/ctl"
	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/vmm"
)

// controlFlag is what --control asks for.
type controlFlag struct {
	socket string
	dir    string // where overlays may be made; empty: nowhere
}

// parseControl takes --control apart; no text is no control.
func parseControl(text string) (controlFlag, error) {
	if text == "" {
		return controlFlag{}, nil
	}
	fields := splitCommas(text)
	socket, ok := strings.CutPrefix(fields[0], "unix:")
	if !ok || socket == "" {
		return controlFlag{}, fmt.Errorf("--control %s: write unix:PATH[,dir=DIR]", text)
	}
	c := controlFlag{socket: socket}
	for _, f := range fields[1:] {
		dir, ok := strings.CutPrefix(f, "dir=")
		if !ok || dir == "" || c.dir != "" {
			return controlFlag{}, fmt.Errorf("--control %s: %q is not dir=DIR, once; a comma in a path is written twice", text, f)
		}
		c.dir = dir
	}
	return c, nil
}

// controlled is a machine that can be asked through its socket.
type controlled struct {
	listener net.Listener
	socket   *ctl.Server
	serving  sync.WaitGroup
	console  *ctl.Console
	dir      string // resolved
	disks    []guest.Disk
	cpus     int
	// ephemeral says that the first disk is an overlay without a name.
	ephemeral bool

	machine *vmm.Machine // set before serving
	started time.Time

	mu    sync.Mutex
	guest *guest.Guest // nil until it has started
	stop  func()
}

// listenControl makes the socket. Who connects waits until serve.
func (r *machineRequest) listenControl(disks []guest.Disk) (*controlled, error) {
	c := &controlled{console: ctl.NewConsole(), cpus: r.cpus, disks: disks, ephemeral: r.base != ""}
	var err error
	if dir := r.control.dir; dir != "" {
		if c.dir, err = absPath(dir); err != nil {
			return nil, err
		}
		if st, err := os.Stat(c.dir); err != nil || !st.IsDir() {
			return nil, fmt.Errorf("dir=%s: %w", dir, errors.Join(err, syscall.ENOTDIR))
		}
	}
	if c.listener, err = ctl.Listen(r.control.socket); err != nil {
		return nil, err
	}
	c.socket = ctl.NewServer(c, ctl.Options{Version: version, Console: c.console})
	return c, nil
}

// watch keeps what the guest writes to its console.
func (c *controlled) watch(s *vmm.Serial) {
	if s.Out == nil {
		s.Out = c.console
	} else {
		s.Out = io.MultiWriter(c.console, s.Out)
	}
}

// serve answers, from when there is a machine.
func (c *controlled) serve(m *vmm.Machine) {
	c.machine, c.started = m, time.Now().UTC()
	c.serving.Go(func() { c.socket.Serve(c.listener) }) // its end is Close's
}

// Close ends the socket.
func (c *controlled) Close() {
	c.console.Close()
	c.socket.Close()
	c.listener.Close() // if it was never served
	c.serving.Wait()
}

// running is called when there is a guest.
func (c *controlled) running(g *guest.Guest, stop func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.guest, c.stop = g, stop
}

// Status implements ctl.Machine.
func (c *controlled) Status() ctl.Status {
	s := c.machine.Stats()
	status := ctl.Status{
		Version: version, State: s.State, Started: c.started, CPUs: c.cpus,
		Memory: int64(s.RAM), MemoryUsed: int64(s.RAMUsed), Disks: []ctl.Disk{},
	}
	for i, d := range c.disks {
		top := d.COW.Info()
		disk := ctl.Disk{
			Name: guest.DiskName(i), Path: top.Filename, ReadOnly: d.ReadOnly,
			Size: d.COW.Size(), ActualSize: top.ActualSize, Layers: len(d.COW.Layers()),
		}
		if c.ephemeral && i == 0 {
			disk.Path = "" // the base's overlay has no name
		}
		status.Disks = append(status.Disks, disk)
	}
	return status
}

// Pause implements ctl.Machine.
func (c *controlled) Pause() error { return state(c.machine.Pause()) }

// Resume implements ctl.Machine.
func (c *controlled) Resume() error { return state(c.machine.Resume()) }

// PowerButton implements ctl.Machine.
func (c *controlled) PowerButton() error { return state(c.machine.PowerButton()) }

// Reset implements ctl.Machine.
func (c *controlled) Reset() error {
	c.machine.Reset()
	return nil
}

// Stop implements ctl.Machine.
func (c *controlled) Stop() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stop == nil {
		return fmt.Errorf("%w: it is just starting", ctl.ErrState)
	}
	c.stop()
	return nil
}

// state says that what a machine refuses it refuses because of its state.
func state(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", ctl.ErrState, err)
}

// snapshotLimit is how long requests in flight may hold up a snapshot.
const snapshotLimit = 30 * time.Second

// SnapshotDisks implements ctl.Machine.
func (c *controlled) SnapshotDisks(ctx context.Context, overlays map[string]string) ([]string, error) {
	c.mu.Lock()
	g := c.guest
	c.mu.Unlock()
	if g == nil {
		return nil, fmt.Errorf("%w: it is just starting", ctl.ErrState)
	}
	resolved := map[string]string{}
	for name, path := range overlays {
		at, err := c.place(path)
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", name, err)
		}
		resolved[name] = at
	}
	ctx, cancel := context.WithTimeout(ctx, snapshotLimit)
	defer cancel()
	done, err := g.SnapshotDisks(ctx, resolved)
	switch {
	case errors.Is(err, guest.ErrNoDisk):
		err = fmt.Errorf("%w: %w", ctl.ErrNoDisk, err)
	case errors.Is(err, vmm.ErrClosed):
		err = state(err)
	}
	return done, err
}

// place is where an overlay is made: below the folder that was named for it.
func (c *controlled) place(path string) (string, error) {
	if c.dir == "" {
		return "", fmt.Errorf("%w: overlays can be made nowhere; start the machine with --control unix:PATH,dir=DIR", ctl.ErrNotAllowed)
	}
	if !filepath.IsAbs(path) {
		path = filepath.Join(c.dir, path)
	}
	// The folder is resolved, the name in it is new.
	dir, err := absPath(filepath.Dir(path))
	if err != nil {
		return "", fmt.Errorf("%w: %w", ctl.ErrRequest, err)
	}
	if rel, err := filepath.Rel(c.dir, dir); err != nil || !filepath.IsLocal(rel) {
		return "", fmt.Errorf("%w: %s is not below %s, where the machine may make overlays", ctl.ErrNotAllowed, path, c.dir)
	}
	return filepath.Join(dir, filepath.Base(path)), nil
}

// WriteMetrics implements ctl.Machine.
func (c *controlled) WriteMetrics(w io.Writer) { writeMetrics(w, c.machine.Stats()) }
