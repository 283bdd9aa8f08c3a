// Package mmio is the virtio-over-MMIO transport, version 2 (virtio 1.2,
// section 4.2): a device as one window of registers with one interrupt line,
// for machines without a PCI bus. A guest learns about it from its firmware
// (ACPI LNRO0005, device tree) or its command line.
package mmio
