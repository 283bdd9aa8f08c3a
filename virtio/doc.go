// Package virtio holds what every virtio device shares: guest memory, the
// split virtqueue, descriptor chains as byte streams, and the contract between
// a device and a transport.
//
// A transport (virtio/pci, virtio/mmio, virtio/vhostuser) collects what the
// driver programs piece by piece in a QueueConfig, activates it once into a
// running Queue, and hands the queue to the Device, which serves it on a
// goroutine of its own until the queue is stopped.
//
// The reference is the OASIS "Virtual I/O Device (VIRTIO) Version 1.2"
// specification; section numbers in comments refer to it.
package virtio
