// Package host decides what depends on this machine, once for every program and
// test: where guests run (this machine's KVM or the sandbox), which kernel
// boots when none was named, and where things are kept between runs.
//
// It reads the environment ($MOOVM_KERNEL, $MOOVM_CACHE, $MOOVM_SANDBOX,
// $MOOVM_BACKING_ROOTS) at
// every call and keeps nothing.
package host
