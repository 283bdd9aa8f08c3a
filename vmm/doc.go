// Package vmm is a small KVM machine that boots stock Linux distribution
// kernels.
//
// A machine is made by New from a Config, runs in Run until the guest switches
// it off, resets it or the context ends, and gives everything back in Close.
package vmm
