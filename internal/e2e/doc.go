// Package e2e holds the end-to-end tests: the moovm program boots stock Debian
// kernels and a real Debian on COW root disks. They need a KVM that works, a
// kernel and a base image; `make test-e2e` brings all of them, in the sandbox
// where this machine has no such KVM.
package e2e
