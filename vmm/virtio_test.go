package vmm

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"testing"
	"time"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

// ringsGuest is the program of testdata/rings.s, which interprets a list.
const ringsGuest = "bc000018000f011c25e0001000be00101000488b3e8b46088b4e0c4883c61083f901741983f902741883f904741883f905741783f90674" +
	"1989faeeebd58807ebd1668907ebcc8907ebc866390775fbebc1fbf4ebfc00000000000000000000000000000000000000000000000000" +
	"000000000000000000000000000000000000ff042500f01f00eb1e0000000000000000000000000000000000000000000000ff042504f0" +
	"1f00bfb000e0fec70700000000bc00001800e956ffffff0000000000000000000000000000000000000000000000000000000000000000" +
	"00000000ff070008100000000000"

// Operations of the list.
const (
	opWrite8  = 1
	opWrite16 = 2
	opWrite32 = 4
	opWait16  = 5
	opIRQ     = 6
	opPort    = 7
)

// Where the program has its interrupt table, its list, its two handlers and
// their counters.
const (
	ringsIDT      = guestBase + 0x800
	ringsList     = guestBase + 0x1000
	ringsHandler  = guestBase + 0x80 // the second is 0x20 behind
	ringsCounters = 0x1f_f000
	ringsVector   = 0x50 // and 0x51
)

// ringsScript is a list under construction.
type ringsScript struct {
	b       []byte
	touches uint64 // writes to devices' memory, but for doorbells
}

func (s *ringsScript) op(op, value uint32, addr uint64) {
	le := binary.LittleEndian
	s.b = le.AppendUint32(le.AppendUint32(le.AppendUint64(s.b, addr), value), op)
	if op <= opWrite32 && addr >= addrHole && addr < addrIOAPIC {
		s.touches++
	}
}

func (s *ringsScript) w8(addr uint64, v uint8)   { s.op(opWrite8, uint32(v), addr) }
func (s *ringsScript) w16(addr uint64, v uint16) { s.op(opWrite16, uint32(v), addr) }
func (s *ringsScript) w32(addr uint64, v uint32) { s.op(opWrite32, v, addr) }
func (s *ringsScript) w64(addr, v uint64) {
	s.w32(addr, uint32(v))
	s.w32(addr+4, uint32(v>>32))
}

// kick rings a doorbell, which is not to be seen by anybody but the kernel.
func (s *ringsScript) kick(addr uint64, queue int) {
	s.w32(addr, uint32(queue))
	s.touches--
}

// pciDriver adds what a driver of function f does to bring its queues up, and
// returns their doorbells.
func (s *ringsScript) pciDriver(m *Machine, rings []*virtiotest.Ring) (doorbells []uint64, ack func()) {
	var bar [4]byte
	f := m.devices[0].(pciDevice).Function
	f.ReadConfig(0x10, bar[:])
	p := &virtiotest.PCI{F: f, Host: &virtiotest.PCIHost{}, Base: uint64(binary.LittleEndian.Uint32(bar[:]) &^ 0xf)}
	p.BringUp() // finds the structures and switches MSI-X on
	common, table := p.Base+p.Common, p.Base+p.Table
	s.w8(common+20, virtio.StatusAcknowledge|virtio.StatusDriver)
	s.w32(common+8, 1) // the upper half of the features
	s.w32(common+12, uint32(virtio.FeatureVersion1>>32))
	s.w8(common+20, virtio.StatusAcknowledge|virtio.StatusDriver|virtio.StatusFeaturesOK)
	for i, r := range rings {
		s.w64(table+16*uint64(i+1), addrLAPIC)
		s.w32(table+16*uint64(i+1)+8, ringsVector+uint32(i))
		s.w16(common+22, uint16(i))
		s.w16(common+24, r.Size)
		s.w64(common+32, r.Desc)
		s.w64(common+40, r.Driver)
		s.w64(common+48, r.Device)
		s.w16(common+26, uint16(i+1))
		s.w16(common+28, 1)
		doorbells = append(doorbells, p.Base+p.Doorbell(i))
	}
	s.w8(common+20, virtio.StatusAcknowledge|virtio.StatusDriver|virtio.StatusFeaturesOK|virtio.StatusDriverOK)
	return doorbells, func() {}
}

// mmioDriver is the same for the machine's first window.
func (s *ringsScript) mmioDriver(_ *Machine, rings []*virtiotest.Ring) (doorbells []uint64, ack func()) {
	reg := windowAddr(0)
	// The I/O APIC's pin: edge, active high, to processor 0.
	pin := 0x10 + 2*windowGSI(0)
	s.w32(addrIOAPIC, pin+1)
	s.w32(addrIOAPIC+0x10, 0)
	s.w32(addrIOAPIC, pin)
	s.w32(addrIOAPIC+0x10, ringsVector)
	s.w32(reg+0x70, uint32(virtio.StatusAcknowledge|virtio.StatusDriver))
	s.w32(reg+0x24, 1)
	s.w32(reg+0x20, uint32(virtio.FeatureVersion1>>32))
	s.w32(reg+0x70, uint32(virtio.StatusAcknowledge|virtio.StatusDriver|virtio.StatusFeaturesOK))
	for i, r := range rings {
		s.w32(reg+0x30, uint32(i))
		s.w32(reg+0x38, uint32(r.Size))
		s.w64(reg+0x80, r.Desc)
		s.w64(reg+0x90, r.Driver)
		s.w64(reg+0xa0, r.Device)
		s.w32(reg+0x44, 1)
		doorbells = append(doorbells, reg+mmio.QueueNotify)
	}
	s.w32(reg+0x70, uint32(virtio.StatusAcknowledge|virtio.StatusDriver|virtio.StatusFeaturesOK|virtio.StatusDriverOK))
	return doorbells, func() { s.w32(reg+0x64, 1) }
}

// ringsJob is a machine whose bare-metal guest drives a virtio disk of two
// queues, one request after the other, and then powers off.
type ringsJob struct {
	m       *Machine
	out     *syncBuffer
	script  *ringsScript
	places  []uint64 // of the requests, in every clone's memory
	content []byte
}

const ringsRequests = 40

var ringsTransports = map[string]struct {
	transport  Transport
	interrupts [2]uint32 // at least so many of each vector
	driver     func(s *ringsScript, m *Machine, rings []*virtiotest.Ring) ([]uint64, func())
}{
	"pci":  {TransportPCI, [2]uint32{ringsRequests / 2, ringsRequests / 2}, (*ringsScript).pciDriver},
	"mmio": {TransportMMIO, [2]uint32{ringsRequests, 0}, (*ringsScript).mmioDriver},
}

// newRingsJob makes one with the disk that wrap makes of its contents.
func newRingsJob(t *testing.T, transport string, wrap func(virtioblk.Backend) virtioblk.Backend) *ringsJob {
	t.Helper()
	test := ringsTransports[transport]
	j := &ringsJob{content: make([]byte, 1<<20), script: &ringsScript{}}
	for i := range j.content {
		j.content[i] = byte(i>>9*7 + i)
	}
	code, err := hex.DecodeString(ringsGuest)
	if err != nil {
		t.Fatal(err)
	}
	j.m, j.out = newMachine(t, code, func(c *Config) {
		c.Transport, c.Devices = test.transport, []virtio.Device{newDisk(t, wrap(j.disk(t)), 2)}
	})
	ram := j.m.ram.low()
	for i := range 2 {
		gate, handler := ram[ringsIDT+16*(ringsVector+i):], uint32(ringsHandler+0x20*i)
		binary.LittleEndian.PutUint16(gate, uint16(handler))
		binary.LittleEndian.PutUint16(gate[2:], selBootCS)
		gate[5] = 0x8e // present, an interrupt gate
		binary.LittleEndian.PutUint16(gate[6:], uint16(handler>>16))
	}
	g := virtiotest.NewGuestOn(ram[virtiotest.GuestBase:addrLowEnd])
	clear(g.Bytes) // the command line was here
	rings := []*virtiotest.Ring{virtiotest.NewRing(g, 64, 0), virtiotest.NewRing(g, 64, 0)}
	s := j.script
	s.w32(addrLAPIC+0xf0, 0x1ff) // switch the local APIC on
	doorbells, ack := test.driver(s, j.m, rings)
	// All requests lie in the rings; the guest shows the device one after the
	// other.
	for i := range ringsRequests {
		at, b := g.Alloc(32+512, 64)
		j.places = append(j.places, at)
		b[16] = 0xff
		binary.LittleEndian.PutUint64(b[8:], uint64(i*3))
		r := rings[i%2]
		if _, err := r.Add(virtiotest.Buf{Addr: at, Len: 16}, virtiotest.Buf{Addr: at + 32, Len: 512, Write: true},
			virtiotest.Buf{Addr: at + 16, Len: 1, Write: true}); err != nil {
			t.Fatal(err)
		}
		s.w16(r.Driver+2, uint16(i/2+1))
		s.kick(doorbells[i%2], i%2)
		s.op(opIRQ, 0, 0)
		s.op(opWait16, uint32(i/2+1), r.Device+2)
		ack()
	}
	s.op(opPort, 'k', portCOM1)
	s.op(opPort, sleepEnable|sleepTypeS5<<2, portSleep)
	s.op(opIRQ, 0, 0)
	copy(ram[ringsList:], s.b)
	return j
}

// disk is a disk with the job's contents.
func (j *ringsJob) disk(t *testing.T) virtioblk.Backend {
	t.Helper()
	disk := virtioblk.NewRAM(int64(len(j.content)))
	if _, err := disk.WriteAt(j.content, 0); err != nil {
		t.Fatal(err)
	}
	return disk
}

// check looks at what the requests have brought into m's memory.
func (j *ringsJob) check(t *testing.T, m *Machine) {
	t.Helper()
	for i, at := range j.places {
		b, err := m.ram.mem.Slice(at, 32+512)
		if err != nil {
			t.Fatal(err)
		}
		if b[16] != 0 || !bytes.Equal(b[32:], j.content[i*3*512:][:512]) {
			t.Errorf("request %d: status %d, data % x…", i, b[16], b[32:48])
		}
	}
}

// A bare-metal guest drives a virtio disk of two queues. Its doorbells are
// ioeventfds, which never leave the kernel; the completions are interrupts
// that the guest takes, by irqfd.
func TestVirtioBareMetal(t *testing.T) {
	for name, test := range ringsTransports {
		t.Run(name, func(t *testing.T) {
			j := newRingsJob(t, name, func(b virtioblk.Backend) virtioblk.Backend { return b })
			m := j.m
			if r, err := runToEnd(t, m); r != PowerOff || err != nil || j.out.String() != "k" {
				t.Fatalf("%v, %v, console %q, exits %v", r, err, j.out, m.Exits())
			}
			j.check(t, m)
			for i, least := range test.interrupts {
				if n := binary.LittleEndian.Uint32(m.ram.low()[ringsCounters+4*i:]); n < least || n > least+2 {
					t.Errorf("%d interrupts of vector %d, want %d", n, i, least)
				}
			}
			if n := m.Exits()["mmio"]; n != j.script.touches {
				t.Errorf("%d exits by memory access, want %d: none for the %d doorbells", n, j.script.touches, ringsRequests)
			}
			if st := diskStats(m); st.Reads != ringsRequests || st.Errors != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// A guest that clears a function's bus master bit is not written to by it, and
// its requests are served when it sets the bit again.
func TestBusMasterBareMetal(t *testing.T) {
	code, err := hex.DecodeString(ringsGuest)
	if err != nil {
		t.Fatal(err)
	}
	m, out := newMachine(t, code, func(c *Config) {
		c.Devices = []virtio.Device{newDisk(t, zeroDisk(1<<20), 2)}
	})
	ram := m.ram.low()
	g := virtiotest.NewGuestOn(ram[virtiotest.GuestBase:addrLowEnd])
	clear(g.Bytes)
	rings := []*virtiotest.Ring{virtiotest.NewRing(g, 64, 0), virtiotest.NewRing(g, 64, 0)}
	flagAt, flag := g.Alloc(64, 64)
	at, req := g.Alloc(32+512, 64)
	for i := range req {
		req[i] = 0xff
	}
	clear(req[:16]) // a read of sector 0
	r := rings[0]
	if _, err := r.Add(virtiotest.Buf{Addr: at, Len: 16}, virtiotest.Buf{Addr: at + 32, Len: 512, Write: true},
		virtiotest.Buf{Addr: at + 16, Len: 1, Write: true}); err != nil {
		t.Fatal(err)
	}
	const command = addrECAM + 1<<15 + 4
	s := &ringsScript{}
	doorbells, _ := s.pciDriver(m, rings)
	s.w16(command, 1<<1) // memory, not bus master
	s.w16(r.Driver+2, 1)
	s.kick(doorbells[0], 0)
	s.op(opPort, 'c', portCOM1)
	s.op(opWait16, 1, flagAt)
	s.w16(command, 1<<1|1<<2)
	s.op(opWait16, 1, r.Device+2)
	s.op(opPort, 'k', portCOM1)
	s.op(opPort, sleepEnable|sleepTypeS5<<2, portSleep)
	s.op(opIRQ, 0, 0)
	copy(ram[ringsList:], s.b)

	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "c")
	time.Sleep(50 * time.Millisecond) // longer than serving takes
	if st := diskStats(m); st.Reads != 0 || req[16] != 0xff || req[32] != 0xff || r.UsedIdx() != 0 {
		t.Errorf("without the bit: %d reads, status %d, data %#x, used.idx %d", st.Reads, req[16], req[32], r.UsedIdx())
	}
	binary.LittleEndian.PutUint16(flag, 1)
	if reason, err := m.Wait(); reason != PowerOff || err != nil || out.String() != "ck" {
		t.Fatalf("%v, %v, console %q", reason, err, out.String())
	}
	if st := diskStats(m); st.Reads != 1 || req[16] != 0 || req[32] != 0 {
		t.Errorf("with the bit: %d reads, status %d, data %#x", st.Reads, req[16], req[32])
	}
}
