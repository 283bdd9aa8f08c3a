package virtionet_test

import (
	"bytes"
	"net"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/pci"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtionet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var mac = net.HardwareAddr{2, 0, 0, 0, 0, 1}

// cable is a Link whose other end is the test.
type cable struct {
	r virtionet.Receiver

	mu   sync.Mutex
	sent [][]byte
}

func (c *cable) Attach(r virtionet.Receiver) error {
	c.r = r
	r.SetLink(true)
	return nil
}

func (c *cable) Send(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sent = append(c.sent, bytes.Clone(p))
}

func (c *cable) Sent() (p []byte, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.sent) == 0 {
		return nil, false
	}
	p, c.sent = c.sent[0], c.sent[1:]
	return p, true
}

func (c *cable) Inject(p []byte) { c.r.Receive(p) }
func (c *cable) SetLink(up bool) { c.r.SetLink(up) }
func (c *cable) Close() error    { return nil }
func (c *cable) Offloads() virtionet.Offloads {
	return virtionet.Offloads{Checksum: true, Segmentation: true}
}

func newDevice(t testing.TB, c virtionet.Config) *virtionet.Device {
	t.Helper()
	if c.MAC == nil {
		c.MAC = mac
	}
	d, err := virtionet.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func openPCI(t testing.TB, d *virtionet.Device, g *virtiotest.Guest) *virtiotest.PCI {
	t.Helper()
	p, err := virtiotest.NewPCI(d, g, pci.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.F.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func openMMIO(t testing.TB, d *virtionet.Device, g *virtiotest.Guest) *virtiotest.MMIO {
	t.Helper()
	m, err := virtiotest.NewMMIO(d, g, mmio.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// transports opens a device on each of them.
var transports = map[string]func(t testing.TB, d *virtionet.Device, g *virtiotest.Guest) virtiotest.Transport{
	"PCI": func(t testing.TB, d *virtionet.Device, g *virtiotest.Guest) virtiotest.Transport {
		return openPCI(t, d, g)
	},
	"MMIO": func(t testing.TB, d *virtionet.Device, g *virtiotest.Guest) virtiotest.Transport {
		return openMMIO(t, d, g)
	},
}

func TestConformance(t *testing.T) {
	for name, open := range transports {
		t.Run(name, func(t *testing.T) {
			virtiotest.Conformance(t, func(t *testing.T, g *virtiotest.Guest) virtiotest.Transport {
				return open(t, newDevice(t, virtionet.Config{Link: virtionet.Null{}, Pairs: 2}), g)
			})
			virtiotest.NetConformance(t, func(t *testing.T, g *virtiotest.Guest) (virtiotest.Transport, virtiotest.Cable) {
				c := &cable{}
				return open(t, newDevice(t, virtionet.Config{Link: c, Pairs: 2}), g), c
			})
		})
	}
}

// plainLink takes no offloads.
type plainLink struct{ cable }

func (*plainLink) Offloads() virtionet.Offloads { return virtionet.Offloads{} }

// oddLink takes offloads that cannot be.
type oddLink struct{ cable }

func (*oddLink) Offloads() virtionet.Offloads { return virtionet.Offloads{Segmentation: true} }

func TestNewChecksConfig(t *testing.T) {
	for name, c := range map[string]virtionet.Config{
		"no link":       {MAC: mac},
		"no MAC":        {Link: virtionet.Null{}},
		"short MAC":     {Link: virtionet.Null{}, MAC: mac[:5]},
		"long MAC":      {Link: virtionet.Null{}, MAC: append(mac, 1)},
		"zero MAC":      {Link: virtionet.Null{}, MAC: make([]byte, 6)},
		"multicast MAC": {Link: virtionet.Null{}, MAC: []byte{1, 0, 0, 0, 0, 1}},
		"MTU 67":        {Link: virtionet.Null{}, MAC: mac, MTU: 67},
		"MTU 65536":     {Link: virtionet.Null{}, MAC: mac, MTU: 65536},
		"pairs":         {Link: virtionet.Null{}, MAC: mac, Pairs: -1},
		"many pairs":    {Link: virtionet.Null{}, MAC: mac, Pairs: 33},
		"queue size 5":  {Link: virtionet.Null{}, MAC: mac, QueueSize: 5},
		"queue size 2":  {Link: virtionet.Null{}, MAC: mac, QueueSize: 2},
		"odd offloads":  {Link: &oddLink{}, MAC: mac},
	} {
		if _, err := virtionet.New(c); err == nil || !strings.HasPrefix(err.Error(), "virtionet: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A link without offloads: none is offered, and packets that need one are
// dropped.
func TestLinkWithoutOffloads(t *testing.T) {
	c := &plainLink{}
	d := newDevice(t, virtionet.Config{Link: c})
	const offloads = virtionet.FeatureCsum | virtionet.FeatureGuestCsum | virtionet.FeatureHostTSO4 |
		virtionet.FeatureHostTSO6 | virtionet.FeatureGuestTSO4 | virtionet.FeatureGuestTSO6
	if f := d.Features() & (offloads | virtionet.FeatureMQ); f != 0 {
		t.Errorf("features %#x", f)
	}
	g := virtiotest.NewGuest(1 << 20)
	virtiotest.Start(t, openPCI(t, d, g), g, virtiotest.NetFeatures, 16)
	if c.r.Receive(virtiotest.TCPPacket(10, 0)) {
		t.Error("a packet without its checksum is taken")
	}
	if s := d.Stats(); s.RxInvalid != 1 {
		t.Errorf("%+v", s)
	}
}

func TestStats(t *testing.T) {
	c := &cable{}
	d := newDevice(t, virtionet.Config{Link: c})
	c.Inject(virtiotest.Packet(100, 1)) // no driver
	g := virtiotest.NewGuest(1 << 20)
	n := virtiotest.NewNet(virtiotest.Start(t, openPCI(t, d, g), g, virtiotest.NetFeatures, 16))
	n.Transmit(1, virtiotest.Packet(100, 1))
	n.Transmit(1, virtiotest.Packet(20, 1)[:20])
	c.SetLink(false)
	n.Transmit(1, virtiotest.Packet(100, 1))
	c.Inject(virtiotest.Packet(100, 1))
	c.SetLink(true)
	c.Inject(virtiotest.Packet(13, 1))
	c.Inject(virtiotest.Packet(1515, 1))
	c.Inject(virtiotest.Packet(1000, 1)) // does not fit
	c.Inject(virtiotest.Packet(200, 1))
	n.Post(300)
	n.Receive()
	want := virtionet.Stats{TxPackets: 1, TxBytes: 100, TxInvalid: 1, TxDown: 1,
		RxPackets: 1, RxBytes: 200, RxInvalid: 2, RxDown: 2, RxTooLong: 1}
	virtiotest.Eventually(t, "the counters", func() bool { return d.ReportStats() == want })
	for c.r.Receive(virtiotest.Packet(1500, 1)) {
	}
	if s := d.Stats(); s.RxFull != 1 {
		t.Errorf("%+v", s)
	}
}

// What the driver has set is the same in the device that goes on.
func TestState(t *testing.T) {
	c := &cable{}
	d := newDevice(t, virtionet.Config{Link: c, Pairs: 2})
	g := virtiotest.NewGuest(1 << 20)
	n := virtiotest.NewNet(virtiotest.Start(t, openPCI(t, d, g), g, virtiotest.NetFeatures, 16))
	if n.Control(1, 1, 2, 9, 9, 9, 9, 9) != 0 || n.Control(4, 0, 2, 0) != 0 {
		t.Fatal("commands fail")
	}
	before := n.ConfigInterrupts()
	d.Announce()
	virtiotest.Eventually(t, "a configuration interrupt", func() bool { return n.ConfigInterrupts() > before })
	p, err := d.State()
	if err != nil {
		t.Fatal(err)
	}
	status := func(d *virtionet.Device) byte {
		b := []byte{0}
		d.ReadConfig(6, b)
		return b[0]
	}
	if s := status(d); s != 3 {
		t.Errorf("status %#x", s)
	}
	e := newDevice(t, virtionet.Config{Link: &cable{}, Pairs: 2})
	if err := e.SetState(p); err != nil {
		t.Fatal(err)
	}
	if q, err := e.State(); err != nil || !bytes.Equal(p, q) || e.MAC().String() != "02:09:09:09:09:09" || status(e) != 3 {
		t.Errorf("%s, %v; had %s", q, err, p)
	}
	if n.Control(3, 0) != 0 || status(d) != 1 {
		t.Errorf("status %#x after the announcement", status(d))
	}
	fresh, _ := newDevice(t, virtionet.Config{Link: &cable{}}).State()
	for _, bad := range []string{"", "{}", "[1]", `{"MAC":"AgkJCQkJ","Pairs":2}`, `{"MAC":"AgkJCQkJ","Pairs":0}`, `{"MAC":"AQkJCQkJ","Pairs":1}`, `{"MAC":"AgkJ","Pairs":1}`} {
		e := newDevice(t, virtionet.Config{Link: &cable{}})
		if err := e.SetState([]byte(bad)); err == nil {
			t.Errorf("%q is accepted", bad)
		} else if s, _ := e.State(); !bytes.Equal(s, fresh) {
			t.Errorf("%q left %s behind", bad, s)
		}
	}
}

// Buffers that were held for packets to come are still there when the machine
// goes on after a snapshot, in their order.
func TestSuspendLosesNoBuffer(t *testing.T) {
	c := &cable{}
	d := newDevice(t, virtionet.Config{Link: c})
	g := virtiotest.NewGuest(1 << 20)
	m := openMMIO(t, d, g)
	n := virtiotest.NewNet(virtiotest.Start(t, m, g, virtiotest.NetFeatures, 16))
	n.Post(40, 50, 60, 200)
	for i := range byte(3) {
		if err := m.D.Core().Suspend(t.Context()); err != nil {
			t.Fatal(err)
		}
		s, err := m.D.State()
		if err != nil {
			t.Fatal(err)
		}
		if s.Core.Queues[0].AvailIndex != s.Core.Queues[0].UsedIndex {
			t.Errorf("available %d, used %d", s.Core.Queues[0].AvailIndex, s.Core.Queues[0].UsedIndex)
		}
		m.D.Resume(false)
		c.Inject(virtiotest.Packet(25, i))
		if got, used := n.Receive(); len(used) != 1 || !bytes.Equal(got[12:], virtiotest.Packet(25, i)[12:]) {
			t.Errorf("received %x in %v", got, used)
		}
	}
}

var _ virtio.StateKeeper = (*virtionet.Device)(nil)
