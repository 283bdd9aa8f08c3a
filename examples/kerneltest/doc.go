// Package kerneltest shows tests that need a real kernel and root: file
// systems, loop devices, namespaces, sysctls, modules. Their TestMain runs
// them in a guest, so that nothing of this machine is touched and no rights
// are needed.
//
//	MOOVM_KERNEL=$HOME/vmlinuz-6.1.0-amd64 go test -v ./examples/kerneltest/...
//
// The package crash beside it cuts a guest's power, again and again.
package kerneltest
