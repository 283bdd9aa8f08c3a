package virtiovsock

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/moovm/moovm/internal/ratelog"
	"github.com/moovm/moovm/virtio"
)

// Errors of connections.
var (
	// ErrNotReady says that the guest's driver is not there, or not yet.
	ErrNotReady = errors.New("virtiovsock: the guest has no driver for the device yet")
	// ErrRefused says that nobody listens on the port.
	ErrRefused = errors.New("virtiovsock: nobody in the guest listens on the port")
	// ErrReset says that the other end broke the connection off.
	ErrReset = errors.New("virtiovsock: the connection was reset")
	// ErrTooMany says that there are Config.MaxConns connections.
	ErrTooMany = errors.New("virtiovsock: too many connections")
	// ErrPortInUse says that a Listener has the port.
	ErrPortInUse = errors.New("virtiovsock: the port is in use")
)

// Config says what kind of device is built.
type Config struct {
	// CID is the guest's, MinCID to MaxCID.
	CID uint32
	// MaxConns bounds the connections, in both directions and those that are
	// being made; 0 means 1024.
	MaxConns int
	// Connect is where a connection of the guest's goes to a port that no
	// Listener has; it is called on a goroutine of its own. An error refuses the
	// connection. nil refuses all.
	Connect func(port uint32) (net.Conn, error)
	// Logger gets what the guest does wrong; nil discards it.
	Logger *slog.Logger
}

// maxReplies bounds the packets without data that wait for the guest to take
// them: nothing more is taken from it meanwhile (section 5.10.6.1).
const maxReplies = 1024

// Device is a virtio socket device. Its virtio.Device methods belong to the
// transport; the others may be called from any goroutine.
type Device struct {
	cid     uint32
	max     int
	connect func(port uint32) (net.Conn, error)
	log     *slog.Logger
	confirm time.Duration // closeLimit

	work  chan struct{} // has room for one: there is something for the guest
	room  chan struct{} // has room for one: replies has room again
	event chan struct{} // has room for one: the driver must be told of a reset

	wg sync.WaitGroup // goroutines of Connect

	mu        sync.Mutex
	running   bool
	closed    bool
	replies   []header
	sending   []*Conn // have data, and credit
	conns     map[key]*Conn
	listeners map[uint32]*Listener
	nextPort  uint32
	stats     Stats
}

// key is a connection's ports.
type key struct{ host, guest uint32 }

// Stats are a device's counters since it was built.
type Stats struct {
	Connections uint64 `json:"connections"` // that were established
	Refused     uint64 `json:"refused"`     // of the guest's
	Invalid     uint64 `json:"invalid"`     // packets that made no sense
	RxBytes     uint64 `json:"rx_bytes"`    // from the guest
	TxBytes     uint64 `json:"tx_bytes"`    // to the guest
	Open        int    `json:"open"`
}

var (
	_ virtio.Device        = (*Device)(nil)
	_ virtio.StateKeeper   = (*Device)(nil)
	_ virtio.StatsReporter = (*Device)(nil)
)

// New returns a device. The caller closes it after its transport.
func New(c Config) (*Device, error) {
	if c.CID < MinCID || c.CID > MaxCID {
		return nil, fmt.Errorf("virtiovsock: Config.CID is %d, want %d to %d", c.CID, MinCID, uint32(MaxCID))
	}
	if c.MaxConns == 0 {
		c.MaxConns = 1024
	}
	if c.MaxConns < 0 {
		return nil, fmt.Errorf("virtiovsock: Config.MaxConns is %d, want 0 or more", c.MaxConns)
	}
	return &Device{
		cid: c.CID, max: c.MaxConns, connect: c.Connect, log: ratelog.New(c.Logger), confirm: closeLimit,
		work: make(chan struct{}, 1), room: make(chan struct{}, 1), event: make(chan struct{}, 1),
		conns: map[key]*Conn{}, listeners: map[uint32]*Listener{}, nextPort: firstPort,
	}, nil
}

// ID implements virtio.Device.
func (d *Device) ID() uint32 { return virtio.IDVsock }

// CID is the guest's.
func (d *Device) CID() uint32 { return d.cid }

// Features implements virtio.Device: streams need none.
func (d *Device) Features() uint64 { return 0 }

// QueueSizes implements virtio.Device.
func (d *Device) QueueSizes() []uint16 { return []uint16{256, 256, 16} }

// ReadConfig implements virtio.Device.
func (d *Device) ReadConfig(off uint32, p []byte) {
	b := le.AppendUint64(nil, uint64(d.cid))
	clear(p)
	if off < uint32(len(b)) {
		copy(p, b[off:])
	}
}

// WriteConfig implements virtio.Device: nothing is writable.
func (d *Device) WriteConfig(uint32, []byte) {}

// Activate implements virtio.Device.
func (d *Device) Activate(uint64, virtio.ConfigNotifier) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.running = true
	return nil
}

// Reset implements virtio.Device: it breaks all connections off.
func (d *Device) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.running = false
	d.breakAll(ErrReset)
	select {
	case <-d.event:
	default:
	}
}

// breakAll ends all connections without telling the guest; mu is held.
func (d *Device) breakAll(err error) {
	for _, c := range d.conns {
		c.end(err)
	}
	clear(d.conns)
	d.replies, d.sending = nil, nil
	signal(d.room)
}

// Close ends the listeners and connections, and waits for Connect.
func (d *Device) Close() error {
	d.mu.Lock()
	d.closed, d.running = true, false
	d.breakAll(net.ErrClosed)
	for _, l := range d.listeners {
		l.end()
	}
	clear(d.listeners)
	d.mu.Unlock()
	d.wg.Wait()
	return nil
}

// Stats returns the counters.
func (d *Device) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.stats
	s.Open = len(d.conns)
	return s
}

// ReportStats implements virtio.StatsReporter: it returns Stats.
func (d *Device) ReportStats() any { return d.Stats() }

// state is what a snapshot keeps: connections are none of it.
type state struct{ CID uint32 }

// State implements virtio.StateKeeper.
func (d *Device) State() ([]byte, error) { return json.Marshal(state{d.cid}) }

// SetState implements virtio.StateKeeper. The connections of the snapshot are
// gone; the driver is told, and reads the CID again, which may be another one.
func (d *Device) SetState(p []byte) error {
	var s state
	if err := json.Unmarshal(p, &s); err != nil {
		return fmt.Errorf("%w: a socket device's state: %v", virtio.ErrState, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.breakAll(ErrReset)
	if d.running {
		signal(d.event)
	}
	return nil
}

// signal makes one receive from c go on.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// ServeQueue implements virtio.Device.
func (d *Device) ServeQueue(i int, q *virtio.Queue) error {
	switch i {
	case rxQueue:
		return d.serveReceive(q)
	case txQueue:
		return d.serveTransmit(q)
	}
	return d.serveEvents(q)
}

// hold returns the next chain; nil when the queue is stopped.
func hold(q *virtio.Queue) (*virtio.DescriptorChain, error) {
	for {
		c, err := q.Next()
		if c != nil || err != nil {
			return c, err
		}
		q.Notify()
		if !q.Wait() {
			return nil, nil
		}
	}
}

// putBack leaves a chain to the next life of the queue.
func putBack(q *virtio.Queue, c *virtio.DescriptorChain) {
	if !q.PutBack(c) {
		q.Push(c)
	}
	q.Notify()
}

// serveReceive gives the guest packets. It holds a buffer before it looks for
// one.
func (d *Device) serveReceive(q *virtio.Queue) error {
	p := make([]byte, headerSize+maxPayload)
	for {
		c, err := hold(q)
		if c == nil {
			return err
		}
		w := c.Writer()
		if w.Len() <= headerSize {
			q.Push(c) // no buffer for any data
			continue
		}
		n := 0
		for n == 0 {
			if n = d.next(p[:min(len(p), w.Len())]); n > 0 {
				break
			}
			q.Notify()
			select {
			case <-d.work:
			case <-q.Done():
				putBack(q, c)
				return nil
			}
		}
		_, err = w.Write(p[:n])
		q.Push(c)
		if err != nil {
			return err
		}
	}
}

// serveTransmit takes the guest's packets.
func (d *Device) serveTransmit(q *virtio.Queue) error {
	p := make([]byte, headerSize+maxPayload)
	for {
		c, err := hold(q)
		if c == nil {
			return err
		}
		for !d.mayReply() {
			q.Notify()
			select {
			case <-d.room:
			case <-q.Done():
				putBack(q, c)
				return nil
			}
		}
		r := c.Reader()
		if n := r.Len(); n < headerSize || n > len(p) {
			d.invalid()
			q.Push(c)
			continue
		}
		n, err := r.Read(p)
		q.Push(c)
		if err != nil {
			return err
		}
		d.packet(parseHeader(p), p[headerSize:n])
	}
}

// serveEvents tells the driver that the connections are gone.
func (d *Device) serveEvents(q *virtio.Queue) error {
	for {
		c, err := hold(q)
		if c == nil {
			return err
		}
		if c.Writer().Len() < eventSize {
			q.Push(c)
			continue
		}
		q.Notify()
		select {
		case <-d.event:
		case <-q.Done():
			putBack(q, c)
			return nil
		}
		_, err = c.Writer().Write(le.AppendUint32(nil, eventReset))
		q.Push(c)
		q.Notify()
		if err != nil {
			return err
		}
	}
}

func (d *Device) mayReply() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.replies) < maxReplies
}

func (d *Device) invalid() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stats.Invalid++
}
