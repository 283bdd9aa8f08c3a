package virtionet

import "sync/atomic"

// Stats are a device's counters since it was built. Bytes are those of frames.
type Stats struct {
	TxPackets uint64 `json:"tx_packets"` // from the guest to the link
	TxBytes   uint64 `json:"tx_bytes"`
	// Packets of the guest that were dropped: invalid ones (headers, sizes),
	// and those sent while the link was down.
	TxInvalid uint64 `json:"tx_invalid"`
	TxDown    uint64 `json:"tx_down"`

	RxPackets uint64 `json:"rx_packets"` // as the guest received them
	RxBytes   uint64 `json:"rx_bytes"`
	// Packets of the link that were dropped: invalid ones, those that came
	// while the guest listened to no link, those for which the device had no
	// room, because the guest offered too few buffers for too long, and those
	// that did not fit into the buffers of the guest.
	RxInvalid uint64 `json:"rx_invalid"`
	RxDown    uint64 `json:"rx_down"`
	RxFull    uint64 `json:"rx_full"`
	RxTooLong uint64 `json:"rx_too_long"`
}

// counters are the statistics of one queue pair. The halves have different
// writers and do not share a cache line.
type counters struct {
	_                                     [64]byte
	txPackets, txBytes, txInvalid, txDown atomic.Uint64
	_                                     [64]byte
	rxPackets, rxBytes                    atomic.Uint64
	rxInvalid, rxDown, rxFull, rxTooLong  atomic.Uint64
	_                                     [64]byte
}

// ReportStats implements virtio.StatsReporter: it returns Stats.
func (d *Device) ReportStats() any { return d.Stats() }

// Stats returns the counters, summed over the queues.
func (d *Device) Stats() Stats {
	var s Stats
	for _, p := range d.pairs {
		c := &p.counters
		s.TxPackets += c.txPackets.Load()
		s.TxBytes += c.txBytes.Load()
		s.TxInvalid += c.txInvalid.Load()
		s.TxDown += c.txDown.Load()
		s.RxPackets += c.rxPackets.Load()
		s.RxBytes += c.rxBytes.Load()
		s.RxInvalid += c.rxInvalid.Load()
		s.RxDown += c.rxDown.Load()
		s.RxFull += c.rxFull.Load()
		s.RxTooLong += c.rxTooLong.Load()
	}
	return s
}
