package vmm

import (
	"errors"
	"sync"
)

// Pool forks one snapshot fast: it makes the machines' shells ahead (the
// virtual machine, its processors, its memory slots), so that a fork pays for
// the mapping of memory and the setting of state only, and closes machines in
// the background. Its methods may be called from any goroutine.
type Pool struct {
	s       *Snapshot
	kvmPath string
	ready   chan *Machine
	stop    chan struct{}
	work    sync.WaitGroup // the maker of shells, and machines being closed

	mu       sync.Mutex
	closed   bool
	closeErr error
}

// NewPool keeps n shells ready for forks of s, which must stay open as long as
// the pool. kvmPath is the KVM device, empty for /dev/kvm.
func NewPool(s *Snapshot, n int, kvmPath string) *Pool {
	p := &Pool{s: s, kvmPath: kvmPath, ready: make(chan *Machine, max(n, 1)-1), stop: make(chan struct{})}
	p.work.Go(p.make)
	return p
}

// make fills the pool until it is closed. One shell waits in its hands. After
// an error it ends: forks make shells of their own then, and get the error.
func (p *Pool) make() {
	for {
		m, err := p.s.shell(p.kvmPath)
		if err != nil {
			return
		}
		select {
		case p.ready <- m:
		case <-p.stop:
			p.note(m.Close())
			return
		}
	}
}

func (p *Pool) note(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closeErr = errors.Join(p.closeErr, err)
}

// Fork is Snapshot.Fork from a shell; if none is ready it makes one. cfg.KVM
// is the pool's.
func (p *Pool) Fork(cfg ForkConfig) (*Machine, error) {
	var m *Machine
	select {
	case m = <-p.ready:
	default:
		var err error
		if m, err = p.s.shell(p.kvmPath); err != nil {
			return nil, err
		}
	}
	if err := p.s.enter(m, cfg); err != nil {
		p.Discard(m)
		return nil, err
	}
	return m, nil
}

// Discard closes a machine in the background: an end takes the kernel tens of
// milliseconds. Close waits for it.
func (p *Pool) Discard(m *Machine) {
	m.Stop()
	p.work.Go(func() { p.note(m.Close()) })
}

// Close closes the shells and waits for the machines that were discarded;
// machines in use go on. The error is that of any of them. It is idempotent.
func (p *Pool) Close() error {
	p.mu.Lock()
	first := !p.closed
	p.closed = true
	p.mu.Unlock()
	if first {
		close(p.stop)
	}
	p.work.Wait()
	for {
		select {
		case m := <-p.ready:
			p.note(m.Close())
			continue
		default:
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.closeErr
	}
}
