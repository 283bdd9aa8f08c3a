package virtionet

// Link is the far end of a device's cable. A packet is HeaderSize bytes of
// virtio_net_hdr followed by an Ethernet frame without its check sequence.
type Link interface {
	// Attach connects the device, once, before anything else is called. From
	// now on the link may call r from any goroutine; it is down until the
	// link says r.SetLink(true).
	Attach(r Receiver) error
	// Send takes a packet of the guest, whose header is valid and needs
	// nothing that Offloads does not offer. It must not block for long and
	// must not keep packet. The queues of a device send concurrently.
	Send(packet []byte)
	// Offloads is what may be left undone in packets in both directions. It
	// never changes.
	Offloads() Offloads
	// Close ends the link; after it r is not called any more. It may be
	// called again.
	Close() error
}

// Receiver is the device's end of the cable, as the link sees it.
type Receiver interface {
	// Receive hands over a packet for the guest, which is copied. It never
	// blocks; false means that the packet was dropped, and counted.
	Receive(packet []byte) bool
	// SetLink tells the guest whether there is a link.
	SetLink(up bool)
}

// Offloads is the work that the sender of a packet leaves to its receiver.
type Offloads struct {
	// Checksum: TCP and UDP checksums that only cover the pseudo-header
	// (VIRTIO_NET_HDR_F_NEEDS_CSUM).
	Checksum bool
	// Segmentation: TCP segments of up to 64 KiB (VIRTIO_NET_HDR_GSO_TCPV4
	// and TCPV6). It needs Checksum.
	Segmentation bool
}
