// Package debian fetches stock Debian kernels by name, with this machine's apt,
// which verifies them, and unpacks them into a cache without installing them.
//
// "current" is the kernel of this machine's own suite; a series such as 6.1 or
// 6.12-cloud that of the suite which has it, from the same mirror. The cache's
// layout is CACHE/kernel/RELEASE/{boot,lib/modules}, with a link of the name to
// it. No privileges are needed.
package debian
