package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/vmm"
)

// Snapshot is a guest at one instant, but for the contents of its disks and
// shared folders: those are frozen by whoever owns them while the machine stands
// still. It never changes; any number of guests can be made from it.
type Snapshot struct {
	machine *vmm.Snapshot
	shape   shape
}

// shape is what a fork of a guest must know of it.
type shape struct {
	Memory     int64
	CPUs       int
	Transport  vmm.Transport
	Foreign    bool   // no init of ours
	ControlTag string // of the faster control line; empty = none
	HasModules bool   // its kernel's modules are a share
	Modules    string `json:"-"` // their folder; a file may not say what of the host a guest gets
	NoTree     bool
	Disks      []diskShape
	Shares     []string // tags
	Command    bool
	Control    control.Saved
}

type diskShape struct {
	ReadOnly bool   `json:",omitempty"`
	Serial   string `json:",omitempty"`
	Queues   int
}

// Close gives the memory of the snapshot back. Guests made from it go on. It is
// idempotent.
func (s *Snapshot) Close() error { return s.machine.Close() }

// SnapshotOptions are how a snapshot is taken.
type SnapshotOptions struct {
	// Frozen is called while the machine stands still and its devices are idle:
	// the place to freeze the disks. Its error fails the snapshot.
	Frozen func() error
}

// Snapshot freezes the guest as it is now; then it goes on. It waits, until ctx
// ends, for requests under way, and until the guest has taken what its command
// was sent. Whoever sends more meanwhile, or reads the command's output, must
// know that a copy has neither the end that comes later nor the beginning that
// came before: let the two ends agree on a moment, as agent.Client.Hold does.
func (g *Guest) Snapshot(ctx context.Context, o SnapshotOptions) (_ *Snapshot, err error) {
	if len(g.cfg.Networks) > 0 || g.cfg.Vsock != nil {
		return nil, errors.New("a guest with a network or socket device cannot be forked; start it without")
	}
	if len(g.cfg.Networks) > 0 || g.cfg.Vsock != nil {
		return nil, errors.New("a guest with a network or a socket device cannot be frozen yet; leave them out")
	}
	s := &Snapshot{shape: shape{
		Memory: g.cfg.Memory, CPUs: g.cfg.CPUs, Transport: g.cfg.Transport, Foreign: g.foreign, NoTree: g.cfg.NoTree,
		Modules: g.modulesDir, HasModules: g.modulesDir != "",
		Command: g.cfg.Command != nil,
	}}
	for i, d := range g.cfg.Disks {
		s.shape.Disks = append(s.shape.Disks, diskShape{ReadOnly: d.ReadOnly, Serial: d.Serial, Queues: g.devices.queues[i]})
	}
	for _, share := range g.cfg.Shares {
		s.shape.Shares = append(s.shape.Shares, share.Tag)
	}
	if s.shape.Command {
		if s.shape.Control, err = g.control.Idle(ctx); err != nil {
			return nil, fmt.Errorf("the guest's control line: %w", err)
		}
	} else {
		s.shape.Control = control.Saved{State: g.control.State()}
	}
	if g.share != nil {
		s.shape.ControlTag = control.ShareTag
		defer g.share.hasten()()
	}
	s.machine, err = g.machine.Snapshot(ctx, vmm.SnapshotOptions{Frozen: o.Frozen})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// ForkConfig is what a guest made from a snapshot gets of its own.
type ForkConfig struct {
	// Disks and Shares are as many as the snapshot's guest had, and of the same
	// kinds. Of a disk only what it contains is asked, of a share its Attacher.
	Disks  []Disk
	Shares []Share
	// Modules is the folder of the kernel's modules, for a snapshot that was
	// opened from files; another one knows it.
	Modules string
	// Stdin, Stdout, Stderr, Console, BeforeStart, Version, RevealPaths, KVM and
	// Logger are those of Config.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Console        vmm.Serial
	BeforeStart    func(*vmm.Machine) error
	Version        string
	RevealPaths    bool
	KVM            string
	Logger         *slog.Logger
}

// Fork starts a guest that goes on where the snapshot was taken. It is a twin of
// the first until it is told who it is: see agent.Clone and Identity. It is
// stopped as if its power failed when ctx ends. The caller closes it.
func (s *Snapshot) Fork(ctx context.Context, c ForkConfig) (*Guest, error) {
	if len(c.Disks) != len(s.shape.Disks) || len(c.Shares) != len(s.shape.Shares) {
		return nil, fmt.Errorf("%w: %d disks and %d shares were given, it has %d and %d", vmm.ErrSnapshotDevices,
			len(c.Disks), len(c.Shares), len(s.shape.Disks), len(s.shape.Shares))
	}
	cfg := Config{
		Memory: s.shape.Memory, CPUs: s.shape.CPUs, Transport: s.shape.Transport, NoTree: s.shape.NoTree,
		Disks: c.Disks, Shares: c.Shares, Stdin: c.Stdin, Stdout: c.Stdout, Stderr: c.Stderr, Console: c.Console,
		BeforeStart: c.BeforeStart, Version: c.Version, RevealPaths: c.RevealPaths, KVM: c.KVM, Logger: c.Logger,
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if s.shape.Command {
		cfg.Command = &control.Command{} // it runs already
	}
	if err := cfg.fillDisks(); err != nil {
		return nil, err
	}
	for i := range cfg.Disks {
		is := s.shape.Disks[i]
		cfg.Disks[i].ReadOnly, cfg.Disks[i].Serial, cfg.Disks[i].Queues = is.ReadOnly, is.Serial, is.Queues
	}
	for i := range cfg.Shares {
		cfg.Shares[i].Tag = s.shape.Shares[i]
	}
	modules := s.shape.Modules
	if c.Modules != "" {
		modules = c.Modules
	}
	if !s.shape.HasModules {
		modules = ""
	} else if modules == "" {
		return nil, fmt.Errorf("%w: its guest has its kernel's modules as a share, and their folder was not given", vmm.ErrSnapshotDevices)
	}
	g, err := newGuest(cfg, s.shape.Foreign || !s.shape.Control.State.Hello, s.shape.ControlTag, modules)
	if err != nil {
		return nil, err
	}
	g.machine, err = s.machine.Fork(vmm.ForkConfig{
		Devices: g.devices.all, Console: g.consolePort(), Control: g.controlPort(), KVM: cfg.KVM, Logger: cfg.Logger,
	})
	if err != nil {
		g.closeModules()
		return nil, err
	}
	if err = g.control.Continue(s.shape.Control); err != nil {
		err = errors.Join(err, g.machine.Close())
	} else {
		err = g.begin(ctx)
	}
	if err != nil {
		g.closeModules()
		return nil, err
	}
	return g, nil
}
