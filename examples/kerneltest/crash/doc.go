// Package crash shows a host test that drives a guest: it cuts the power while
// the guest writes to an ext4 file system, boots again on the same disk, and
// looks whether everything that fsync promised is there.
//
//	MOOVM_KERNEL=$HOME/vmlinuz-6.1.0-amd64 CRASHES=50 go test -v -timeout 1h ./examples/kerneltest/crash
package crash
