//go:build linux && amd64

package main

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func sum(b []byte) (s byte) {
	for _, c := range b {
		s += c
	}
	return s
}

// The kernel refuses tables whose bytes do not sum up to zero.
func TestACPITables(t *testing.T) {
	b := acpiTables(acpiBase, []uint32{10, 9})
	le := binary.LittleEndian
	if string(b[:8]) != "RSD PTR " || sum(b[:20]) != 0 || sum(b[:36]) != 0 {
		t.Error("RSDP")
	}
	at := func(addr uint64) []byte {
		p := b[addr-acpiBase:]
		return p[:le.Uint32(p[4:])]
	}
	xsdt := at(le.Uint64(b[24:]))
	if string(xsdt[:4]) != "XSDT" || sum(xsdt) != 0 || len(xsdt) != 36+16 {
		t.Fatalf("XSDT %x", xsdt)
	}
	fadt, madt := at(le.Uint64(xsdt[36:])), at(le.Uint64(xsdt[44:]))
	dsdt := at(le.Uint64(fadt[140:]))
	for sig, table := range map[string][]byte{"FACP": fadt, "APIC": madt, "DSDT": dsdt} {
		if string(table[:4]) != sig || sum(table) != 0 {
			t.Errorf("%s: %x", sig, table)
		}
	}
	if n := bytes.Count(dsdt, []byte("LNRO0005")); n != 2 {
		t.Errorf("%d devices", n)
	}
}
