package vmm

import (
	"crypto/rand"
	"errors"
)

// Generation identifies one life of a machine: another one for every machine
// that boots, is forked from a snapshot, or is rewound.
type Generation [16]byte

// GenerationAddress is the guest-physical address of the generation. Guests with
// ACPI find it by the device VM_Gen_Counter.
const GenerationAddress = 0xff000

// newGeneration gives the machine another generation, where its guest can read
// it; its memory must stand still.
func (m *Machine) newGeneration() {
	var g Generation
	rand.Read(g[:])
	copy(m.ram.low()[addrGeneration:], g[:])
	m.mu.Lock()
	defer m.mu.Unlock()
	m.generation = g
	m.reborn++
}

// tellGeneration interrupts the guest's VMGenID driver.
func (m *Machine) tellGeneration() error {
	return errors.Join(m.vm.IRQLine(irqGen, true), m.vm.IRQLine(irqGen, false))
}

// Generation is the machine's generation now, and how many it has had: 1 for a
// machine that was made and never rewound. A guest with a VMGenID driver knows
// the same bytes and mixes them into its random numbers; it is told by an
// interrupt, which comes some time after it goes on.
func (m *Machine) Generation() (g Generation, lives int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.generation, m.reborn
}
