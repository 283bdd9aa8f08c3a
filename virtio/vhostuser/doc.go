// Package vhostuser serves a virtio device to another process, such as QEMU,
// over a socket: the back-end of the vhost-user protocol
// (docs/interop/vhost-user.rst in QEMU's sources). Guest memory arrives as
// file descriptors and is mapped; notifications and interrupts are eventfds.
//
// The front-end is not trusted: a message that makes no sense ends the
// connection with a reason, memory is touched only inside the regions it gave,
// and memory that vanishes under our hands ends a queue, not the process.
//
// What the guest's driver chooses is not the front-end's fault, which only
// hands it on: a queue whose size, alignment or contents make no sense is
// broken, which its error descriptor and NEEDS_RESET in the status tell, and
// the connection goes on. The queue runs again once it has been set up again.
//
// A server that was killed can be replaced by another one while the front-end
// waits: the requests it had in flight are in memory that the front-end keeps
// (INFLIGHT_SHMFD), and so is what the device had completed but its backend not
// made durable, if the device has a place for that (PendingLen, SharePending in
// virtioblk).
package vhostuser
