package vmm

import (
	"encoding/binary"
	"fmt"

	"github.com/moovm/moovm/virtio/mmio"
)

// ACPI tables of a hardware-reduced machine (ACPI 6.5, section 4.1): no SCI,
// no PM timer; sleep and reset through two registers, events through a
// Generic Event Device.

const (
	sleepTypeS5 = 5
	sleepEnable = 1 << 5
	resetValue  = 0x06
)

// acpiTables builds all tables for a machine with so many processors and
// virtio-mmio devices, to be placed at base. The RSDP comes first.
func acpiTables(base uint64, cpus, windows int) []byte {
	const rsdpLen = 36
	buf := make([]byte, 64, 4096)
	add := func(table []byte) uint64 {
		for len(buf)%16 != 0 {
			buf = append(buf, 0)
		}
		at := base + uint64(len(buf))
		buf = append(buf, table...)
		return at
	}
	dsdt := add(acpiTable("DSDT", 2, dsdtBody(cpus, windows)))
	entries := []uint64{
		add(fadt(dsdt)),
		add(madt(cpus)),
		add(mcfg()),
	}
	var body []byte
	for _, e := range entries {
		body = binary.LittleEndian.AppendUint64(body, e)
	}
	xsdt := add(acpiTable("XSDT", 1, body))

	rsdp := buf[:rsdpLen]
	copy(rsdp, "RSD PTR ")
	copy(rsdp[9:], "MOOVM ")
	rsdp[15] = 2
	binary.LittleEndian.PutUint32(rsdp[20:], rsdpLen)
	binary.LittleEndian.PutUint64(rsdp[24:], xsdt)
	rsdp[8] = checksum(rsdp[:20])
	rsdp[32] = checksum(rsdp)
	return buf
}

// checksum is the byte that makes b sum up to zero, where it is still zero.
func checksum(b []byte) (c byte) {
	for _, v := range b {
		c -= v
	}
	return c
}

// acpiTable puts the common header (5.2.6) before body.
func acpiTable(sig string, revision byte, body []byte) []byte {
	t := make([]byte, 36, 36+len(body))
	copy(t, sig)
	t[8] = revision
	copy(t[10:], "MOOVM ")
	copy(t[16:], "MOOVMVMM")
	binary.LittleEndian.PutUint32(t[24:], 1)
	copy(t[28:], "MOOV")
	binary.LittleEndian.PutUint32(t[32:], 1)
	t = append(t, body...)
	binary.LittleEndian.PutUint32(t[4:], uint32(len(t)))
	t[9] = checksum(t)
	return t
}

// fadt is the Fixed ACPI Description Table (5.2.9).
func fadt(dsdt uint64) []byte {
	const (
		offBootArch   = 109 - 36
		offFlags      = 112 - 36
		offResetReg   = 116 - 36
		offResetValue = 128 - 36
		offMinor      = 131 - 36
		offXDSDT      = 140 - 36
		offSleepCtl   = 244 - 36
		offSleepSt    = 256 - 36
		size          = 276 - 36

		noVGA           = 1 << 2 // and: no 8042, no legacy devices
		flagWBINVD      = 1 << 0
		flagPowerButton = 1 << 4 // a control method button, not a fixed one
		flagSleepButton = 1 << 5
		flagReset       = 1 << 10
		flagHWReduced   = 1 << 20
	)
	b := make([]byte, size)
	le := binary.LittleEndian
	le.PutUint32(b[40-36:], uint32(dsdt))
	le.PutUint16(b[offBootArch:], noVGA)
	le.PutUint32(b[offFlags:], flagWBINVD|flagPowerButton|flagSleepButton|flagReset|flagHWReduced)
	putPortGAS(b[offResetReg:], portReset)
	b[offResetValue] = resetValue
	b[offMinor] = 5
	le.PutUint64(b[offXDSDT:], dsdt)
	putPortGAS(b[offSleepCtl:], portSleep)
	putPortGAS(b[offSleepSt:], portSleepSt)
	return acpiTable("FACP", 6, b)
}

// putPortGAS writes a generic address structure (5.2.3.2) of a byte-wide port.
func putPortGAS(b []byte, port uint16) {
	b[0], b[1], b[2], b[3] = 1, 8, 0, 1
	binary.LittleEndian.PutUint64(b[4:], uint64(port))
}

// madt is the Multiple APIC Description Table (5.2.12).
func madt(cpus int) []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, addrLAPIC)
	b = le.AppendUint32(b, 0) // no PC/AT PICs to be masked
	for i := range cpus {
		const enabled = 1
		b = append(b, 0, 8, byte(i), byte(i))
		b = le.AppendUint32(b, enabled)
	}
	b = append(b, 1, 12, byte(cpus), 0)
	b = le.AppendUint32(b, addrIOAPIC)
	b = le.AppendUint32(b, 0)
	return acpiTable("APIC", 5, b)
}

// mcfg tells where PCI configuration space is mapped (PCI Firmware 3.3, 4.1.2).
func mcfg() []byte {
	le := binary.LittleEndian
	b := make([]byte, 8, 24)
	b = le.AppendUint64(b, addrECAM)
	b = append(b, 0, 0, 0, 0) // segment 0, bus 0 to 0
	b = le.AppendUint32(b, 0)
	return acpiTable("MCFG", 1, b)
}

// dsdtBody is the AML of the machine's devices.
func dsdtBody(cpus, windows int) []byte {
	serial := func(name string, uid uint64, port uint16, irq uint32) []byte {
		return amlDevice(name,
			amlName("_HID", amlEISA("PNP0501")),
			amlName("_UID", amlInt(uid)),
			amlName("_CRS", amlResources(resIO(port, 8), resInterrupt(irq))))
	}
	routes := make([][]byte, 0, maxSlots)
	for slot := range uint64(maxSlots) {
		routes = append(routes, amlPackage(
			amlInt(slot<<16|0xffff), amlInt(0), amlInt(0), amlInt(uint64(intxGSI(int(slot))))))
	}
	var processors []byte
	for i := range cpus {
		processors = append(processors, amlDevice(cpuName(i),
			amlName("_HID", amlString("ACPI0007")),
			amlName("_UID", amlInt(uint64(i))))...)
	}
	var virtio []byte
	for i := range windows {
		virtio = append(virtio, amlDevice(windowName(i),
			amlName("_HID", amlString("LNRO0005")),
			amlName("_UID", amlInt(uint64(i))),
			amlName("_CRS", amlResources(
				resMemory(uint32(windowAddr(i)), mmio.Size),
				resSharedInterrupt(windowGSI(i)))))...)
	}
	return amlCat(
		amlName(`\_S5_`, amlPackage(amlInt(sleepTypeS5), amlInt(sleepTypeS5))),
		amlScope(`\_SB_`,
			processors,
			virtio,
			amlDevice("PCI0",
				amlName("_HID", amlEISA("PNP0A08")),
				amlName("_CID", amlEISA("PNP0A03")),
				amlName("_UID", amlInt(0)),
				amlName("_SEG", amlInt(0)),
				amlName("_BBN", amlInt(0)),
				amlName("_CRS", amlResources(
					resBuses(0, 0),
					resIO(portPCIAddr, 8),
					resPorts(0, portPCIAddr-1),
					resPorts(portPCIData+4, 0xffff),
					resWindow(addrPCIWindow, sizePCIWindow))),
				amlName("_PRT", amlPackage(routes...))),
			// Claims the configuration space: Linux uses MCFG only if it is
			// reserved by a motherboard resource.
			amlDevice("MBRD",
				amlName("_HID", amlEISA("PNP0C02")),
				amlName("_CRS", amlResources(
					resMemory(addrECAM, sizeECAM),
					resIO(portSleep, 2)))),
			serial("COM1", 1, portCOM1, irqCOM1),
			serial("COM2", 2, portCOM2, irqCOM2),
			amlDevice("RTC_",
				amlName("_HID", amlEISA("PNP0B00")),
				amlName("_CRS", amlResources(resIO(portCMOS, 2)))),
			amlDevice("PEVT",
				amlName("_HID", amlString("QEMU0001")),
				amlName("_STA", amlInt(0x0f)),
				amlName("_CRS", amlResources(resIO(portPanic, 1)))),
			// The Virtual Machine Generation ID (Microsoft's specification of that
			// name), by which Linux 5.18 and later learn that they are a clone.
			amlDevice("VGEN",
				amlName("_HID", amlString("MOOV0001")),
				amlName("_CID", amlString("VM_Gen_Counter")),
				amlName("_DDN", amlString("VM_Gen_Counter")),
				amlName("ADDR", amlPackage(amlInt(addrGeneration), amlInt(0)))),
			amlDevice("PWRB",
				amlName("_HID", amlEISA("PNP0C0C")),
				amlName("_UID", amlInt(0))),
			amlDevice("GED_",
				amlName("_HID", amlString("ACPI0013")),
				amlName("_UID", amlInt(0)),
				amlName("_CRS", amlResources(resInterrupt(irqPower), resInterrupt(irqGen))),
				amlMethod("_EVT", 1,
					amlIfArg0(irqPower, amlNotify(`\_SB_.PWRB`, 0x80)),
					amlIfArg0(irqGen, amlNotify(`\_SB_.VGEN`, 0x80))))))
}

// cpuName is the name segment of processor i: C000, C001…; windowName that of
// a virtio-mmio device.
func cpuName(i int) string    { return fmt.Sprintf("C%03X", i) }
func windowName(i int) string { return fmt.Sprintf("V%03X", i) }
