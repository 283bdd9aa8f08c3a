package virtio

// Device is the device half of a virtio device: what it is, what its
// configuration space says and how it serves its queues. A transport owns the
// calls: Activate once when the driver sets DRIVER_OK, then one ServeQueue for
// each enabled queue on a goroutine of its own, and Reset after all of them
// have returned. ReadConfig and WriteConfig may come at any time, concurrently
// with everything else.
type Device interface {
	// ID is the device type (section 5: 2 is a block device, 9 a 9P transport).
	ID() uint32
	// Features are the device feature bits offered. The transport adds those
	// it implements itself (VERSION_1, INDIRECT_DESC, EVENT_IDX, RING_RESET).
	Features() uint64
	// QueueSizes is the maximum size of each queue, in descriptors.
	QueueSizes() []uint16
	// ReadConfig reads the device configuration space; bytes beyond its end
	// read as zeros.
	ReadConfig(off uint32, p []byte)
	// WriteConfig writes the device configuration space; writes to read-only
	// fields and beyond its end are ignored.
	WriteConfig(off uint32, p []byte)
	// Activate tells the device that the driver is ready (DRIVER_OK), with
	// the negotiated features.
	Activate(features uint64, notify ConfigNotifier) error
	// ServeQueue serves queue i until q.Wait returns false, finishes what is
	// in flight, and returns. An error puts the device into NEEDS_RESET.
	ServeQueue(i int, q *Queue) error
	// Reset returns the device to its initial state.
	Reset()
}

// ConfigNotifier tells the driver that the configuration space has changed.
type ConfigNotifier interface {
	// ConfigChanged advances the configuration generation and raises a
	// configuration change interrupt. It may be called from any goroutine.
	ConfigChanged()
}

// StatsReporter is a Device that counts.
type StatsReporter interface {
	// ReportStats returns the counters now, as a value of a type of the
	// device's own. It may be called at any time, concurrently with everything
	// else.
	ReportStats() any
}
