package vmm

import "github.com/moovm/moovm/internal/kvm"

// ports serves an exit by ports: one access, or as many as a string
// instruction makes.
func (m *Machine) ports(io kvm.IO) {
	for i := range io.Count {
		m.port(io.Port, io.Data[i*io.Size:][:io.Size], io.Out)
	}
}

// port serves one access of 1, 2 or 4 bytes to an I/O port. A port without a
// device reads all ones and ignores writes. Devices are a byte wide, so wider
// accesses are split as an ISA bus does, except for PCI configuration.
func (m *Machine) port(port uint16, p []byte, write bool) {
	if port >= portPCIAddr && port < portPCIData+4 && (port != portReset || len(p) != 1) {
		m.bus.port(port, p, write)
		return
	}
	for i := range p {
		if write {
			m.portOut(port+uint16(i), p[i])
		} else {
			p[i] = m.portIn(port + uint16(i))
		}
	}
}

// panicked is the event bit of the pvpanic device (docs/specs/pvpanic in QEMU).
const panicked = 1 << 0

func (m *Machine) portIn(port uint16) byte {
	switch {
	case port&^7 == portCOM1:
		return m.com[0].read(uint8(port & 7))
	case port&^7 == portCOM2:
		return m.com[1].read(uint8(port & 7))
	case port == portCMOS, port == portCMOS+1:
		return m.rtc.read(port)
	case port == portPanic:
		return panicked // the events that may be written
	case port == portKeyboardSt, port == portSleep, port == portSleepSt, port == portReset:
		// A keyboard controller without a keyboard is never busy.
		return 0
	}
	return 0xff
}

func (m *Machine) portOut(port uint16, v byte) {
	switch {
	case port&^7 == portCOM1:
		m.com[0].write(uint8(port&7), v)
	case port&^7 == portCOM2:
		m.com[1].write(uint8(port&7), v)
	case port == portCMOS, port == portCMOS+1:
		m.rtc.write(port, v)
	case port == portKeyboardSt:
		const pulseReset = 0xfe
		if v == pulseReset {
			m.finish(Reset, nil)
		}
	case port == portReset:
		const resetCPU = 1 << 2
		if v&resetCPU != 0 {
			m.finish(Reset, nil)
		}
	case port == portPanic:
		if v&panicked != 0 {
			m.finish(Panic, nil)
		}
	case port == portSleep:
		if v&sleepEnable != 0 && v>>2&7 == sleepTypeS5 {
			m.finish(PowerOff, nil)
		}
	}
}

// mmio serves one access of 1 to 8 bytes to guest-physical memory that is not
// RAM.
func (m *Machine) mmio(addr uint64, p []byte, write bool) {
	if !m.accessWindow(addr, p, write) {
		m.bus.mem(addr, p, write)
	}
}
