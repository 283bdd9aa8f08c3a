package vmm

import (
	"io"
	"sync"
	"time"
)

// uart is a 16550A serial port.
//
// Towards the guest it is a set of eight registers and an interrupt line.
// Towards the host it is two goroutines: one copies input into the receive
// FIFO when the guest has room for it, one copies output to a writer.
//
// Flow control, so that neither direction loses bytes: input is held back
// while the guest does not assert RTS (a port that is not open, or a driver
// with CRTSCTS whose buffers are full). When the writer falls behind, the
// transmitter reports itself busy (LSR.THRE clear) from softLimit on; a guest
// that writes nevertheless, as a kernel's console does after waiting 10 ms, is
// still heard up to hardLimit.
type uart struct {
	setIRQ func(level bool)

	mu       sync.Mutex
	ier, fcr uint8
	lcr, mcr uint8
	scr      uint8
	dll, dlm uint8
	thrIntr  bool // a transmitter-empty interrupt is due
	overrun  bool
	irq      bool // level of the interrupt line
	rx       [rxFIFO]byte
	rxHead   int
	rxLen    int

	out      []byte // bytes the writer has not taken yet
	writing  bool   // the writer works on bytes it took
	lost     uint64 // output bytes beyond hardLimit
	in, sent uint64 // bytes to and from the guest
	outError error
	closed   bool
	room     sync.Cond // input: FIFO room or close
	more     sync.Cond // output: bytes or close
	drained  sync.Cond // output: all written

	wg sync.WaitGroup // the writer
}

const (
	rxFIFO    = 16
	softLimit = 64 << 10
	hardLimit = 1 << 20
)

// Registers, by offset from the base port, and their bits.
const (
	uartData = 0 // RBR, THR; DLL with DLAB
	uartIER  = 1 // DLM with DLAB
	uartIIR  = 2 // FCR when written
	uartLCR  = 3
	uartMCR  = 4
	uartLSR  = 5
	uartMSR  = 6
	uartSCR  = 7

	ierRDA  = 1 << 0
	ierTHRE = 1 << 1
	ierLine = 1 << 2

	iirNone = 0x01
	iirTHRE = 0x02
	iirRDA  = 0x04
	iirLine = 0x06
	iirFIFO = 0xc0

	fcrEnable  = 1 << 0
	fcrClearRX = 1 << 1

	lcrDLAB = 1 << 7

	mcrDTR  = 1 << 0
	mcrRTS  = 1 << 1
	mcrOUT1 = 1 << 2
	mcrOUT2 = 1 << 3
	mcrLoop = 1 << 4

	lsrDR      = 1 << 0
	lsrOverrun = 1 << 1
	lsrTHRE    = 1 << 5
	lsrTEMT    = 1 << 6

	msrCTS = 1 << 4
	msrDSR = 1 << 5
	msrRI  = 1 << 6
	msrDCD = 1 << 7
)

// newUART makes a port whose interrupt line is driven through setIRQ. Nothing
// runs before start.
func newUART(setIRQ func(bool)) *uart {
	u := &uart{setIRQ: setIRQ, dll: 1} // 115200 baud
	u.room.L, u.more.L, u.drained.L = &u.mu, &u.mu, &u.mu
	return u
}

// start begins to copy from in and to out; either may be nil.
func (u *uart) start(s Serial) {
	if s.Out != nil {
		u.wg.Add(1)
		go u.writeLoop(s.Out)
	} else {
		u.mu.Lock()
		u.outError = io.ErrClosedPipe // discard
		u.mu.Unlock()
	}
	if s.In != nil {
		go u.readLoop(s.In)
	}
}

// close ends the port: waits until the output is written, at most for limit,
// and lets the goroutines go. One that is inside a Read or Write of the host
// side ends when that returns. It returns how many bytes of output were lost.
func (u *uart) close(limit time.Duration) (lost uint64) {
	u.mu.Lock()
	if !u.closed {
		late := false
		timer := time.AfterFunc(limit, func() {
			u.mu.Lock()
			late = true
			u.mu.Unlock()
			u.drained.Broadcast()
		})
		for u.outError == nil && (len(u.out) > 0 || u.writing) && !late {
			u.drained.Wait()
		}
		timer.Stop()
		u.closed = true
		u.room.Broadcast()
		u.more.Broadcast()
	}
	stuck := u.writing
	lost = u.lost + uint64(len(u.out))
	u.mu.Unlock()
	if !stuck {
		u.wg.Wait()
	}
	return lost
}

func (u *uart) writeLoop(w io.Writer) {
	defer u.wg.Done()
	var buf []byte
	u.mu.Lock()
	defer u.mu.Unlock()
	for {
		for len(u.out) == 0 && !u.closed {
			u.more.Wait()
		}
		if len(u.out) == 0 || u.closed {
			return
		}
		busy := len(u.out) >= softLimit
		buf, u.out = u.out, buf[:0]
		u.writing = true
		if busy {
			// There is room again: the transmitter becomes empty.
			u.thrIntr = true
			u.update()
		}
		u.mu.Unlock()
		_, err := w.Write(buf)
		u.mu.Lock()
		u.writing = false
		if cap(buf) > softLimit {
			buf = nil // a burst does not stay resident
		}
		if err != nil {
			u.outError = err // nobody listens any more: discard
			u.out = nil
			u.drained.Broadcast()
			return
		}
		if len(u.out) == 0 {
			u.drained.Broadcast()
		}
	}
}

func (u *uart) readLoop(r io.Reader) {
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		if !u.receive(buf[:n]) || err != nil {
			return
		}
	}
}

// receive hands p to the guest as it makes room; false when the port closed.
func (u *uart) receive(p []byte) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	for len(p) > 0 {
		for !u.closed && (u.rxLen == u.rxSize() || u.mcr&(mcrRTS|mcrLoop) != mcrRTS) {
			u.room.Wait()
		}
		if u.closed {
			return false
		}
		for len(p) > 0 && u.rxLen < u.rxSize() {
			u.push(p[0])
			p = p[1:]
		}
		if u.irq {
			// The line is up already and its interrupt is edge-triggered: a
			// handler that gave up on a stream without end (Linux does after
			// some hundred rounds) needs another edge.
			u.irq = false
			u.setIRQ(false)
		}
		u.update()
	}
	return !u.closed
}

func (u *uart) rxSize() int {
	if u.fcr&fcrEnable != 0 {
		return rxFIFO
	}
	return 1
}

func (u *uart) push(b byte) {
	if u.rxLen == u.rxSize() {
		u.overrun = true
		return
	}
	u.rx[(u.rxHead+u.rxLen)%rxFIFO] = b
	u.rxLen++
	u.in++
}

// thrEmpty says whether the transmitter takes bytes.
func (u *uart) thrEmpty() bool { return len(u.out) < softLimit }

// cause is the interrupt identification with the highest priority.
func (u *uart) cause() uint8 {
	switch {
	case u.ier&ierLine != 0 && u.overrun:
		return iirLine
	case u.ier&ierRDA != 0 && u.rxLen > 0:
		return iirRDA
	case u.ier&ierTHRE != 0 && u.thrIntr && u.thrEmpty():
		return iirTHRE
	}
	return iirNone
}

// update drives the interrupt line.
func (u *uart) update() {
	level := u.cause() != iirNone
	if level != u.irq {
		u.irq = level
		u.setIRQ(level)
	}
}

// read is a guest read of one register.
func (u *uart) read(reg uint8) (v uint8) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch reg & 7 {
	case uartData:
		if u.lcr&lcrDLAB != 0 {
			return u.dll
		}
		if u.rxLen == 0 {
			return 0
		}
		v = u.rx[u.rxHead]
		u.rxHead = (u.rxHead + 1) % rxFIFO
		u.rxLen--
		if u.rxLen == 0 {
			u.room.Signal()
		}
		u.update()
	case uartIER:
		if u.lcr&lcrDLAB != 0 {
			return u.dlm
		}
		return u.ier
	case uartIIR:
		v = u.cause()
		if v == iirTHRE {
			u.thrIntr = false
			u.update()
		}
		if u.fcr&fcrEnable != 0 {
			v |= iirFIFO
		}
	case uartLCR:
		return u.lcr
	case uartMCR:
		return u.mcr
	case uartLSR:
		if u.rxLen > 0 {
			v |= lsrDR
		}
		if u.overrun {
			v |= lsrOverrun
			u.overrun = false
			u.update()
		}
		if u.thrEmpty() {
			v |= lsrTHRE | lsrTEMT
		}
	case uartMSR:
		if u.mcr&mcrLoop == 0 {
			return msrCTS | msrDSR | msrDCD // a peer that is always there
		}
		for _, loop := range [4][2]uint8{{mcrDTR, msrDSR}, {mcrRTS, msrCTS}, {mcrOUT1, msrRI}, {mcrOUT2, msrDCD}} {
			if u.mcr&loop[0] != 0 {
				v |= loop[1]
			}
		}
	case uartSCR:
		return u.scr
	}
	return v
}

// write is a guest write of one register.
func (u *uart) write(reg, v uint8) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch reg & 7 {
	case uartData:
		if u.lcr&lcrDLAB != 0 {
			u.dll = v
			return
		}
		if u.mcr&mcrLoop != 0 {
			u.push(v)
		} else {
			u.send(v)
		}
		// Sending takes no time: the holding register is empty again.
		u.thrIntr = true
	case uartIER:
		if u.lcr&lcrDLAB != 0 {
			u.dlm = v
			return
		}
		if v&ierTHRE != 0 && u.ier&ierTHRE == 0 {
			u.thrIntr = true // enabling it with an empty register raises it
		}
		u.ier = v & 0x0f
	case uartIIR: // FCR
		if (v^u.fcr)&fcrEnable != 0 || v&fcrClearRX != 0 {
			u.rxHead, u.rxLen, u.overrun = 0, 0, false
		}
		u.fcr = v & (fcrEnable | 0xc0)
		u.room.Signal()
	case uartLCR:
		u.lcr = v
	case uartMCR:
		u.mcr = v & 0x1f
		u.room.Signal()
	case uartSCR:
		u.scr = v
	}
	u.update()
}

func (u *uart) send(b byte) {
	u.sent++
	switch {
	case u.outError != nil || u.closed:
	case len(u.out) >= hardLimit:
		u.lost++
	default:
		u.out = append(u.out, b)
		if len(u.out) == 1 {
			u.more.Signal()
		}
	}
}

func (u *uart) stats() SerialStats {
	u.mu.Lock()
	defer u.mu.Unlock()
	return SerialStats{In: u.in, Out: u.sent, Lost: u.lost}
}

// uartState is a port's registers and what waits in its receive FIFO.
type uartState struct {
	IER, FCR, LCR, MCR, SCR, DLL, DLM uint8
	THRIntr, Overrun, IRQ             bool
	RX                                []byte `json:",omitempty"` // at most rxFIFO
}

func (u *uart) state() uartState {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := uartState{IER: u.ier, FCR: u.fcr, LCR: u.lcr, MCR: u.mcr, SCR: u.scr, DLL: u.dll, DLM: u.dlm,
		THRIntr: u.thrIntr, Overrun: u.overrun, IRQ: u.irq}
	for i := range u.rxLen {
		s.RX = append(s.RX, u.rx[(u.rxHead+i)%rxFIFO])
	}
	return s
}

// setState puts a state back. Output that its machine had not got rid of is
// that machine's: this port's transmitter is empty, and says so to a driver
// that may wait for it. The interrupt line's level is not part of KVM's state,
// so the line is driven anew.
func (u *uart) setState(s uartState) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.ier, u.fcr, u.lcr, u.mcr, u.scr, u.dll, u.dlm = s.IER&0x0f, s.FCR&(fcrEnable|0xc0), s.LCR, s.MCR&0x1f, s.SCR, s.DLL, s.DLM
	u.thrIntr, u.overrun = s.THRIntr || s.IER&ierTHRE != 0, s.Overrun
	u.rxHead, u.rxLen = 0, copy(u.rx[:], s.RX)
	u.irq = false
	u.setIRQ(false)
	u.update()
	u.room.Signal()
}
