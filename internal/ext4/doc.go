// Package ext4 writes an ext4 file system from front to back, while the files
// arrive: contents go to the disk as they come, everything else is held in
// memory until [Writer.Finish] writes it behind them. It needs no privileges
// and no tools, and two file systems made of the same calls are equal, byte
// for byte: nothing is taken from the clock or from chance.
//
// What Linux makes of it is an ordinary file system with a journal, which can
// be written, checked and grown: directories of more than a block have an
// index, blocks of zeros are holes, attributes and nanoseconds are kept.
// Source: fs/ext4 of Linux, Documentation/filesystems/ext4.
//
// Memory is bounded by Options.MaxInodes and by the size of the disk: about
// 300 bytes an inode, its names, and 16 bytes an extent.
package ext4
