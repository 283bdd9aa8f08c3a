package guesttest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/internal/agent"
)

// Snapshot is a Machine at one instant: memory, processors, devices and disks.
// It never changes, and serves any number of forks and rewinds, until the test
// that took it ends. Folders of the host that the guest may write to are not
// in it.
type Snapshot struct {
	m        *Machine
	s        *guest.Snapshot
	commands uint32 // that had been started
	disks    []frozenDisk
}

// frozenDisk is what a disk contained.
type frozenDisk struct {
	path    string           // an image that nobody writes to any more
	pending map[int64][]byte // what a volatile cache had
}

// settleTime is how long a guest may take to stand still.
const settleTime = 5 * time.Minute

// Snapshot freezes the machine with its disks, and lets it go on. Commands may
// be running; those of a fork run on in it, but nobody hears them any more.
func (m *Machine) Snapshot() *Snapshot {
	m.t.Helper()
	s, err := m.snapshot()
	if err != nil {
		m.t.Fatalf("snapshot: %v", err)
	}
	m.t.Cleanup(func() { s.s.Close() })
	return s
}

func (m *Machine) snapshot() (_ *Snapshot, err error) {
	m.power.Lock()
	defer m.power.Unlock()
	r := m.guest
	if r == nil || r.g == nil {
		return nil, errors.New("the guest does not run")
	}
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	held, err := r.client.Hold(ctx)
	if err != nil {
		return nil, err
	}
	s := &Snapshot{m: m, commands: held.Commands()}
	defer func() {
		if err2 := held.Go(ctx, agent.Identity{}); err == nil && err2 != nil {
			s.s.Close()
			err = err2
		}
	}()
	s.s, err = r.g.Snapshot(ctx, guest.SnapshotOptions{Frozen: func() error {
		for _, d := range m.s.disks {
			f, err := d.freeze()
			if err != nil {
				return err
			}
			s.disks = append(s.disks, f)
		}
		return nil
	}})
	return s, err
}

// freeze lets the disk go on in a new overlay and returns what it contained.
func (d *bootDisk) freeze() (frozenDisk, error) {
	f := frozenDisk{path: d.path}
	if d.cache != nil {
		f.pending = d.cache.copy()
	}
	next := d.nextPath()
	if err := d.cow.Snapshot(next); err != nil {
		return f, err
	}
	d.path = next
	return f, nil
}

// nextPath is a name beside the disk's first overlay that nobody had.
func (d *bootDisk) nextPath() string {
	d.overlays++
	return fmt.Sprintf("%s.%d", d.first, d.overlays)
}

// rewind makes the disk what it was when f was frozen.
func (d *bootDisk) rewind(f frozenDisk) error {
	next := d.nextPath()
	cow, err := createDisk(next, Disk{Image: f.path, Format: cowdisk.FormatCOW})
	if err != nil {
		return err
	}
	if err := d.cow.Become(cow); err != nil {
		cow.Close()
		return err
	}
	os.Remove(d.path) // no snapshot stands on it: freeze has changed to another
	d.path = next
	if d.cache != nil {
		d.cache.set(f.pending)
	}
	return nil
}

// Fork starts a twin of the machine as it is now; t.Cleanup ends it. The twin's
// disks are its own, and its kernel's random numbers are others, from before
// anything else can ask for some; a twin that cannot be told apart fails the
// test. It has the time of the host.
func (m *Machine) Fork(t TB) *Machine {
	t.Helper()
	s, err := m.snapshot()
	if err != nil {
		t.Fatalf("fork: %v", err)
	}
	t.Cleanup(func() { s.s.Close() })
	return s.Fork(t)
}

// Fork starts a twin of the machine as it was; see Machine.Fork.
func (s *Snapshot) Fork(t TB) *Machine {
	t.Helper()
	c := s.m.c
	c.Disks = append([]Disk{}, c.Disks...)
	frozen := s.disks
	if c.Base != "" {
		c.Base, frozen = frozen[0].path+",format=cow", frozen[1:]
	}
	for i, f := range frozen {
		c.Disks[i].Image, c.Disks[i].Size = f.path+",format=cow", 0
	}
	n := s.m.need
	n.kernel, n.modules = s.m.s.kernel, s.m.s.guest.Modules
	n.tmp, n.name = s.m.tmp, fmt.Sprintf("fork%d-", s.m.forks.Add(1))
	set, err := newSetup(&c, n)
	if err != nil {
		t.Fatalf("fork: %v", err)
	}
	for i, d := range set.disks {
		if d.cache != nil {
			d.cache.set(s.disks[i].pending)
		}
	}
	m := newMachine(t, s.m.c, set, n)
	m.family = s.m.family
	t.Cleanup(func() {
		for _, d := range set.disks {
			os.Remove(d.path) // nothing stands on it
		}
	})
	if err := m.startFrom(s); err != nil {
		t.Fatalf("fork: %v", err)
	}
	return m
}

// Rewind makes the machine again what it was, with its disks: what has happened
// since has not. It need not be running. The snapshot may be one of another
// machine of the same family. Commands that were running end with an error.
func (m *Machine) Rewind(s *Snapshot) {
	m.t.Helper()
	m.end()
	for i, d := range m.s.disks {
		if err := d.rewind(s.disks[i]); err != nil {
			m.t.Fatalf("rewind: %v", err)
		}
	}
	if err := m.startFrom(s); err != nil {
		m.t.Fatalf("rewind: %v", err)
	}
}

// ResetTo cuts the guest's power, if it runs, and goes on from the snapshot with
// the disks as the power cut left them: Reset without a boot. In the snapshot
// nothing of those disks may be in use, no file system of theirs mounted;
// what the guest has cached of them it is made to forget.
func (m *Machine) ResetTo(s *Snapshot) {
	m.t.Helper()
	m.end()
	if err := m.startFrom(s, func(id *agent.Identity) { id.Forget = true }); err != nil {
		m.t.Fatalf("reset: %v", err)
	}
}

// startFrom starts the machine's guest from a snapshot and tells it who it is.
func (m *Machine) startFrom(s *Snapshot, also ...func(*agent.Identity)) error {
	r := m.newRunning()
	g := m.s.guest
	run, err := s.s.Fork(r.ctx, guest.ForkConfig{
		Disks: g.Disks, Shares: g.Shares,
		Stdin: r.toGuest, Stdout: r.fromGuest, Stderr: r.console, Console: r.port,
	})
	if err != nil {
		close(r.ended)
		return err
	}
	r.run(run)
	var held *agent.Held
	r.client, held = agent.Clone(r.stdout, r.stdin, s.commands)
	id := agent.Identity{Clone: true, Entropy: make([]byte, 64), Time: time.Now().UnixNano()}
	rand.Read(id.Entropy)
	for _, f := range also {
		f(&id)
	}
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	if err := held.Go(ctx, id); err != nil {
		if errors.Is(err, agent.ErrGone) {
			err = m.gone(err)
		}
		m.end()
		return err
	}
	return nil
}
