package guest

import (
	"crypto/sha256"
	"fmt"
	"net"
	"net/netip"

	"github.com/moovm/moovm/virtionet"
)

// Network is a network interface of a guest.
type Network struct {
	// Link is what it is plugged into.
	Link virtionet.Link
	// MAC is its address; see MACAddress.
	MAC net.HardwareAddr
	// MTU is its largest IP packet in bytes; 0 means 1500.
	MTU int
	// Address and Gateway are what the init gives it when there is a Command, and
	// DNS what it puts into /etc/resolv.conf for the command; those that are not
	// valid are left out. Without a Command the disk's own system configures its
	// network.
	Address      netip.Prefix
	Gateway, DNS netip.Addr
}

// MACAddress is an address for a guest's interface that follows from a name:
// locally administered, and the same each time.
func MACAddress(name string) net.HardwareAddr {
	h := sha256.Sum256([]byte("moovm " + name))
	return net.HardwareAddr{0x02, h[0], h[1], h[2], h[3], h[4]}
}

// ParseMAC reads six bytes in hexadecimal, with colons.
func ParseMAC(s string) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(s)
	switch {
	case err != nil || len(mac) != 6:
		return nil, fmt.Errorf("%q is no MAC address; write six bytes, such as 02:00:00:00:00:01", s)
	case mac[0]&1 != 0 || mac.String() == "00:00:00:00:00:00":
		return nil, fmt.Errorf("%q is no address of one station; begin it with 02", s)
	}
	return mac, nil
}
