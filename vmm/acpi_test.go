package vmm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func sum(b []byte) (s byte) {
	for _, v := range b {
		s += v
	}
	return s
}

// findTables walks the tables from the RSDP as an operating system does.
func findTables(t *testing.T, base uint64, b []byte) map[string][]byte {
	t.Helper()
	le := binary.LittleEndian
	if string(b[:8]) != "RSD PTR " || sum(b[:20]) != 0 || sum(b[:36]) != 0 {
		t.Fatalf("RSDP % x", b[:36])
	}
	table := func(at uint64) []byte {
		at -= base
		d := b[at:]
		n := le.Uint32(d[4:])
		if sum(d[:n]) != 0 {
			t.Errorf("%s: wrong checksum", d[:4])
		}
		if at%4 != 0 {
			t.Errorf("%s lies at %#x, not aligned", d[:4], at)
		}
		return d[:n]
	}
	tables := map[string][]byte{}
	xsdt := table(le.Uint64(b[24:]))
	tables["XSDT"] = xsdt
	for p := xsdt[36:]; len(p) > 0; p = p[8:] {
		d := table(le.Uint64(p))
		tables[string(d[:4])] = d
	}
	tables["DSDT"] = table(le.Uint64(tables["FACP"][140:]))
	return tables
}

// Another reader of ACPI tables, ACPICA's, takes ours apart and puts them
// together again without complaint.
func TestACPIByACPICA(t *testing.T) {
	iasl, err := exec.LookPath("iasl")
	if err != nil {
		t.Skip("iasl is missing: apt-get install acpica-tools")
	}
	dir := t.TempDir()
	const windows = 11
	for name, d := range findTables(t, addrACPI, acpiTables(addrACPI, 2, windows)) {
		if err := os.WriteFile(filepath.Join(dir, name+".dat"), d, 0o644); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{"-d", name + ".dat"}, {name + ".dsl"}} {
			if args[0] != "-d" && name != "DSDT" {
				continue // only AML compiles
			}
			cmd := exec.Command(iasl, args...)
			cmd.Dir = dir
			out, err := cmd.CombinedOutput()
			if err != nil || args[0] != "-d" && !bytes.Contains(out, []byte(" 0 Errors, 0 Warnings")) {
				t.Errorf("iasl %v: %v\n%s", args, err, out)
			}
		}
	}
	dsl, err := os.ReadFile(filepath.Join(dir, "DSDT.dsl"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`Name (_HID, "LNRO0005")`, "0x00001000,         // Address Length", "Interrupt (ResourceConsumer, Edge, ActiveHigh, Shared, ,, )"} {
		if n := strings.Count(string(dsl), want); n != windows {
			t.Errorf("iasl reads %d times %q, want %d", n, want, windows)
		}
	}
	for i := range windows {
		for _, want := range []string{fmt.Sprintf("0x%08X,         // Address Base", windowAddr(i)), fmt.Sprintf("0x%08X,\n", windowGSI(i))} {
			if !strings.Contains(string(dsl), want) {
				t.Errorf("iasl does not read %q for device %d", want, i)
			}
		}
	}
}

func TestACPITables(t *testing.T) {
	for _, cpus := range []int{1, 2, MaxCPUs} {
		t.Run(fmt.Sprint(cpus, " CPUs"), func(t *testing.T) {
			b := acpiTables(addrACPI, cpus, maxWindows)
			if len(b) > sizeACPI {
				t.Fatalf("%d bytes do not fit", len(b))
			}
			tables := findTables(t, addrACPI, b)
			if dir := os.Getenv("MOOVM_ACPI_DUMP"); dir != "" { // for iasl -d
				for name, d := range tables {
					if err := os.WriteFile(filepath.Join(dir, name+".dat"), d, 0o644); err != nil {
						t.Fatal(err)
					}
				}
			}
			le := binary.LittleEndian
			f := tables["FACP"]
			if len(f) != 276 || f[8] != 6 {
				t.Fatalf("FADT of %d bytes, revision %d", len(f), f[8])
			}
			if flags := le.Uint32(f[112:]); flags&(1<<20) == 0 || flags&(1<<10) == 0 {
				t.Errorf("FADT flags %#x: want hardware-reduced and a reset register", flags)
			}
			for off, port := range map[int]uint64{116: portReset, 244: portSleep, 256: portSleepSt} {
				if f[off] != 1 || f[off+1] != 8 || le.Uint64(f[off+4:]) != port {
					t.Errorf("register at %d of the FADT: % x, want port %#x", off, f[off:off+12], port)
				}
			}
			apics := 0
			for p := tables["APIC"][44:]; len(p) > 0; p = p[p[1]:] {
				if p[0] == 0 {
					if int(p[3]) != apics || p[4]&1 == 0 {
						t.Errorf("local APIC entry % x", p[:8])
					}
					apics++
				}
			}
			if apics != cpus {
				t.Errorf("MADT lists %d processors, want %d", apics, cpus)
			}
			if m := tables["MCFG"]; le.Uint64(m[44:]) != addrECAM {
				t.Errorf("MCFG % x", m)
			}
			names := amlNames(t, tables["DSDT"][36:])
			for _, want := range []string{"_S5_", "PCI0", "COM1", "COM2", "PWRB", "GED_", cpuName(cpus - 1), windowName(maxWindows - 1)} {
				if !names[want] {
					t.Errorf("the DSDT does not define %s", want)
				}
			}
		})
	}
}

// amlNames parses the subset of AML that the builder emits, checking that
// every package ends where its length says, and returns what is defined.
func amlNames(t *testing.T, b []byte) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	var terms func(b []byte)
	path := func(b []byte) (string, []byte) {
		if b[0] == '\\' {
			b = b[1:]
		}
		if b[0] == 0x2e {
			return string(b[5:9]), b[9:]
		}
		return string(b[:4]), b[4:]
	}
	// pkg splits off a package: its content, and what follows.
	pkg := func(b []byte) ([]byte, []byte) {
		n, head := int(b[0]&0x3f), 1
		if extra := int(b[0] >> 6); extra > 0 {
			n, head = int(b[0]&0xf), 1+extra
			for i := range extra {
				n |= int(b[1+i]) << (4 + 8*i)
			}
		}
		if n > len(b) || n < head {
			t.Fatalf("package of %d bytes in %d", n, len(b))
		}
		return b[head:n], b[n:]
	}
	var value func(b []byte) []byte
	value = func(b []byte) []byte {
		switch b[0] {
		case 0x00, 0x01:
			return b[1:]
		case 0x0a:
			return b[2:]
		case 0x0b:
			return b[3:]
		case 0x0c:
			return b[5:]
		case 0x0e:
			return b[9:]
		case 0x0d:
			return b[bytes.IndexByte(b, 0)+1:]
		case 0x11:
			body, rest := pkg(b[1:])
			data := value(body)
			if data[len(data)-2] != 0x79 {
				t.Errorf("resource template without end tag: % x", data)
			}
			return rest
		case 0x12:
			body, rest := pkg(b[1:])
			n := int(body[0])
			for body = body[1:]; len(body) > 0; n-- {
				body = value(body)
			}
			if n != 0 {
				t.Errorf("package lacks %d elements", n)
			}
			return rest
		}
		t.Fatalf("no such value: % x", b[:min(8, len(b))])
		return nil
	}
	terms = func(b []byte) {
		for len(b) > 0 {
			var name string
			switch {
			case b[0] == 0x08:
				name, b = path(b[1:])
				names[name] = true
				b = value(b)
			case b[0] == 0x10:
				var body []byte
				body, b = pkg(b[1:])
				_, body = path(body)
				terms(body)
			case b[0] == 0x5b && b[1] == 0x82:
				var body []byte
				body, b = pkg(b[2:])
				name, body = path(body)
				names[name] = true
				terms(body)
			case b[0] == 0x14:
				var body []byte
				body, b = pkg(b[1:])
				name, _ = path(body)
				names[name] = true
			default:
				t.Fatalf("no such term: % x", b[:min(8, len(b))])
			}
		}
	}
	terms(b)
	return names
}

func TestAMLEncoding(t *testing.T) {
	for _, test := range []struct {
		name      string
		got, want []byte
	}{
		{"EISA id", amlEISA("PNP0A03"), []byte{0x0c, 0x41, 0xd0, 0x0a, 0x03}},
		{"path", amlPath(`\_SB_.PWRB`), []byte("\\\x2e_SB_PWRB")},
		{"zero", amlInt(0), []byte{0}},
		{"byte", amlInt(0x80), []byte{0x0a, 0x80}},
		{"word", amlInt(0x1234), []byte{0x0b, 0x34, 0x12}},
		{"dword", amlInt(0x12345678), []byte{0x0c, 0x78, 0x56, 0x34, 0x12}},
		{"qword", amlInt(1 << 40), []byte{0x0e, 0, 0, 0, 0, 0, 1, 0, 0}},
		{"short length", amlLength(make([]byte, 62))[:1], []byte{63}},
		{"two-byte length", amlLength(make([]byte, 63))[:2], []byte{0x41, 4}},
		{"three-byte length", amlLength(make([]byte, 5000))[:3], []byte{0x8b, 0x38, 0x01}},
	} {
		if !bytes.Equal(test.got, test.want) {
			t.Errorf("%s: % x, want % x", test.name, test.got, test.want)
		}
	}
}
