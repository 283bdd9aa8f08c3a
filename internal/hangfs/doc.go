// Package hangfs is a file that hangs on demand, for tests: reads, writes,
// fallocate and fsync of it then wait for ever, as on a server of files that
// does not answer. It is a FUSE file system of one file and needs root.
package hangfs
