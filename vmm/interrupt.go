package vmm

import (
	"errors"
	"fmt"
	"sync"

	"github.com/moovm/moovm/internal/kvm"
	"github.com/moovm/moovm/virtio"
)

// interrupts owns the machine's interrupt routing: the IOAPIC's pins, and one
// GSI for each message-signalled interrupt in use.
type interrupts struct {
	vm *kvm.VM

	mu    sync.Mutex
	msis  map[uint32]*msi // by GSI
	lines [numINTx]uint32 // devices that assert each shared line, one bit each
	// While a machine gets its state the table waits to be installed, once.
	waiting []*msi // that get their irqfd then
	batch   bool
	stale   bool // the table in the kernel is not what it should be
}

func newInterrupts(vm *kvm.VM) *interrupts {
	return &interrupts{vm: vm, msis: map[uint32]*msi{}}
}

// setINTx sets one device's share of its interrupt line.
func (n *interrupts) setINTx(slot int, level bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	line := &n.lines[slot%numINTx]
	before := *line != 0
	if level {
		*line |= 1 << slot
	} else {
		*line &^= 1 << slot
	}
	if after := *line != 0; after != before {
		n.vm.IRQLine(intxGSI(slot), after) // fails only when the VM is gone
	}
}

// errTooManyMSIs says that the kernel's routing table is full.
var errTooManyMSIs = errors.New("too many message-signalled interrupts")

// newMSI reserves a GSI; nothing is routed before Program.
func (n *interrupts) newMSI() (*msi, error) {
	ev, err := virtio.NewEvent()
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for gsi := uint32(numIRQ); gsi < kvm.MaxRoutes-numIRQ; gsi++ {
		if n.msis[gsi] == nil {
			s := &msi{n: n, gsi: gsi, event: ev}
			n.msis[gsi] = s
			return s, nil
		}
	}
	ev.Close()
	return nil, errTooManyMSIs
}

// install gives the kernel the table of a machine without messages.
func (n *interrupts) install() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.route()
}

// route installs the whole table; n.mu is held.
func (n *interrupts) route() error {
	routes := make([]kvm.Route, 0, 2*numIRQ+len(n.msis))
	for pin := range uint32(numIRQ) {
		routes = append(routes, kvm.Route{GSI: pin, Type: kvm.RouteChip, Chip: kvm.ChipIOAPIC, Pin: pin})
		// A guest that knows nothing of generations may have left the PICs as
		// they are at power-on, and would take this one as an exception.
		if pin < 16 && pin != irqGen {
			routes = append(routes, kvm.Route{GSI: pin, Type: kvm.RouteChip, Chip: kvm.ChipPICMaster + pin/8, Pin: pin % 8})
		}
	}
	for gsi, s := range n.msis {
		if s.routed {
			routes = append(routes, kvm.Route{GSI: gsi, Type: kvm.RouteMSI, Addr: s.addr, Data: s.data})
		}
	}
	return n.vm.SetGSIRouting(routes)
}

// together installs the routes that f programs at once: each installation
// waits for all processors to have seen it. The irqfds come after their
// routes.
func (n *interrupts) together(f func() error) error {
	n.mu.Lock()
	n.batch = true
	n.mu.Unlock()
	err := f()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.batch = false
	waiting := n.waiting
	n.waiting = nil
	if err == nil && n.stale {
		err = n.route()
	}
	if err != nil {
		return err
	}
	n.stale = false
	for _, s := range waiting {
		if s.closed {
			continue
		}
		if err := n.vm.AssignIRQFD(s.event.FD(), s.gsi); err != nil {
			return err
		}
	}
	return nil
}

// msi is one message-signalled interrupt: an eventfd that KVM turns into the
// message (pci.MSI).
type msi struct {
	n     *interrupts
	gsi   uint32
	event *virtio.Event

	// under n.mu
	addr   uint64
	data   uint32
	routed bool
	closed bool
}

// Program sets the message. An unchanged one costs nothing.
func (s *msi) Program(addr uint64, data uint32) error {
	s.n.mu.Lock()
	defer s.n.mu.Unlock()
	if s.closed {
		return fmt.Errorf("MSI %d is closed", s.gsi)
	}
	if s.routed && s.addr == addr && s.data == data {
		return nil
	}
	first := !s.routed
	s.addr, s.data, s.routed = addr, data, true
	if s.n.batch {
		s.n.stale = true
		if first {
			s.n.waiting = append(s.n.waiting, s)
		}
		return nil
	}
	if err := s.n.route(); err != nil {
		s.routed = !first
		return err
	}
	if first {
		if err := s.n.vm.AssignIRQFD(s.event.FD(), s.gsi); err != nil {
			s.routed = false
			return errors.Join(err, s.n.route())
		}
	}
	return nil
}

// Signal sends the message.
func (s *msi) Signal() error { return s.event.Signal() }

// Close releases the interrupt.
func (s *msi) Close() error {
	s.n.mu.Lock()
	defer s.n.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	delete(s.n.msis, s.gsi)
	var err error
	if s.routed {
		err = errors.Join(s.n.vm.DeassignIRQFD(s.event.FD(), s.gsi), s.n.route())
	}
	return errors.Join(err, s.event.Close())
}
