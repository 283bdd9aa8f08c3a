package vmm

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// port is a uart with its interrupt line, driven as a guest does.
type testPort struct {
	*uart
	irq bool
}

func newPort(t *testing.T, s Serial) *testPort {
	p := &testPort{}
	p.uart = newUART(func(level bool) { p.irq = level })
	p.start(s)
	t.Cleanup(func() { p.close(time.Second) })
	return p
}

// TestUARTProbe does what Linux's 8250 driver does to tell a 16550A from its
// relatives (drivers/tty/serial/8250/8250_port.c, autoconfig).
func TestUARTProbe(t *testing.T) {
	p := newPort(t, Serial{})
	p.write(uartIER, 0)
	if v := p.read(uartIER); v != 0 {
		t.Errorf("IER = %#x after writing 0", v)
	}
	p.write(uartIER, 0x0f)
	if v := p.read(uartIER); v != 0x0f {
		t.Errorf("IER = %#x after writing 0x0f", v)
	}
	p.write(uartIER, 0)
	p.write(uartMCR, mcrLoop|mcrOUT2|mcrRTS)
	if v := p.read(uartMSR) & 0xf0; v != msrDCD|msrCTS {
		t.Errorf("loopback: MSR = %#x, want 0x90", v)
	}
	p.write(uartMCR, 0)
	p.write(uartIIR, fcrEnable)
	if v := p.read(uartIIR) >> 6; v != 3 {
		t.Errorf("IIR>>6 = %d with FIFOs on, want 3 (16550A)", v)
	}
	p.write(uartIIR, fcrEnable|0x20)
	if v := p.read(uartIIR) >> 5; v == 7 {
		t.Error("it looks like a 16750")
	}
	p.write(uartIER, 0x40)
	if v := p.read(uartIER); v&0x40 != 0 {
		t.Error("it looks like an XScale port")
	}
	p.write(uartIIR, 0)
	if v := p.read(uartIIR) >> 6; v != 0 {
		t.Errorf("IIR>>6 = %d with FIFOs off, want 0", v)
	}
	p.write(uartLCR, lcrDLAB)
	p.write(uartData, 0x0c)
	p.write(uartIER, 0x01)
	if p.read(uartData) != 0x0c || p.read(uartIER) != 1 {
		t.Error("the divisor latch does not hold")
	}
	p.write(uartLCR, 3)
	p.write(uartSCR, 0xa5)
	if p.read(uartSCR) != 0xa5 || p.read(uartLCR) != 3 {
		t.Error("scratch or line control register does not hold")
	}
	// The test for the THRE bug: each enabling of the interrupt raises it.
	for range 2 {
		p.write(uartIER, ierTHRE)
		if !p.irq || p.read(uartIIR)&0x0f != iirTHRE {
			t.Error("enabling the transmitter interrupt does not raise it")
		}
		p.write(uartIER, 0)
	}
}

func TestUARTLoopbackData(t *testing.T) {
	p := newPort(t, Serial{})
	p.write(uartIIR, fcrEnable)
	p.write(uartMCR, mcrLoop)
	for _, c := range []byte("loop") {
		p.write(uartData, c)
	}
	var got []byte
	for p.read(uartLSR)&lsrDR != 0 {
		got = append(got, p.read(uartData))
	}
	if string(got) != "loop" {
		t.Errorf("looped back %q", got)
	}
	p.write(uartIER, ierLine)
	for range rxFIFO + 1 {
		p.write(uartData, 'x')
	}
	if !p.irq || p.read(uartIIR)&0x0f != iirLine || p.read(uartLSR)&lsrOverrun == 0 {
		t.Error("an overrun is not reported")
	}
	if p.irq || p.read(uartLSR)&lsrOverrun != 0 {
		t.Error("reading the line status does not clear the overrun")
	}
}

func TestUARTTransmitInterrupt(t *testing.T) {
	var out bytes.Buffer
	p := newPort(t, Serial{Out: &out})
	p.write(uartIER, ierTHRE)
	for _, c := range []byte("abc") {
		if v := p.read(uartIIR) & 0x0f; v != iirTHRE {
			t.Fatalf("IIR = %#x, want transmitter empty", v)
		}
		if p.irq {
			t.Fatal("reading IIR does not clear the transmitter interrupt")
		}
		p.write(uartData, c)
		if !p.irq {
			t.Fatal("no interrupt after a byte was sent")
		}
	}
	p.close(time.Second)
	if out.String() != "abc" {
		t.Errorf("sent %q", out.String())
	}
}

// TestUARTInput hands more than the FIFO holds to a guest that reads at its
// own pace, and only while it asserts RTS.
func TestUARTInput(t *testing.T) {
	in, feed := io.Pipe()
	p := newPort(t, Serial{In: in})
	p.write(uartIIR, fcrEnable)
	p.write(uartIER, ierRDA)
	text := strings.Repeat("0123456789", 1000)
	go func() {
		io.WriteString(feed, text)
		feed.Close()
	}()
	time.Sleep(5 * time.Millisecond)
	if p.read(uartLSR)&lsrDR != 0 {
		t.Fatal("input arrives before the port is open (no RTS)")
	}
	p.write(uartMCR, mcrRTS)
	var got []byte
	for i := range len(text) {
		if i == 5000 { // the driver throttles, then clears its FIFO losing nothing more than that
			p.write(uartMCR, 0)
			for p.read(uartLSR)&lsrDR != 0 {
				got = append(got, p.read(uartData))
			}
			time.Sleep(time.Millisecond)
			if p.read(uartLSR)&lsrDR != 0 {
				t.Fatal("input arrives while throttled")
			}
			p.write(uartMCR, mcrRTS)
		}
		if len(got) == len(text) {
			break
		}
		eventually(t, "input", func() bool { return p.read(uartLSR)&lsrDR != 0 })
		if v := p.read(uartIIR) & 0x0f; v != iirRDA {
			t.Fatalf("IIR = %#x with data ready", v)
		}
		got = append(got, p.read(uartData))
	}
	for len(got) < len(text) {
		eventually(t, "input", func() bool { return p.read(uartLSR)&lsrDR != 0 })
		got = append(got, p.read(uartData))
	}
	if string(got) != text {
		t.Error("input was lost or reordered")
	}
	p.uart.mu.Lock()
	defer p.uart.mu.Unlock()
	if p.irq {
		t.Error("the interrupt stays up without data")
	}
}

// slowWriter takes nothing until it is released.
type slowWriter struct {
	release chan struct{}
	bytes.Buffer
}

func (w *slowWriter) Write(p []byte) (int, error) {
	<-w.release
	return w.Buffer.Write(p)
}

func TestUARTOutputFlowControl(t *testing.T) {
	w := &slowWriter{release: make(chan struct{})}
	p := newPort(t, Serial{Out: w})
	p.write(uartIER, ierTHRE)
	n := 0
	for ; p.read(uartLSR)&lsrTHRE != 0; n++ {
		p.write(uartData, byte(n))
		if n > 3*softLimit {
			t.Fatal("the transmitter never becomes busy")
		}
	}
	p.read(uartIIR)
	if p.read(uartIIR)&0x0f == iirTHRE {
		t.Error("a busy transmitter says it is empty")
	}
	// A guest that writes nevertheless is heard, up to a limit.
	for range hardLimit + 10 {
		p.write(uartData, byte(n))
		n++
	}
	close(w.release)
	eventually(t, "room", func() bool { return p.read(uartLSR)&lsrTHRE != 0 })
	p.close(10 * time.Second)
	if int(p.lost)+w.Len() != n || w.Len() < hardLimit {
		t.Errorf("%d bytes written, %d arrived, %d counted as lost", n, w.Len(), p.lost)
	}
	for i, c := range w.Bytes() {
		if c != byte(i) {
			t.Fatalf("byte %d is %d", i, c)
		}
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestUARTBrokenOutput(t *testing.T) {
	p := newPort(t, Serial{Out: brokenWriter{}})
	for range 10 * hardLimit / 8 {
		p.write(uartData, 'x')
		if p.read(uartLSR)&lsrTHRE == 0 {
			eventually(t, "discarding", func() bool { return p.read(uartLSR)&lsrTHRE != 0 })
		}
	}
	p.close(time.Minute) // returns at once
}

func TestUARTCloseDoesNotWaitForever(t *testing.T) {
	w := &slowWriter{release: make(chan struct{})}
	p := newUART(func(bool) {})
	p.start(Serial{Out: w})
	p.write(uartData, 'x')
	p.close(10 * time.Millisecond)
	p.close(time.Minute) // idempotent
	close(w.release)     // lets the goroutine go, for the leak check
	p.wg.Wait()
}

func TestCMOS(t *testing.T) {
	now := time.Date(2031, 12, 24, 23, 59, 58, 0, time.UTC)
	c := newCMOS(func() time.Time { return now })
	get := func(i byte) byte {
		c.write(portCMOS, i)
		return c.read(portCMOS + 1)
	}
	want := map[byte]byte{0: 0x58, 2: 0x59, 4: 0x23, 6: 4, 7: 0x24, 8: 0x12, 9: 0x31, 0x32: 0x20, 0x0d: 0x80, 0x0c: 0}
	for i, v := range want {
		if got := get(i); got != v {
			t.Errorf("register %#x = %#x, want %#x", i, got, v)
		}
	}
	if get(0x0a)&0x80 != 0 {
		t.Error("an update is always in progress")
	}
	c.write(portCMOS, 0x0b)
	c.write(portCMOS+1, 0x04|0x70) // binary, all interrupts
	if v := get(0x0b); v != 0x06 {
		t.Errorf("status B = %#x: want binary, 24-hour, no interrupts", v)
	}
	if v := get(0); v != 58 {
		t.Errorf("seconds = %d in binary", v)
	}
	c.write(portCMOS, 0x40)
	c.write(portCMOS+1, 0x77)
	if get(0x40) != 0x77 || get(0xc0) != 0x77 {
		t.Error("battery-backed memory does not hold")
	}
}

func fixedNow() time.Time { return time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC) }

// TestUARTInterruptComesAgain: a driver that leaves its handler with data
// still in the FIFO gets another edge when more arrives.
func TestUARTInterruptComesAgain(t *testing.T) {
	in, feed := io.Pipe()
	defer feed.Close()
	var edges atomic.Int32
	u := newUART(func(level bool) {
		if level {
			edges.Add(1)
		}
	})
	u.start(Serial{In: in})
	defer u.close(time.Second)
	u.write(uartIIR, fcrEnable)
	u.write(uartIER, ierRDA)
	u.write(uartMCR, mcrRTS)
	io.WriteString(feed, "a")
	eventually(t, "first edge", func() bool { return edges.Load() == 1 })
	io.WriteString(feed, "b")
	eventually(t, "second edge", func() bool { return edges.Load() == 2 })
	if a, b := u.read(uartData), u.read(uartData); a != 'a' || b != 'b' {
		t.Errorf("read %q %q", a, b)
	}
}
