package virtionet

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"

	"github.com/moovm/moovm/virtio"
)

// Config says what kind of network device is built.
type Config struct {
	// Link is what the device is plugged into; the caller closes it after
	// the transport is closed.
	Link Link
	// MAC is the device's address: 6 bytes, unicast, not all zeros.
	MAC net.HardwareAddr
	// MTU is the largest IP packet in bytes, 68 to 65535, which is also told
	// to the driver; 0 means 1500.
	MTU int
	// Pairs is the number of receive and transmit queues, at most 32; 0
	// means 1.
	Pairs int
	// QueueSize is the number of descriptors of a queue, a power of two from
	// 4 to 1024; 0 means 256.
	QueueSize uint16
}

// Device is a virtio network device. Its virtio.Device methods belong to the
// transport, its Receiver methods to the link; Stats, MAC and Announce may be
// called at any time.
type Device struct {
	link      Link
	offloads  Offloads
	mtu       int
	queueSize uint16
	first     [6]byte // Config.MAC
	pairs     []*pair

	features atomic.Uint64 // negotiated
	running  atomic.Bool   // activated
	up       atomic.Bool   // there is a link
	active   atomic.Int32  // queue pairs that the driver uses
	flows    [flowSlots]atomic.Uint32

	mu       sync.Mutex
	mac      [6]byte
	announce bool // the driver shall announce itself
	notify   virtio.ConfigNotifier
}

// flowSlots is the size of the table that remembers, by the hash of a flow,
// the pair on which the driver sent last.
const flowSlots = 256

// pair is a receive and a transmit queue.
type pair struct {
	counters counters
	in       *buffer // packets for the receive queue
	out      []byte  // the transmit queue's packet
	cut      []byte  // the receive queue's segment
}

var (
	_ virtio.Device           = (*Device)(nil)
	_ virtio.FeatureValidator = (*Device)(nil)
	_ virtio.StateKeeper      = (*Device)(nil)
	_ virtio.StatsReporter    = (*Device)(nil)
	_ Receiver                = (*Device)(nil)
)

// New returns a network device that is attached to c.Link.
func New(c Config) (*Device, error) {
	if c.MTU == 0 {
		c.MTU = 1500
	}
	if c.Pairs == 0 {
		c.Pairs = 1
	}
	if c.QueueSize == 0 {
		c.QueueSize = 256
	}
	switch {
	case c.Link == nil:
		return nil, errors.New("virtionet: Config.Link is missing")
	case len(c.MAC) != 6 || !unicast(c.MAC):
		return nil, fmt.Errorf("virtionet: Config.MAC is %q, want 6 bytes of a unicast address", c.MAC)
	case c.MTU < minMTU || c.MTU > maxMTU:
		return nil, fmt.Errorf("virtionet: Config.MTU is %d, want %d to %d", c.MTU, minMTU, maxMTU)
	case c.Pairs < 1 || c.Pairs > 32:
		return nil, fmt.Errorf("virtionet: Config.Pairs is %d, want 1 to 32", c.Pairs)
	case c.QueueSize < 4 || c.QueueSize > 1024 || c.QueueSize&(c.QueueSize-1) != 0:
		return nil, fmt.Errorf("virtionet: Config.QueueSize is %d, want a power of two from 4 to 1024", c.QueueSize)
	}
	d := &Device{link: c.Link, offloads: c.Link.Offloads(), mtu: c.MTU, queueSize: c.QueueSize}
	if d.offloads.Segmentation && !d.offloads.Checksum {
		return nil, errors.New("virtionet: the link's Offloads have Segmentation without Checksum")
	}
	copy(d.first[:], c.MAC)
	d.mac = d.first
	d.active.Store(1)
	for range c.Pairs {
		d.pairs = append(d.pairs, &pair{
			in:  newBuffer(bufferSize),
			out: make([]byte, HeaderSize+maxFrame),
			cut: make([]byte, HeaderSize+maxFrame),
		})
	}
	if err := c.Link.Attach(d); err != nil {
		return nil, err
	}
	return d, nil
}

// unicast reports whether a MAC address can be a device's.
func unicast(mac []byte) bool { return mac[0]&1 == 0 && [6]byte(mac) != [6]byte{} }

// ID implements virtio.Device.
func (d *Device) ID() uint32 { return virtio.IDNet }

// Features implements virtio.Device.
func (d *Device) Features() uint64 {
	f := FeatureMAC | FeatureMTU | FeatureStatus | FeatureMrgRxBuf | FeatureCtrlVQ | FeatureCtrlMACAddr | FeatureGuestAnnounce
	if len(d.pairs) > 1 {
		f |= FeatureMQ
	}
	if d.offloads.Checksum {
		f |= FeatureCsum | FeatureGuestCsum
	}
	if d.offloads.Segmentation {
		f |= FeatureHostTSO4 | FeatureHostTSO6 | FeatureGuestTSO4 | FeatureGuestTSO6
	}
	return f
}

// ValidateFeatures implements virtio.FeatureValidator: some features need
// others (section 5.1.3.1).
func (d *Device) ValidateFeatures(f uint64) error {
	for _, n := range []struct{ feature, needs uint64 }{
		{FeatureGuestTSO4 | FeatureGuestTSO6, FeatureGuestCsum},
		{FeatureHostTSO4 | FeatureHostTSO6, FeatureCsum},
		{FeatureGuestAnnounce | FeatureMQ | FeatureCtrlMACAddr, FeatureCtrlVQ},
	} {
		if f&n.feature != 0 && f&n.needs == 0 {
			return fmt.Errorf("virtionet: features %#x need %#x", f&n.feature, n.needs)
		}
	}
	return nil
}

// QueueSizes implements virtio.Device: receive and transmit queues take turns,
// the control queue is the last one.
func (d *Device) QueueSizes() []uint16 {
	s := make([]uint16, 2*len(d.pairs)+1)
	for i := range s {
		s[i] = d.queueSize
	}
	return s
}

// ReadConfig implements virtio.Device.
func (d *Device) ReadConfig(off uint32, p []byte) {
	var b [cfgLen]byte
	d.mu.Lock()
	copy(b[cfgMAC:], d.mac[:])
	if d.up.Load() {
		b[cfgStatus] |= statusLinkUp
	}
	if d.announce {
		b[cfgStatus] |= statusAnnounce
	}
	d.mu.Unlock()
	le.PutUint16(b[cfgMaxPairs:], uint16(len(d.pairs)))
	le.PutUint16(b[cfgMTU:], uint16(d.mtu))
	clear(p)
	if off < cfgLen {
		copy(p, b[off:])
	}
}

// WriteConfig implements virtio.Device: nothing is writable.
func (d *Device) WriteConfig(uint32, []byte) {}

// Activate implements virtio.Device.
func (d *Device) Activate(features uint64, notify virtio.ConfigNotifier) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.features.Store(features)
	d.notify = notify
	d.running.Store(true)
	return nil
}

// Reset implements virtio.Device.
func (d *Device) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.running.Store(false)
	d.features.Store(0)
	d.active.Store(1)
	d.mac = d.first
	d.announce = false
	d.notify = nil
	for _, p := range d.pairs {
		p.in.reset()
	}
	for i := range d.flows {
		d.flows[i].Store(0)
	}
}

// ServeQueue implements virtio.Device.
func (d *Device) ServeQueue(i int, q *virtio.Queue) error {
	features, control := d.features.Load(), 2
	if features&FeatureMQ != 0 {
		control = 2 * len(d.pairs)
	}
	switch {
	case i == control && features&FeatureCtrlVQ != 0:
		return d.serveControl(q)
	case i >= control:
		return nil // not a queue of this driver's
	case i%2 == 1:
		return d.serveTransmit(i/2, q)
	}
	return d.serveReceive(d.pairs[i/2], q)
}

// MAC is the address that the device has now: the driver can change it.
func (d *Device) MAC() net.HardwareAddr {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append(net.HardwareAddr(nil), d.mac[:]...)
}

// SetLink implements Receiver.
func (d *Device) SetLink(up bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.up.Swap(up) != up && d.notify != nil {
		d.notify.ConfigChanged()
	}
}

// Announce asks the driver to make itself known on the network, as it should
// when the machine has been moved to another place (section 5.1.6.5.4).
func (d *Device) Announce() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.notify == nil || d.features.Load()&FeatureGuestAnnounce == 0 {
		return
	}
	d.announce = true
	d.notify.ConfigChanged()
}
