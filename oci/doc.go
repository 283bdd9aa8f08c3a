// Package oci makes root disks of container images: an ext4 file system, as
// one file, of all layers of an image. It needs no privileges, no tools and no
// daemon, and two disks of one image are equal byte for byte.
//
// [Open] finds an image in a registry, in a tarball of `docker save` or of the
// OCI layout, in such a folder, or in a stream; [Image.Create] writes the
// disk; [Cache.Pull] does both, once for each image.
//
// # Trust
//
// An image is input. Every blob is checked against its digest before the disk
// appears under its name. Names and links lead nowhere but into the image
// itself, whatever they say: no file of the host is opened by a name that a
// layer has. Names with .. are refused. Bytes, files, their metadata and their
// depth are bounded by [Limits]; a registry that says nothing for a minute is
// given up. Errors of a layer are a *[LayerError], which names it.
//
// # Registries
//
// Credentials are docker's: $DOCKER_CONFIG/config.json or
// ~/.docker/config.json with the helpers named there, and podman's auth.json.
// Registries on this machine's loopback are spoken to without TLS.
package oci
