//go:build linux && amd64

package main

import "encoding/binary"

// A stock kernel finds virtio-mmio devices only through ACPI, as LNRO0005. gokvm
// has no ACPI tables, so these are the fewest that do: RSDP, XSDT, FADT, MADT
// and a DSDT with the devices and the power-off state.
const (
	acpiBase = 0xf0000
	pmBase   = 0x600 // PM1a event block (4 bytes) and control (2)
)

func acpiTables(base uint64, irqs []uint32) []byte {
	le := binary.LittleEndian
	out := make([]byte, 64)
	add := func(sig string, body []byte) uint64 {
		t := make([]byte, 36)
		copy(t, sig)
		copy(t[10:], "MOOVM EXAMPLE ")
		t[8], t[24] = 4, 1
		t = append(t, body...)
		le.PutUint32(t[4:], uint32(len(t)))
		t[9] = checksum(t)
		for len(out)%16 != 0 {
			out = append(out, 0)
		}
		at := base + uint64(len(out))
		out = append(out, t...)
		return at
	}
	dsdt := add("DSDT", aml(irqs))

	fadt := make([]byte, 244-36) // offsets below count from the table's start
	le.PutUint32(fadt[40-36:], uint32(dsdt))
	fadt[46-36] = 11 // SCI interrupt; it never comes
	le.PutUint32(fadt[56-36:], pmBase)
	le.PutUint32(fadt[64-36:], pmBase+4)
	fadt[88-36], fadt[89-36] = 4, 2
	le.PutUint32(fadt[112-36:], 1<<0|1<<4|1<<5) // WBINVD; no fixed buttons
	le.PutUint64(fadt[140-36:], dsdt)

	madt := le.AppendUint32(nil, 0xfee00000)
	madt = le.AppendUint32(madt, 1)             // PICs are there
	madt = append(madt, 0, 8, 0, 0, 1, 0, 0, 0) // CPU 0
	madt = append(madt, 1, 12, 1, 0)            // I/O APIC
	madt = le.AppendUint32(madt, 0xfec00000)    //
	madt = le.AppendUint32(madt, 0)             //

	xsdt := add("XSDT", le.AppendUint64(le.AppendUint64(nil, add("FACP", fadt)), add("APIC", madt)))

	copy(out, "RSD PTR ")
	copy(out[9:], "MOOVM ")
	out[15] = 2
	le.PutUint32(out[20:], 36)
	le.PutUint64(out[24:], xsdt)
	out[8] = checksum(out[:20])
	out[32] = checksum(out[:36])
	return out
}

func checksum(b []byte) (c byte) {
	for _, v := range b {
		c -= v
	}
	return c
}

// aml is the DSDT's body:
//
//	Name (_S5, Package () {5, 5, 0, 0})
//	Scope (_SB) {
//	  Device (VIRn) {
//	    Name (_HID, "LNRO0005")
//	    Name (_UID, n)
//	    Name (_CRS, ResourceTemplate () {
//	      Memory32Fixed (ReadWrite, mmioBase + n*4096, 4096)
//	      Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {irq} }) } }
func aml(irqs []uint32) []byte {
	le := binary.LittleEndian
	scope := []byte("\\_SB_")
	for n, irq := range irqs {
		crs := []byte{0x86, 9, 0, 1}
		crs = le.AppendUint32(crs, mmioBase+uint32(n)*4096)
		crs = le.AppendUint32(crs, 4096)
		crs = append(crs, 0x89, 6, 0, 3, 1)
		crs = le.AppendUint32(crs, irq)
		crs = append(crs, 0x79, 0)
		dev := []byte{'V', 'I', 'R', '0' + byte(n)}
		dev = append(dev, "\x08_HID\x0dLNRO0005\x00\x08_UID\x0a"...)
		dev = append(dev, byte(n))
		dev = append(dev, "\x08_CRS"...)
		dev = append(dev, pkg([]byte{0x11}, append([]byte{0x0a, byte(len(crs))}, crs...))...)
		scope = append(scope, pkg([]byte{0x5b, 0x82}, dev)...)
	}
	return append([]byte("\x08_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00"), pkg([]byte{0x10}, scope)...)
}

// pkg encodes an operator with its length, which counts itself.
func pkg(op, body []byte) []byte {
	if n := len(body) + 1; n < 64 {
		return append(append(op, byte(n)), body...)
	}
	n := len(body) + 2
	return append(append(op, 0x40|byte(n&0xf), byte(n>>4)), body...)
}
