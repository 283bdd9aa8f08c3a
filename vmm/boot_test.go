package vmm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/moovm/moovm/internal/kvm"
)

func TestMemoryMap(t *testing.T) {
	for _, size := range []int64{minMemory, 64 << 20, addrHole, addrHole + 4096, 6 << 30, maxMemory} {
		var ram, end uint64
		for i, e := range memoryMap(size) {
			if e.addr < end {
				t.Errorf("%d bytes: entry %d at %#x overlaps the one before", size, i, e.addr)
			}
			end = e.addr + e.size
			if e.typ == e820RAM {
				ram += e.size
				if e.addr < addrAbove4G && end > addrHole {
					t.Errorf("%d bytes: RAM reaches %#x, into the hole", size, end)
				}
			}
		}
		if want := uint64(size) - (addrHigh - addrLowEnd); ram != want {
			t.Errorf("%d bytes: the map has %d bytes of RAM, want %d", size, ram, want)
		}
	}
}

func TestLayoutDoesNotOverlap(t *testing.T) {
	areas := []struct {
		name      string
		addr, len uint64
	}{
		{"GDT", addrGDT, 8 * uint64(len(bootGDT))},
		{"zero page", addrZeroPage, pageSize},
		{"page tables", addrPageTables, 6 * pageSize},
		{"command line", addrCmdline, maxCmdline},
		{"low end", addrLowEnd, 0},
		{"ACPI", addrACPI, sizeACPI},
		{"reset vector", addrResetVector, 16},
		{"high memory", addrHigh, 0},
		{"PCI window", addrPCIWindow, sizePCIWindow},
		{"ECAM", addrECAM, sizeECAM},
		{"IOAPIC", addrIOAPIC, pageSize},
		{"LAPIC", addrLAPIC, 1 << 20},
		{"identity map", addrIdentity, pageSize},
		{"TSS", addrTSS, 3 * pageSize},
		{"above 4 GiB", addrAbove4G, 0},
	}
	for i, a := range areas[1:] {
		if before := areas[i]; before.addr+before.len > a.addr {
			t.Errorf("%s ends at %#x, in %s at %#x", before.name, before.addr+before.len, a.name, a.addr)
		}
	}
}

func TestPlaceInitrd(t *testing.T) {
	for _, test := range []struct {
		n, kernelEnd, memEnd, want uint64
		bad                        bool
	}{
		{0, 0x200_0000, 64 << 20, 0, false},
		{1, 0x200_0000, 64 << 20, 64<<20 - 4096, false},
		{4096, 0x200_0000, 64 << 20, 64<<20 - 4096, false},
		{4097, 0x200_0000, 64 << 20, 64<<20 - 8192, false},
		{64 << 20, 0x200_0000, 64 << 20, 0, true},
		{65 << 20, 0x200_0000, 64 << 20, 0, true},
		{1<<64 - 1, 0x200_0000, 64 << 20, 0, true},
		{32 << 20, 0x200_0000, 64 << 20, 0, true},
		{30 << 20, 0x200_0000, 64 << 20, 34 << 20, false},
	} {
		got, err := placeInitrd(test.n, test.kernelEnd, test.memEnd)
		if got != test.want || (err != nil) != test.bad {
			t.Errorf("%+v: %#x, %v", test, got, err)
		}
	}
}

func TestLoadBoot(t *testing.T) {
	mem := make([]byte, 16<<20)
	cfg := Config{Memory: 16 << 20, Kernel: asm{}.print("x").kernel(), Initrd: []byte("initrd"), Cmdline: "console=ttyS0 a=b"}
	boot, err := loadBoot(&cfg, mem)
	if err != nil {
		t.Fatal(err)
	}
	if boot.entry != guestBase {
		t.Errorf("entry %#x", boot.entry)
	}
	le := binary.LittleEndian
	zp := mem[addrZeroPage:]
	cmd := mem[le.Uint32(zp[0x228:]):]
	if got := string(cmd[:bytes.IndexByte(cmd, 0)]); got != cfg.Cmdline {
		t.Errorf("command line %q", got)
	}
	at, n := le.Uint32(zp[0x218:]), le.Uint32(zp[0x21c:])
	if got := string(mem[at : at+n]); got != "initrd" {
		t.Errorf("initrd %q at %#x", got, at)
	}
	if le.Uint64(zp[0x70:]) != addrACPI || zp[0x1e8] == 0 || string(zp[0x202:0x206]) != "HdrS" {
		t.Error("the zero page lacks RSDP address, memory map or header magic")
	}
	// Walk the page tables.
	for _, virt := range []uint64{0, guestBase, 0xfee0_0000, 1<<32 - 1} {
		table, shift := uint64(addrPageTables), 39
		for ; shift >= 21; shift -= 9 {
			e := le.Uint64(mem[table+virt>>shift&511*8:])
			if e&1 == 0 {
				t.Fatalf("%#x is not mapped at shift %d", virt, shift)
			}
			table = e &^ 0xfff
		}
		if got := table | virt&(1<<21-1); got != virt {
			t.Errorf("%#x is mapped to %#x", virt, got)
		}
	}
}

func TestKernelsRefused(t *testing.T) {
	good := func() []byte {
		k := asm{}.print("x").kernel()
		b := make([]byte, k.Size)
		k.Image.ReadAt(b, 0)
		return b
	}
	le := binary.LittleEndian
	ph := 64
	for name, test := range map[string]struct {
		change func(b []byte) []byte
		want   string
	}{
		"empty":            {func(b []byte) []byte { return nil }, "empty"},
		"text":             {func(b []byte) []byte { return []byte("#!/bin/sh\necho this is no kernel\n") }, "not an ELF"},
		"cut header":       {func(b []byte) []byte { return b[:40] }, "not an ELF"},
		"cut segment":      {func(b []byte) []byte { return b[:len(b)-1] }, "cut off"},
		"ARM":              {func(b []byte) []byte { le.PutUint16(b[18:], 183); return b }, "x86-64"},
		"relocatable":      {func(b []byte) []byte { le.PutUint16(b[16:], 1); return b }, "executable"},
		"low":              {func(b []byte) []byte { le.PutUint64(b[ph+24:], 0x1000); return b }, "below 1 MiB"},
		"beyond memory":    {func(b []byte) []byte { le.PutUint64(b[ph+24:], 1<<40); return b }, "more memory"},
		"address overflow": {func(b []byte) []byte { le.PutUint64(b[ph+24:], 1<<64-8); return b }, "more memory"},
		"huge bss":         {func(b []byte) []byte { le.PutUint64(b[ph+40:], 1<<63); return b }, "more memory"},
		"filesz > memsz":   {func(b []byte) []byte { le.PutUint64(b[ph+40:], 1); return b }, "more bytes"},
		"entry outside":    {func(b []byte) []byte { le.PutUint64(b[24:], 8); return b }, "entry point"},
		"no segments":      {func(b []byte) []byte { le.PutUint16(b[56:], 0); return b }, "entry point"},
	} {
		t.Run(name, func(t *testing.T) {
			b := test.change(good())
			_, err := New(Config{Memory: 4 << 20, Kernel: Kernel{Name: "vmlinux", Image: bytes.NewReader(b), Size: int64(len(b))}})
			if !errors.Is(err, ErrKernel) || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), "vmlinux") {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestConfigsRefused(t *testing.T) {
	k := asm{}.print("x").kernel()
	for name, test := range map[string]struct {
		cfg  Config
		want string
	}{
		"no kernel":       {Config{}, "empty"},
		"1 MiB":           {Config{Kernel: k, Memory: 1 << 20}, "too small"},
		"negative memory": {Config{Kernel: k, Memory: -1}, "too small"},
		"huge memory":     {Config{Kernel: k, Memory: 1 << 60}, "too large"},
		"odd memory":      {Config{Kernel: k, Memory: 64<<20 + 1}, "multiple"},
		"65 CPUs":         {Config{Kernel: k, CPUs: 65}, "CPUs"},
		"-1 CPUs":         {Config{Kernel: k, CPUs: -1}, "CPUs"},
		"long cmdline":    {Config{Kernel: k, Cmdline: strings.Repeat("x", maxCmdline)}, "command line"},
		"NUL in cmdline":  {Config{Kernel: k, Cmdline: "a\x00b"}, "NUL"},
		"initrd > memory": {Config{Kernel: k, Memory: 4 << 20, Initrd: make([]byte, 5<<20)}, "initrd"},
		"no KVM":          {Config{Kernel: k, KVM: "/nonexistent"}, "/nonexistent"},
		"not KVM":         {Config{Kernel: k, KVM: "/dev/null"}, "not a KVM device"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := New(test.cfg); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v; want something about %q", err, test.want)
			}
		})
	}
}

func TestTooManyDevices(t *testing.T) {
	needKVM(t)
	cfg := Config{Kernel: asm{}.spin().kernel()}
	for range maxSlots {
		cfg.Devices = append(cfg.Devices, newDisk(t, zeroDisk(4096), 1))
	}
	if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), "bus is full") {
		t.Errorf("%v", err)
	}
	cfg.Devices = cfg.Devices[:24]
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
}

func FuzzLoadELF(f *testing.F) {
	k := asm{}.print("x").powerOff().kernel()
	b := make([]byte, k.Size)
	k.Image.ReadAt(b, 0)
	f.Add(b)
	mem := make([]byte, 2<<20)
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := loadELF(Kernel{Image: bytes.NewReader(b), Size: int64(len(b))}, mem)
		if err == nil && (l.end > uint64(len(mem)) || l.entry < addrHigh) {
			t.Errorf("accepted: %+v", l)
		}
	})
}

func entry(list []kvm.CPUIDEntry, fn, index uint32) *kvm.CPUIDEntry {
	for i := range list {
		if list[i].Function == fn && list[i].Index == index {
			return &list[i]
		}
	}
	return nil
}

func TestCPUID(t *testing.T) {
	supported := []kvm.CPUIDEntry{
		{Function: 0, Eax: 0x1f, Ebx: 0x756e6547, Ecx: 0x6c65746e, Edx: 0x49656e69},
		{Function: 1, Ebx: 0xff00_0800, Ecx: 1 << 26},
		{Function: 4, Index: 0, Flags: 1, Eax: 0xfc00_4121},
		{Function: 4, Index: 3, Flags: 1, Eax: 0xfc03_c163},
		{Function: 4, Index: 4, Flags: 1, Eax: 0xfc00_4000},
		{Function: 0xb, Index: 0, Flags: 1, Edx: 0x1234},
		{Function: 0x1f, Index: 0, Flags: 1, Edx: 0x1234},
		{Function: 0xd, Index: 0, Flags: 1, Eax: 0x2e7, Ebx: 2440, Ecx: 2696},
		{Function: 0xd, Index: 1, Flags: 1, Eax: 0xf, Ecx: 0x1900},
		{Function: 0xd, Index: 2, Flags: 1, Eax: 256, Ebx: 576},
		{Function: 0xd, Index: 5, Flags: 1, Eax: 64, Ebx: 1088},
		{Function: 0xd, Index: 11, Flags: 1, Eax: 16, Ecx: 1},
		{Function: 0x4000_0000, Eax: 0x4000_0001, Ebx: 0x4b4d564b},
		{Function: 0x8000_0008, Ecx: 0xffff},
		{Function: 0x8000_001e, Eax: 99},
	}
	for _, n := range []int{1, 2, 3, 8, 64} {
		for id := range n {
			list := cpuidFor(supported, id, n, 2_500_000, true)
			f := entry(list, 1, 0)
			if f.Ebx>>24 != uint32(id) || f.Ecx&(1<<31) == 0 || f.Ecx&(1<<24) == 0 || f.Ecx&(1<<21) == 0 {
				t.Errorf("leaf 1 of %d/%d: %+v", id, n, f)
			}
			for _, leaf := range []uint32{0xb, 0x1f} {
				core := entry(list, leaf, 1)
				if core == nil || core.Edx != uint32(id) || core.Ebx != uint32(n) || 1<<core.Eax < n || core.Ecx>>8 != 2 {
					t.Errorf("leaf %#x of %d/%d: %+v", leaf, id, n, core)
				}
			}
			if e := entry(list, 0x8000_001e, 0); e.Eax != uint32(id) {
				t.Errorf("leaf 0x8000001e of %d/%d: %+v", id, n, e)
			}
			if e := entry(list, 0x8000_0008, 0); int(e.Ecx&0xff) != n-1 {
				t.Errorf("leaf 0x80000008 of %d/%d: %+v", id, n, e)
			}
		}
	}
	list := cpuidFor(supported, 0, 1, 2_500_000, true)
	if e := entry(list, 0x15, 0); e == nil || uint64(e.Ecx)*uint64(e.Ebx)/uint64(e.Eax) != 2_500_000_000 {
		t.Errorf("leaf 0x15: %+v", e)
	}
	if e := entry(list, 0x4000_0010, 0); e == nil || e.Eax != 2_500_000 || entry(list, 0x4000_0000, 0).Eax < 0x4000_0010 {
		t.Errorf("leaf 0x40000010: %+v", e)
	}
	// Components 6, 7 and 9 have no description: they go, and so does the
	// room they took.
	if e := entry(list, 0xd, 0); e.Eax != 0x27 || e.Ecx != 1088+64 {
		t.Errorf("leaf 0xd: mask %#x, size %d", e.Eax, e.Ecx)
	}
	if e := entry(list, 0xd, 1); e.Ecx != 0x800 {
		t.Errorf("leaf 0xd/1: supervisor mask %#x", e.Ecx)
	}
	supported[1].Ecx = 0
	if e := entry(cpuidFor(supported, 0, 1, 0, false), 0xd, 0); e != nil {
		t.Errorf("leaf 0xd without XSAVE: %+v", e)
	}
}
