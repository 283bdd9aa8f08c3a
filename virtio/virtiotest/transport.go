package virtiotest

// Transport is a driver's view of a device behind any transport. NewPCI and
// NewMMIO return one for devices of this module; an embedder writes one for
// their own to run Conformance on it.
type Transport interface {
	DeviceID() uint32
	Status() uint8
	SetStatus(v uint8)
	// DeviceFeatures and DriverFeatures read the 32-bit window sel.
	DeviceFeatures(sel uint32) uint32
	DriverFeatures(sel uint32) uint32
	SetDriverFeatures(sel, v uint32)

	Generation() uint32
	// ReadConfig and WriteConfig access the device configuration space with
	// one access of len(p) bytes.
	ReadConfig(off uint32, p []byte)
	WriteConfig(off uint32, p []byte)

	// QueueMax is the size queue i can have; 0 if there is no such queue.
	QueueMax(i int) uint16
	// SetQueue programs size and addresses of queue i.
	SetQueue(i int, size uint16, desc, driver, device uint64)
	// EnableQueue enables queue i; QueueEnabled reads that back.
	EnableQueue(i int)
	QueueEnabled(i int) bool
	// ResetQueue starts a reset of queue i; QueueResetting tells whether it
	// is still going on.
	ResetQueue(i int)
	QueueResetting(i int) bool
	// Notify kicks queue i.
	Notify(i int)

	// QueueInterrupts counts the interrupts about used buffers of queue i
	// so far (of any queue, where the transport cannot tell them apart),
	// ConfigInterrupts those about the configuration.
	QueueInterrupts(i int) uint64
	ConfigInterrupts() uint64
}
