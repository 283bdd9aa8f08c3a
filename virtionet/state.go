package virtionet

import (
	"encoding/json"
	"fmt"

	"github.com/moovm/moovm/virtio"
)

// state is what the driver has set and the transport does not see. Packets
// that wait for the guest are not part of it: networks lose some.
type state struct {
	MAC      []byte
	Pairs    int
	Announce bool
}

// State implements virtio.StateKeeper.
func (d *Device) State() ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return json.Marshal(state{d.mac[:], int(d.active.Load()), d.announce})
}

// SetState implements virtio.StateKeeper. Whether there is a link is the
// link's affair: a driver that believes something else is told.
func (d *Device) SetState(p []byte) error {
	var s state
	if err := json.Unmarshal(p, &s); err != nil {
		return fmt.Errorf("%w: a network device's state: %v", virtio.ErrState, err)
	}
	if len(s.MAC) != len(d.mac) || !unicast(s.MAC) {
		return fmt.Errorf("%w: MAC %x is no address of a network device", virtio.ErrState, s.MAC)
	}
	if s.Pairs < 1 || s.Pairs > len(d.pairs) {
		return fmt.Errorf("%w: %d queue pairs are in use, the device has %d", virtio.ErrState, s.Pairs, len(d.pairs))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.mac[:], s.MAC)
	d.active.Store(int32(s.Pairs))
	d.announce = s.Announce
	if d.notify != nil {
		d.notify.ConfigChanged()
	}
	return nil
}
