// Package virtiovsock is a virtio socket device (virtio 1.2, section 5.10):
// streams between programs of a guest and this process, without a network. The
// guest has a CID, this side is CID 2.
//
// Device.Dial connects to a port of the guest's, Device.Listen takes
// connections that the guest makes; both are a net.Conn then. ServeUnix and
// DialUnix are the same for other programs, by UNIX sockets as Firecracker has
// them.
//
// A guest is hostile: headers are checked, credit is kept, connections and
// what waits are bounded. A connection does not survive the restore of a snapshot:
// the driver is told so (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET).
package virtiovsock
