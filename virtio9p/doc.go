// Package virtio9p is the virtio 9P transport device: a file tree of the host,
// any p9.Attacher, that a Linux guest mounts by its tag.
//
//	mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 TAG DIR
//
// The device has no chapter in the virtio standard. Its interface is what
// Linux (include/uapi/linux/virtio_9p.h, net/9p/trans_virtio.c) and QEMU agree
// on: device ID 9, feature bit 0 (MOUNT_TAG), a configuration space of
// tag_len[2] tag[tag_len], and one queue on which each chain is a T-message in
// its readable and room for the R-message in its writable bytes, split into
// buffers wherever the driver liked.
//
// The guest is not trusted: package fence checks every message before the 9P
// server sees it and bounds every reply by the writable bytes of its chain.
package virtio9p
