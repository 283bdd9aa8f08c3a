package vmm

import (
	"sync"
	"time"
)

// cmos is an MC146818 real-time clock with its 128 bytes of battery-backed
// memory. The time is the host's and cannot be set; there are no alarms.
type cmos struct {
	now func() time.Time

	mu    sync.Mutex
	index uint8
	ram   [128]byte
}

func newCMOS(now func() time.Time) *cmos {
	c := &cmos{now: now}
	c.ram[0x0a] = 0x26 // 32768 Hz divider, 1024 Hz rate
	c.ram[0x0b] = 0x02 // 24-hour, BCD
	c.ram[0x0d] = 0x80 // battery good
	return c
}

func bcd(n int) byte { return byte(n/10<<4 | n%10) }

func (c *cmos) read(reg uint16) byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if reg&1 == 0 {
		return c.index
	}
	conv := bcd
	if c.ram[0x0b]&0x04 != 0 {
		conv = func(n int) byte { return byte(n) }
	}
	t := c.now().UTC()
	switch i := c.index & 0x7f; i {
	case 0x00:
		return conv(t.Second())
	case 0x02:
		return conv(t.Minute())
	case 0x04:
		return conv(t.Hour())
	case 0x06:
		return conv(int(t.Weekday()) + 1)
	case 0x07:
		return conv(t.Day())
	case 0x08:
		return conv(int(t.Month()))
	case 0x09:
		return conv(t.Year() % 100)
	case 0x32:
		return conv(t.Year() / 100)
	case 0x0c:
		return 0 // no interrupt is pending, ever
	default:
		return c.ram[i]
	}
}

func (c *cmos) write(reg uint16, v byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if reg&1 == 0 {
		c.index = v
		return
	}
	switch i := c.index & 0x7f; i {
	case 0x0a:
		c.ram[i] = v & 0x7f // update in progress is read-only
	case 0x0b:
		c.ram[i] = v&0x85 | 0x02 // no interrupts, always 24-hour
	case 0x0c, 0x0d:
	default:
		c.ram[i] = v
	}
}

// cmosState is the clock's memory and its index register.
type cmosState struct {
	Index uint8
	RAM   [128]byte
}

func (c *cmos) state() cmosState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return cmosState{Index: c.index, RAM: c.ram}
}

func (c *cmos) setState(s cmosState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.index, c.ram = s.Index, s.RAM
}
