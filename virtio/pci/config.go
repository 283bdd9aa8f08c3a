package pci

import (
	"context"
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moovm/moovm/virtio"
)

// Offsets in the configuration header (PCI Local Bus 3.0, section 6.1).
const (
	cfgCommand   = 0x04
	cfgStatus    = 0x06
	cfgCacheLine = 0x0c
	cfgBAR0      = 0x10
	cfgIntLine   = 0x3c
	cfgIntPin    = 0x3d

	cmdMemory      = 1 << 1
	cmdMaster      = 1 << 2
	cmdINTxDisable = 1 << 10

	statusINTx = 1 << 3
	statusCaps = 1 << 4
)

// Capabilities (section 4.1.4), one behind the other.
const (
	capMSIX   = 0x40 // 12 bytes
	capCommon = 0x50 // 16
	capISR    = 0x60 // 16
	capDevice = 0x70 // 16
	capNotify = 0x80 // 20
	capPCICfg = 0x98 // 20

	capIDMSIX   = 0x11
	capIDVendor = 0x09

	typeCommon = 1
	typeNotify = 2
	typeISR    = 3
	typeDevice = 4
	typePCICfg = 5

	msixControl  = capMSIX + 2
	msixCtlMask  = 1 << 14
	msixCtlOn    = 1 << 15
	pciCfgBAR    = capPCICfg + 4
	pciCfgOffset = capPCICfg + 8
	pciCfgLength = capPCICfg + 12
	pciCfgData   = capPCICfg + 16
)

// configSpace is the 256-byte configuration space with a mask of the bits
// that software may change.
type configSpace struct {
	mu       sync.Mutex
	b        [256]byte
	writable [256]byte
	noINTx   atomic.Bool
}

func (c *configSpace) intxDisabled() bool { return c.noINTx.Load() }

// classes are the customary class codes by device type.
var classes = map[uint32]uint32{virtio.IDNet: 0x020000, virtio.IDBlock: 0x010000, 3: 0x078000, virtio.ID9P: 0x018000}

// initConfig sets the power-on state.
func (f *Function) initConfig() {
	c := &f.cfg
	c.mu.Lock()
	defer c.mu.Unlock()
	c.b, c.writable = [256]byte{}, [256]byte{}
	c.noINTx.Store(false)
	le := binary.LittleEndian
	le.PutUint16(c.b[0x00:], 0x1af4)
	le.PutUint16(c.b[0x02:], uint16(0x1040+f.id))
	le.PutUint16(c.b[cfgStatus:], statusCaps)
	class := f.opts.Class
	if class == 0 {
		class = classes[f.id]
	}
	if class == 0 {
		class = 0xff0000
	}
	le.PutUint32(c.b[0x08:], class<<8|1) // revision 1: not transitional
	le.PutUint32(c.b[cfgBAR0:], 4)       // 64-bit memory
	le.PutUint16(c.b[0x2c:], 0x1af4)
	sub := f.opts.SubsystemID
	if sub == 0 {
		sub = uint16(0x40 + f.id)
	}
	le.PutUint16(c.b[0x2e:], sub)
	c.b[0x34] = capMSIX
	c.b[cfgIntPin] = f.opts.InterruptPin

	le.PutUint16(c.writable[cfgCommand:], cmdMemory|cmdMaster|cmdINTxDisable)
	c.writable[cfgCacheLine] = 0xff
	c.writable[cfgIntLine] = 0xff
	le.PutUint64(c.writable[cfgBAR0:], ^(f.barSize - 1))

	c.b[capMSIX], c.b[capMSIX+1] = capIDMSIX, capCommon
	le.PutUint16(c.b[msixControl:], uint16(len(f.msix.vectors)-1))
	le.PutUint16(c.writable[msixControl:], msixCtlMask|msixCtlOn)
	le.PutUint32(c.b[capMSIX+4:], msixTableOff) // in BAR 0
	le.PutUint32(c.b[capMSIX+8:], msixPBAOff)

	vendor := func(at, next, size int, typ byte, off, length uint32) {
		c.b[at], c.b[at+1], c.b[at+2], c.b[at+3] = capIDVendor, byte(next), byte(size), typ
		le.PutUint32(c.b[at+8:], off)
		le.PutUint32(c.b[at+12:], length)
	}
	vendor(capCommon, capISR, 16, typeCommon, commonOff, commonLen)
	vendor(capISR, capDevice, 16, typeISR, isrOff, 1)
	vendor(capDevice, capNotify, 16, typeDevice, deviceOff, deviceLen)
	vendor(capNotify, capPCICfg, 20, typeNotify, notifyOff, uint32(notifyMultiplier*max(f.core.NumQueues(), 1)))
	le.PutUint32(c.b[capNotify+16:], notifyMultiplier)
	vendor(capPCICfg, 0, 20, typePCICfg, 0, 0)
	c.writable[pciCfgBAR] = 0xff
	for i := pciCfgOffset; i < pciCfgData+4; i++ {
		c.writable[i] = 0xff
	}
}

// ReadConfig reads the PCI configuration space at byte offset off. Beyond the
// 256 bytes a conventional function has, it reads zeros.
func (f *Function) ReadConfig(off uint16, p []byte) {
	clear(p)
	if int(off) >= len(f.cfg.b) {
		return
	}
	if touches(off, len(p), pciCfgData, 4) {
		f.pciCfgAccess(false)
	}
	f.cfg.mu.Lock()
	defer f.cfg.mu.Unlock()
	copy(p, f.cfg.b[off:])
	if i := cfgStatus - int(off); i >= 0 && i < len(p) && f.isr.bits.Load() != 0 && !f.msix.enabled() {
		p[i] |= statusINTx
	}
}

// WriteConfig writes the PCI configuration space at byte offset off. Bits that
// are not writable keep their value.
func (f *Function) WriteConfig(off uint16, p []byte) {
	c := &f.cfg
	if int(off) >= len(c.b) {
		return
	}
	c.mu.Lock()
	for i, v := range p {
		at := int(off) + i
		if at >= len(c.b) {
			break
		}
		c.b[at] = c.b[at]&^c.writable[at] | v&c.writable[at]
	}
	le := binary.LittleEndian
	c.noINTx.Store(le.Uint16(c.b[cfgCommand:])&cmdINTxDisable != 0)
	ctl := le.Uint16(c.b[msixControl:])
	c.mu.Unlock()

	if touches(off, len(p), msixControl, 2) {
		f.msix.control(ctl&msixCtlOn != 0, ctl&msixCtlMask != 0)
		f.updateINTx()
	}
	if touches(off, len(p), cfgCommand, 2) || touches(off, len(p), cfgBAR0, 8) {
		f.updateBAR()
		f.updateMaster()
		f.updateINTx()
	}
	if touches(off, len(p), pciCfgData, 4) {
		f.pciCfgAccess(true)
	}
}

// masterWait bounds how long clearing the bus master bit blocks for requests in
// flight, as long as for a reset.
const masterWait = time.Second

// updateMaster follows the bus master bit (PCI Local Bus 3.0, section 6.2.2):
// without it the function touches no memory. Its queues are not served and its
// messages stay pending until the bit is set again; INTx is a wire and goes on.
//
// When the bit has been cleared the requests in flight have ended, unless the
// back-end holds them for longer than a processor may be kept waiting: those
// end when they end.
func (f *Function) updateMaster() {
	f.master.Lock()
	f.cfg.mu.Lock()
	on := f.cfg.b[cfgCommand]&cmdMaster != 0
	f.cfg.mu.Unlock()
	f.msix.setMaster(on)
	f.core.SetDMA(on)
	f.master.Unlock()
	if on {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), masterWait)
	defer cancel()
	if err := f.core.Drain(ctx); err != nil {
		f.log.Warn("virtio/pci: bus mastering is off while requests are in flight", "device", f.id, "error", err)
	}
}

// touches reports whether [off, off+n) meets [at, at+size).
func touches(off uint16, n, at, size int) bool {
	return int(off) < at+size && at < int(off)+n
}

// pciCfgAccess is the window of the PCI_CFG capability (section 4.1.4.9):
// touching its data field reads or writes the BAR at the offset and length the
// driver has put beside it, also while memory decoding is off.
func (f *Function) pciCfgAccess(write bool) {
	c := &f.cfg
	le := binary.LittleEndian
	c.mu.Lock()
	bar, off, n := c.b[pciCfgBAR], le.Uint32(c.b[pciCfgOffset:]), le.Uint32(c.b[pciCfgLength:])
	var data [4]byte
	copy(data[:], c.b[pciCfgData:])
	c.mu.Unlock()
	if bar != 0 || (n != 1 && n != 2 && n != 4) || off%n != 0 || uint64(off)+uint64(n) > f.barSize {
		return
	}
	if write {
		f.writeBAR(uint64(off), data[:n])
		return
	}
	f.readBAR(uint64(off), data[:n])
	c.mu.Lock()
	copy(c.b[pciCfgData:], data[:n])
	c.mu.Unlock()
}
