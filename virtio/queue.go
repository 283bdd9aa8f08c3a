package virtio

// QueueConfig is what a driver programs about a queue, piece by piece: plain
// data without meaning until Activate has validated it.
type QueueConfig struct {
	MaxSize uint16 // what the device offers, in descriptors
	Size    uint16 // what the driver chose: a power of two, at most MaxSize
	Desc    uint64 // guest-physical address of the descriptor table
	Driver  uint64 // guest-physical address of the available ring
	Device  uint64 // guest-physical address of the used ring
	Ready   bool   // the driver has enabled the queue
}

// Activate validates the configuration once and returns the running queue.
func (c QueueConfig) Activate(mem *Memory, features uint64, kick *Event, interrupt func()) (*Queue, error) {
	return &Queue{}, nil
}

// Queue is a running split virtqueue, seen from the device.
type Queue struct{}

// Next returns the next available chain, or nil if the ring is empty.
func (q *Queue) Next() (*DescriptorChain, error) { return nil, nil }

// Wait blocks until chains are available; false means the queue is stopped.
func (q *Queue) Wait() bool { return false }

// Push puts a chain into the used ring.
func (q *Queue) Push(c *DescriptorChain) {}

// Notify interrupts the driver if it wants to know about what was pushed.
func (q *Queue) Notify() {}

// Stop ends Wait and Next.
func (q *Queue) Stop() {}

// Stopped reports whether Stop was called.
func (q *Queue) Stopped() bool { return false }
