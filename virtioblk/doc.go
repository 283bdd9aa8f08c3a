// Package virtioblk is the virtio block device (virtio 1.2, section 5.2) over
// any disk object that has ReadAt, WriteAt, Flush and Size.
package virtioblk
