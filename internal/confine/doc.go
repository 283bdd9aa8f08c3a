// Package confine takes from a running process what it no longer needs, so
// that a guest that breaks out of its machine into the process finds little to
// do there.
//
// Five mechanisms of Linux, each for all threads, each kept until the process
// ends:
//
//   - no_new_privs: nothing it could execute gains privileges.
//
//   - Landlock: no file of the system can be opened, but those below the
//     folders it still needs, with the rights it needs there; no TCP
//     connections either.
//
//   - A seccomp filter: no new programs or processes, no new sockets, no
//     tracing, no mounting, no memory that is writable and then executable;
//     of ioctl only what internal/kvm and terminals need, by value, of fcntl only what signals
//     nobody; mode and times of a file only by descriptor; no stat by path.
//     What is not allowed fails with EPERM, so the process can say so and go on.
//
//   - Capabilities: a root process keeps those that its folders need.
//
//   - A root folder with nothing in it but the folders it needs and its own
//     /proc, where the process may mount (root) and / is none of them.
//
// Descriptors that were inherited (they do not close on exec) are closed.
//
// Without that root, what stays possible with folders: to learn by open(2) with O_PATH, which
// Landlock does not restrict, whether a file exists, and its attributes; and by
// readlink where a link points.
//
// What is open already stays usable: disks and their backing files, /dev/kvm,
// the terminal, sockets that listen.
package confine
