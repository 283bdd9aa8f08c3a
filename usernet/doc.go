// Package usernet is a network for a guest that needs no rights on the host: a
// TCP/IP stack in this process (gVisor's) is the router of a small IPv4 network,
// and opens an ordinary socket for each connection of the guest's that a Policy
// allows.
//
//	guest  10.0.2.15 ──frames──▶ Network ──sockets──▶ where the Policy lets it go
//	                             10.0.2.2 router, DHCP, DNS, answers to ping
//	                             10.0.2.3 host.moovm.internal: this machine's loopback, if allowed
//
// The zero Policy lets a guest go nowhere, and what it may do is decided when
// it connects, on the address that is really used: see Policy. Programs of this
// machine reach the guest by Network.Dial, without a port, or by a Forward. There
// is no IPv6, and ICMP goes to the router only.
//
// A guest is hostile: everything it sends is checked, connections, flows, names
// and memory are bounded.
package usernet
