// Package vhostuser serves a virtio device to another process, such as QEMU,
// over a socket: the back-end of the vhost-user protocol
// (docs/interop/vhost-user.rst in QEMU's sources). Guest memory arrives as
// file descriptors and is mapped; notifications and interrupts are eventfds.
//
// The front-end is not trusted: a message that makes no sense ends the
// connection with a reason, memory is touched only inside the regions it gave,
// and memory that vanishes under our hands ends a queue, not the process.
package vhostuser
