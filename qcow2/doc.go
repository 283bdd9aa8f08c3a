// Package qcow2 reads qcow2 disk images (QEMU, docs/interop/qcow2.txt): an [Image] is the contents of the disk as an io.ReaderAt, over a
// file that is an io.ReaderAt, too. It never writes.
//
// Versions 2 and 3, all cluster sizes that QEMU has (512 bytes to 2 MiB), clusters compressed by zlib and zstd, zero clusters and extended
// L2 entries (subclusters) are read. Of an image with internal snapshots the active state is read. A backing file is never followed by its
// name: whoever trusts it opens it and passes it as [Options].Backing; [ReadHeader] tells the name.
//
// Refused are encryption (ErrEncrypted), data in another file (ErrExternalData), features that are not known here (ErrFeature), and images
// that QEMU marked as dirty (ErrDirty) or corrupt (ErrMarked): of these nobody knows what they contain until qemu-img check -r all has
// mended them.
//
// # Trust
//
// An image is input. Every offset, size and table is checked before use. Opening one reads its first cluster (at most 2 MiB) and as much of
// the L1 table as its disk needs (at most 32 MiB, QEMU's limit); tables and decompressed clusters are kept within the bounds of [Options].
// Up to eight clusters are decompressed at the same time, each from at most twice its size. What a read does is bounded by its
// length. Images may show the same cluster many times, or their own tables as data; that is of no harm.
//
// # Speed
//
// Reads of clusters that are not compressed take no lock and allocate nothing once the tables are known; neighbours in the file are read at once. A large
// read of compressed clusters uses several processors.
package qcow2
