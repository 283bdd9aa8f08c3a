// Package confine takes from a running process what it no longer needs, so
// that a guest that breaks out of its machine into the process finds little to
// do there.
//
// Three mechanisms of Linux, each for all threads, each kept until the process
// ends:
//
//   - no_new_privs: nothing it could execute gains privileges.
//   - Landlock: no file of the system can be opened, but those below the
//     folders it still needs, with the rights it needs there; no TCP
//     connections either.
//   - A seccomp filter: no new programs or processes, no new sockets, no
//     tracing, no mounting, no memory that is writable and then executable;
//     of ioctl only those of KVM and of terminals. What is not allowed fails
//     with EPERM, so the process can say so and go on.
//
// What is open already stays usable: disks and their backing files, /dev/kvm,
// the terminal, sockets that listen.
package confine
