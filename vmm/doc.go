// Package vmm is a small KVM machine that boots stock Linux distribution
// kernels.
//
// A machine is made by New from a Config, runs in Run until the guest switches
// it off, resets it or the context ends, and gives everything back in Close.
// Several machines may live in one process. Probe tells beforehand whether a
// KVM device can run a kernel at all.
//
// # The machine
//
//   - 1 to MaxCPUs virtual processors, started through the local APIC that is
//     KVM's, as are the IOAPIC, the PICs and the timer; kvmclock and a TSC of
//     known frequency.
//   - Memory from one memory file, with a hole below 4 GiB, touched lazily.
//   - Two 16550A serial ports, a real-time clock, and a PCI bus (or
//     virtio-mmio windows) with any virtio.Device.
//   - ACPI, hardware-reduced: power-off, reset, a power button, pvpanic.
//   - The kernel, an ELF vmlinux, is entered by the 64-bit boot protocol;
//     there is no firmware.
//
// # How it works
//
// Each vCPU is a goroutine locked to a thread that calls KVM_RUN. What the
// guest does to ports and memory without RAM comes back as exits and goes
// through Machine.port and Machine.mmio to the devices, on that thread.
// Devices never block it. A virtio queue's doorbell does not exit: an
// ioeventfd wakes the queue's goroutine, and its interrupt goes the other way
// through an irqfd.
//
// Every address, size and value from the guest is checked where it is used.
// What nobody claims reads as all ones.
package vmm
