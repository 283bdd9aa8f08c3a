package vmm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
)

// bzImage wraps 64-bit code as a self-unpacking kernel.
func (a asm) bzImage() []byte {
	le := binary.LittleEndian
	b := make([]byte, 5*512+0x200, 5*512+0x200+len(a))
	b[0x1f1] = 4 // setup sectors
	le.PutUint16(b[0x1fe:], 0xaa55)
	b[0x200], b[0x201] = 0xeb, 0x66 // the header ends at 0x268
	copy(b[0x202:], "HdrS")
	le.PutUint16(b[0x206:], 0x020f)
	le.PutUint32(b[0x230:], 0x20_0000)
	b[0x234] = 1
	le.PutUint16(b[0x236:], 1)
	le.PutUint64(b[0x258:], guestBase)
	le.PutUint32(b[0x260:], 1<<20)
	return append(append(b, a...), make([]byte, headPadding)...)
}

const headPadding = 4096 // an image is longer than its first page

// withNote appends a PVH note to an ELF file made by kernel.
func (a asm) pvhKernel(entry uint32, desc int) Kernel {
	le := binary.LittleEndian
	k := a.kernel()
	code := make([]byte, k.Size)
	k.Image.ReadAt(code, 0)
	code = code[64+56:]
	note := le.AppendUint32(nil, 4)
	note = le.AppendUint32(note, uint32(desc))
	note = le.AppendUint32(note, 18)
	note = append(note, "Xen\x00"...)
	note = le.AppendUint32(note, entry)
	note = append(note, make([]byte, desc-4)...)

	b := make([]byte, 64+2*56)
	k.Image.ReadAt(b[:64+56], 0)
	le.PutUint16(b[56:], 2)
	le.PutUint64(b[64+8:], uint64(len(b)+len(note)))
	p := b[64+56:]
	le.PutUint32(p, 4) // PT_NOTE
	le.PutUint64(p[8:], uint64(len(b)))
	le.PutUint64(p[32:], uint64(len(note)))
	le.PutUint64(p[40:], uint64(len(note)))
	b = append(append(b, note...), code...)
	return Kernel{Name: "PVH guest", Image: bytes.NewReader(b), Size: int64(len(b)), Protocol: ProtocolPVH}
}

func TestBzImageRuns(t *testing.T) {
	b := asm{}.print("unpacking").powerOff().bzImage()
	m, out := newMachine(t, nil, func(c *Config) {
		c.Kernel = Kernel{Image: bytes.NewReader(b), Size: int64(len(b))}
	})
	if r, err := runToEnd(t, m); r != PowerOff || err != nil || out.String() != "unpacking" {
		t.Errorf("%v, %v, console %q", r, err, out)
	}
	var head [4]byte
	m2, _ := newMachine(t, nil, func(c *Config) {
		c.Kernel = Kernel{Image: bytes.NewReader(b), Size: int64(len(b))}
	})
	if err := m2.ram.mem.Read(addrZeroPage+0x260, head[:]); err != nil || binary.LittleEndian.Uint32(head[:]) != 1<<20 {
		t.Errorf("the zero page lacks the image's header: init_size % x, %v", head, err)
	}
}

func TestBzImagesRefused(t *testing.T) {
	le := binary.LittleEndian
	for name, test := range map[string]struct {
		change func(b []byte) []byte
		want   string
	}{
		"cut header":   {func(b []byte) []byte { return b[:0x300] }, "cut off"},
		"old protocol": {func(b []byte) []byte { le.PutUint16(b[0x206:], 0x0205); return b }, "2.05"},
		"32-bit":       {func(b []byte) []byte { b[0x236] = 0; return b }, "32-bit"},
		"all setup":    {func(b []byte) []byte { b[0x1f1] = 255; return b }, "cut off"},
		"low":          {func(b []byte) []byte { le.PutUint64(b[0x258:], 0x1000); return b }, "0x1000"},
		"overflow":     {func(b []byte) []byte { le.PutUint64(b[0x258:], 1<<64-4096); return b }, "more memory"},
		"big":          {func(b []byte) []byte { le.PutUint32(b[0x260:], 1<<31); return b }, "more memory"},
	} {
		t.Run(name, func(t *testing.T) {
			b := test.change(asm{}.powerOff().bzImage())
			_, err := New(Config{Memory: 4 << 20, Kernel: Kernel{Name: "vmlinuz", Image: bytes.NewReader(b), Size: int64(len(b))}})
			if !errors.Is(err, ErrKernel) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v", err)
			}
		})
	}
	b := asm{}.bzImage()
	_, err := New(Config{Memory: 4 << 20, Kernel: Kernel{Image: bytes.NewReader(b), Size: int64(len(b)), Protocol: ProtocolPVH}})
	if !errors.Is(err, ErrKernel) {
		t.Errorf("a bzImage entered by PVH: %v", err)
	}
}

func TestPVHRuns(t *testing.T) {
	for _, desc := range []int{4, 8} {
		// cmp dword [ebx], magic; jne hang
		code := asm{}.bytes(0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, 0x75, 0xfe).
			bytes(0x8b, 0x73, 0x18).                   // mov esi, [ebx+24]: command line
			bytes(0xb9, 4, 0, 0, 0).                   // mov ecx, 4
			bytes(0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e). // mov dx, 0x3f8; rep outsb
			powerOff()
		m, out := newMachine(t, nil, func(c *Config) {
			c.Kernel = code.pvhKernel(guestBase, desc)
			c.Cmdline = "word"
			c.Initrd = []byte("initrd")
		})
		p := make([]byte, 64)
		if err := m.ram.mem.Read(addrPVH, p); err != nil {
			t.Fatal(err)
		}
		if le := binary.LittleEndian; le.Uint32(p[12:]) != 1 || le.Uint64(p[32:]) != addrACPI || le.Uint32(p[48:]) == 0 {
			t.Errorf("start information % x", p)
		}
		if r, err := runToEnd(t, m); r != PowerOff || err != nil || out.String() != "word" {
			t.Errorf("%v, %v, console %q", r, err, out)
		}
	}
}

func TestPVHRefused(t *testing.T) {
	k := asm{}.powerOff().kernel()
	k.Protocol = ProtocolPVH
	for name, k := range map[string]Kernel{
		"no note":       k,
		"entry outside": asm{}.powerOff().pvhKernel(0x1000, 4),
		"odd note":      asm{}.powerOff().pvhKernel(guestBase, 12),
	} {
		if _, err := New(Config{Memory: 4 << 20, Kernel: k}); !errors.Is(err, ErrKernel) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzLoadBzImage(f *testing.F) {
	f.Add(asm{}.powerOff().bzImage())
	mem := make([]byte, 2<<20)
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := loadBzImage(Kernel{Image: bytes.NewReader(b), Size: int64(len(b))}, mem)
		if err == nil && (l.end > uint64(len(mem)) || l.entry < addrHigh || l.entry >= l.end) {
			t.Errorf("accepted: %+v", l)
		}
	})
}
