// Package pci is the modern virtio-over-PCI transport (virtio 1.2, section
// 4.1): one PCI function with the virtio capabilities, MSI-X with an INTx
// fallback, and one doorbell address per queue.
package pci
