// Package sandbox runs a command of this machine on an emulated host whose KVM
// works.
//
// QEMU emulates a processor with AMD SVM, a stock Linux kernel with kvm-amd
// boots on it, and its root file system is this machine's own, shown over 9P
// below an overlay: every program, library and file is there as it is, what
// the command writes is thrown away, except below the folders and to the files
// it was given to write to. Standard input and output, signals, the window size
// and the exit status pass through.
//
//	this machine                     QEMU (emulated CPU with SVM)
//	┌──────────────────┐  virtio-    ┌─────────────────────────────┐
//	│ Run              │  serial     │ init ── COMMAND             │
//	│  control channel │◀───────────▶│           └─ /dev/kvm works │
//	│  / (read-only)   │◀── 9P ─────▶│ overlay on /                │
//	│  Writable dirs   │◀── 9P ─────▶│ the same paths              │
//	│  Writable files  │◀── FUSE ───▶│ the same paths              │
//	└──────────────────┘             └─────────────────────────────┘
//
// Folders come by 9P, which QEMU serves and which knows no holes; files by
// virtio-fs, which this process serves (internal/filefs) and where a hole that
// the command makes is one here.
//
// It is slow (an emulated processor runs at a few percent of the real one) and
// it works everywhere. The sandbox is a place where KVM works, not a security
// boundary: the command sees every file that the caller may read.
package sandbox
