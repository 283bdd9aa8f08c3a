// Package filefs is a virtio file system device (virtio 1.2, section 5.11) that
// shows a few open files, and nothing else of this machine: file i is /i in a
// flat root folder that cannot be changed. It is how the emulated host of a
// sandbox writes to a disk image.
//
// 9P, which brings it everything else, knows neither holes nor where data lies.
// FUSE, which this device speaks (linux/fuse.h, version 7.31), does: fallocate
// and SEEK_DATA come through, so that what a guest discards is a hole in the
// file on this machine. Locks are the client's own affair.
//
// The driver is not trusted: whatever it asks, it reaches those files only.
package filefs
