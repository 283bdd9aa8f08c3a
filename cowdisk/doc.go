// Package cowdisk is a copy-on-write disk object: a sparse overlay file on top of a read-only backing file, in the "MOOO" image formats of
// User Mode Linux and of QEMU's historical cow driver.
//
// An image is a header, a bitmap (one bit per 512-byte sector, least significant bit first; 1 = the sector's data is in this file) and a
// data area. A sector whose bit is clear is read from the backing file, which may itself be such an image; without a backing file it reads
// as zeros. Six layouts of the same idea exist; [Variant] names them.
//
// # Durability
//
// A bit on disk before its data would break the promise that a sector is old or new, never something else. So a new bit lives in memory
// until the data it covers has been synced; then the bitmap is written, and synced. One [Disk.Flush] costs exactly two fdatasync when
// sectors were allocated since the last one, one when only allocated sectors were overwritten, and none when nothing was written. One pass
// serves every flush waiting at the time. When a sync fails, its bits are not written and every later Flush reports the failure.
//
// [Disk.SharePending] keeps the bits that wait for a flush in memory that outlives the process, too, so that a server that is killed loses
// no completed write.
//
// # Concurrency
//
// A [Disk] may be used by any number of goroutines. Reads take no lock. Writes to allocated sectors take none either; first writes lock
// the 4 KiB units they allocate, so that two writers in one unit cannot undo each other's copy-up.
//
// # Tools
//
// [Check], [Commit], [Rebase], [RebaseHeader], [Flatten], [Resize] and [Compare] work on closed images. Each of them can be killed, or lose
// power, at any moment: the image opens with its contents, and running the tool again completes the work. [Disk.Snapshot] freezes a
// running disk and goes on in a new overlay.
//
// Each tool holds the locks of all that it reads and writes until it is done. One that replaces an image by another file holds the locks of
// both, and whoever takes a lock looks again whether the name still leads to the file that he locked.
//
// # A base that changed
//
// A header has the modification time of the backing file in whole seconds; an overlay whose base has another one is stale, and refused.
// [Commit] keeps to this through a loss of power: before the base's contents change its time is in a later second than the one that
// overlays know, on disk; the time that the committed overlay records is on disk before it is recorded. What whole seconds cannot show:
//   - that another program wrote to the base within the second in which the overlay was made or the base last changed before;
//   - that a program set the old time again after writing (cp -p, rsync -t, tar);
//   - anything where the header has 0, which means unknown: the base's time was 0 (1 January 1970, as reproducible builds make it), it is
//     a block device, or a tool was interrupted.
//
// # Damage
//
// Every program that writes these formats writes the data of a sector before its bit, or makes the file as long as the disk at once. So a
// bit whose data would lie beyond the end of the file says that the file lost its end: the disk was full, or a copy was cut short. UML and
// QEMU read zeros there. [Open] refuses (ErrDamaged), for the image and all that lies below it, unless [Options].AllowDamage is set or it
// only looks (ReadOnly and NoLock); then they are zeros here, too. [Commit], [Rebase], [Flatten] and [Resize] also refuse bits beyond the
// end of the disk and a bitmap that cannot be read, before they change anything; Rebase and Flatten a backing file that somebody wrote to
// without a lock while they read it. [Check] says what is wrong.
//
// # Limits
//
// UML's versions 1 and 2 have no bit for up to seven last sectors of a disk whose size is no multiple of 4096; these cannot be written
// (ErrNoBit). Resize writes the image anew, so it needs room for what is allocated. In the v2 layout the data area begins at a multiple of
// 4096 only if the disk's size in MiB leaves a remainder of 10 or 11 when divided by 16; otherwise it begins in the middle of a page, which
// makes writes of 4 KiB about a third slower. v3 images always begin it at a page.
//
// # Raw or COW
//
// A guest may write anything into its raw disk, also the header of a COW image that names another file of the host. So a file's own bytes
// never decide that it is an image. An overlay records whether its backing file is raw or COW when it is made: eight
// bytes behind the NUL of the path, moovmRAW or moovmCOW, where UML and QEMU do not look. When another program writes its own path over
// ours, the mark is not behind the new NUL any more, and is void.
//
// A file that the caller names without a format ([Options].Format, [CreateOptions].BackingFormat, [ToolOptions].OtherFormat) is looked at;
// one that begins like an image is refused (ErrFormat), with or without a backing file, and so are containers and archives (ErrForeign). The backing
// file of an image without a mark, made by another program or an older version of this one, is raw; where it begins like an image it is
// refused until RebaseHeader has recorded what it is, because it may be either. [Open], and the tools that work on an image alone, always
// take the file they are given for an image: do not give them a guest's raw disk. The mark in a file's own header says nothing about that
// file, since a guest can write it, too.
//
// # Trust
//
// An image file is input. Its fields are checked before use, memory is bounded by [Options].BitmapMemory whatever the header says, and the
// backing path in it is followed only below the image's own folder or a folder named in [Options].BackingRoots. It is followed step by step:
// what lies elsewhere is not even looked at, because that may mount something, or tell what exists. Symlinks that lie elsewhere count only
// where they lie on a way that the caller named himself.
package cowdisk
