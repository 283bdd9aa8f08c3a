// Package imagefs shows a machine's disks to its guest as a small, live,
// read-only file tree over 9P:
//
//	version                        name and version
//	disks/vda/                     one folder a disk, named as the guest names it
//	    info                       what `moovm info --json` prints
//	    format variant size sector_size backing_file mtime serial read_only
//	    header                     the raw header bytes
//	    bitmap                     the live bitmap: bit i = sector i is in the overlay
//	    map                        live extents, what `moovm map --json` prints
//	    allocated                  sectors in the overlay now
//	    stats                      counters, `name value` lines
//	    chain/0 chain/1 …          the same files for each layer, 0 = the overlay
//	disks/by-serial/NAME           a symbolic link to the disk with that serial
//
// A read after a write shows it. A text file's contents are those of the
// moment it was opened, however many reads they take; the bitmap, and a map of
// more than 1 MiB, are as of each read and never held in memory as a whole. All
// open files of a tree hold 16 MiB together, a map once for each state of the
// disk; what is opened beyond that is as of each read too. A map whose making
// finds nothing for two seconds is refused with EFBIG, and its size is that of
// what was found so far.
// stat(2) gives the size a read would find, and a modification time that moves
// when the contents do. Everything that would change something is refused with
// EROFS.
//
// A guest is told nothing about the host that its image does not say anyway:
// backing paths are shown as they are stored in the image, and of other paths
// only the last part, unless [Disk.RevealPaths] is set.
package imagefs
