package usernet

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/moovm/moovm/internal/ratelog"
	"github.com/moovm/moovm/virtionet"
)

// The network's addresses.
var errClosed = errors.New("usernet: the network is closed")

// Subnet is the guest's network; RouterAddr is its router, DHCP and DNS server,
// HostAddr stands for this machine's loopback and GuestAddr is the guest's.
func Subnet() netip.Prefix   { return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 2, 0}), 24) }
func RouterAddr() netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 2, 2}) }
func HostAddr() netip.Addr   { return netip.AddrFrom4([4]byte{10, 0, 2, 3}) }
func GuestAddr() netip.Addr  { return netip.AddrFrom4([4]byte{10, 0, 2, 15}) }

// Bounds of what a guest can have at a time.
const (
	maxConns   = 1024 // TCP connections, in both directions
	maxFlows   = 512  // UDP
	maxDialing = 256  // TCP connections that are being made
	maxQueries = 64   // names being asked for
	maxPins    = 4096 // addresses that were found for the names of a Policy
	maxDenied  = 256  // destinations remembered to have been logged
	tcpBuffer  = 512 << 10
)

// Config says what a network is like.
type Config struct {
	// Policy is where the guest may go; the zero Policy is nowhere.
	Policy Policy
	// MTU is the largest IP packet in bytes, 576 to 65535, as the guest's
	// device has it; 0 means 1500.
	MTU int
	// Nameservers are asked for names that the Policy allows; empty means those
	// of /etc/resolv.conf, which is read by New.
	Nameservers []netip.AddrPort
	// Logger gets what was refused, once a destination; nil discards it.
	Logger *slog.Logger

	// For tests: how long names may take, how addresses are connected to, and
	// which are this machine's.
	exchangeLimit, serverLimit time.Duration
	dial                       func(network, address string) (net.Conn, error)
	self                       func(netip.Addr) bool
}

func (c *Config) setDefaults() error {
	if c.MTU == 0 {
		c.MTU = 1500
	}
	if c.MTU < 576 || c.MTU > 65535 {
		return fmt.Errorf("usernet: Config.MTU is %d, want 576 to 65535", c.MTU)
	}
	if err := c.Policy.check(); err != nil {
		return err
	}
	if c.Nameservers == nil {
		c.Nameservers = systemNameservers("/etc/resolv.conf")
	}
	c.Logger = ratelog.New(c.Logger)
	if c.exchangeLimit == 0 {
		c.exchangeLimit, c.serverLimit = exchangeLimit, serverLimit
	}
	if c.self == nil {
		c.self = isSelf
	}
	return nil
}

var _ virtionet.Link = (*Network)(nil)
