// Package kvm wraps the KVM ioctls of an x86-64 Linux host.
//
// It uses the structures and request encoding of github.com/bobuhiro11/gokvm's
// kvm package where they are right and adds what that package lacks (irqfd,
// ioeventfd, MSI, FPU) or gets wrong: pointers stay pointers until the system
// call (a uintptr goes stale when a stack moves), routing entries are the
// kernel's 48 bytes, the identity map address is 64 bits wide, and the error
// of KVM_RUN is reported.
//
// The objects are System (/dev/kvm), VM and VCPU. Each owns its file
// descriptor; Close releases it. The reference is Documentation/virt/kvm/api.rst
// of the Linux kernel.
package kvm
