package vmm

import (
	"encoding/binary"
	"slices"
)

// A little builder of AML, the ACPI machine language (ACPI 6.5, chapter 20).
// Each function returns the bytes of one term; terms nest by concatenation.

func amlCat(terms ...[]byte) []byte { return slices.Concat(terms...) }

// amlLength prefixes body with its length, which counts itself (20.2.4).
func amlLength(body []byte) []byte {
	n := len(body)
	switch {
	case n+1 < 1<<6:
		return append([]byte{byte(n + 1)}, body...)
	case n+2 < 1<<12:
		n += 2
		return append([]byte{1<<6 | byte(n&0xf), byte(n >> 4)}, body...)
	default:
		n += 3
		return append([]byte{2<<6 | byte(n&0xf), byte(n >> 4), byte(n >> 12)}, body...)
	}
}

// amlSeg pads a name segment to four characters.
func amlSeg(s string) []byte {
	b := []byte("____")
	copy(b, s)
	return b
}

// amlPath encodes a name string: "PCI0", "\_SB_", "\_SB_.PWRB" (at most two
// segments).
func amlPath(s string) (b []byte) {
	if len(s) > 0 && s[0] == '\\' {
		b, s = append(b, '\\'), s[1:]
	}
	for i := range s {
		if s[i] == '.' {
			return amlCat(b, []byte{0x2e}, amlSeg(s[:i]), amlSeg(s[i+1:]))
		}
	}
	return append(b, amlSeg(s)...)
}

func amlInt(v uint64) []byte {
	switch {
	case v == 0 || v == 1:
		return []byte{byte(v)}
	case v <= 0xff:
		return []byte{0x0a, byte(v)}
	case v <= 0xffff:
		return binary.LittleEndian.AppendUint16([]byte{0x0b}, uint16(v))
	case v <= 0xffff_ffff:
		return binary.LittleEndian.AppendUint32([]byte{0x0c}, uint32(v))
	}
	return binary.LittleEndian.AppendUint64([]byte{0x0e}, v)
}

func amlString(s string) []byte { return append(append([]byte{0x0d}, s...), 0) }

// amlEISA compresses an identifier such as "PNP0501" (19.3.4).
func amlEISA(id string) []byte {
	hex := func(c byte) uint32 {
		if c >= 'A' {
			return uint32(c-'A') + 10
		}
		return uint32(c - '0')
	}
	v := uint32(id[0]-0x40)<<26 | uint32(id[1]-0x40)<<21 | uint32(id[2]-0x40)<<16 |
		hex(id[3])<<12 | hex(id[4])<<8 | hex(id[5])<<4 | hex(id[6])
	return binary.BigEndian.AppendUint32([]byte{0x0c}, v)
}

func amlName(path string, value []byte) []byte { return amlCat([]byte{0x08}, amlPath(path), value) }

func amlScope(path string, terms ...[]byte) []byte {
	return append([]byte{0x10}, amlLength(amlCat(amlPath(path), amlCat(terms...)))...)
}

func amlDevice(name string, terms ...[]byte) []byte {
	return append([]byte{0x5b, 0x82}, amlLength(amlCat(amlPath(name), amlCat(terms...)))...)
}

func amlMethod(name string, args int, terms ...[]byte) []byte {
	return append([]byte{0x14}, amlLength(amlCat(amlPath(name), []byte{byte(args)}, amlCat(terms...)))...)
}

func amlPackage(elements ...[]byte) []byte {
	return append([]byte{0x12}, amlLength(append([]byte{byte(len(elements))}, amlCat(elements...)...))...)
}

func amlNotify(path string, value uint64) []byte {
	return amlCat([]byte{0x86}, amlPath(path), amlInt(value))
}

// amlIfArg0 runs terms if the method's first argument is v.
func amlIfArg0(v uint64, terms ...[]byte) []byte {
	const (
		opIf, opLEqual, opArg0 = 0xa0, 0x93, 0x68
	)
	return append([]byte{opIf}, amlLength(amlCat([]byte{opLEqual, opArg0}, amlInt(v), amlCat(terms...)))...)
}

// amlResources is a buffer with a resource template: descriptors and an end
// tag (6.4).
func amlResources(descriptors ...[]byte) []byte {
	body := append(amlCat(descriptors...), 0x79, 0)
	return append([]byte{0x11}, amlLength(amlCat(amlInt(uint64(len(body))), body))...)
}

// resIO is ports [port, port+n), decoded in 16 bits.
func resIO(port uint16, n uint8) []byte {
	return []byte{0x47, 1, byte(port), byte(port >> 8), byte(port), byte(port >> 8), 1, n}
}

// resInterrupt is an extended interrupt descriptor: edge-triggered, active
// high, exclusive.
func resInterrupt(gsi uint32) []byte {
	return binary.LittleEndian.AppendUint32([]byte{0x89, 6, 0, 0x03, 1}, gsi)
}

// resSharedInterrupt is the same, for devices that share it.
func resSharedInterrupt(gsi uint32) []byte {
	return binary.LittleEndian.AppendUint32([]byte{0x89, 6, 0, 0x0b, 1}, gsi)
}

// resMemory is a fixed 32-bit memory range.
func resMemory(addr, size uint32) []byte {
	b := []byte{0x86, 9, 0, 1}
	b = binary.LittleEndian.AppendUint32(b, addr)
	return binary.LittleEndian.AppendUint32(b, size)
}

// resBuses is a range of PCI bus numbers a bridge produces.
func resBuses(first, last uint16) []byte {
	b := []byte{0x88, 13, 0, 2, 0x0c, 0}
	for _, v := range []uint16{0, first, last, 0, last - first + 1} {
		b = binary.LittleEndian.AppendUint16(b, v)
	}
	return b
}

// resPorts is a window of ports a bridge produces.
func resPorts(first, last uint16) []byte {
	b := []byte{0x88, 13, 0, 1, 0x0c, 3}
	for _, v := range []uint16{0, first, last, 0, last - first + 1} {
		b = binary.LittleEndian.AppendUint16(b, v)
	}
	return b
}

// resWindow is a window of 32-bit memory a bridge produces.
func resWindow(addr, size uint32) []byte {
	b := []byte{0x87, 23, 0, 0, 0x0c, 1}
	for _, v := range []uint32{0, addr, addr + (size - 1), 0, size} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}
