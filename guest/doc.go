// Package guest boots Linux guests: it takes a kernel image, picks kernel
// modules, builds the initramfs, talks to the init inside it, and ties all of it
// to a machine.
//
// The pieces are packages of their own and can be used apart:
//
//   - [kernel.LoadKernel] turns a distribution's vmlinuz (bzImage with a gzip, xz, lz4,
//     zstd, bzip2 or lzma payload) or an ELF vmlinux into the ELF image a
//     machine boots, with its release name.
//   - [kmod.OpenModules] and [kmod.Modules.Resolve] find the modules a guest needs, with
//     their dependencies, in load order.
//   - [initramfs.Archive] writes the newc archive the kernel unpacks.
//   - [guestinit.Main] is PID 1: it reads [control.InitConfig] from the archive, loads the
//     modules, mounts the root disk and then either hands over to the disk's
//     own init or runs one command and reports its exit status.
//   - [control.Host] is the host's end of the line to that init.
//   - [Boot] does all of it: a kernel, some disks, a command, a [Result].
//
// The init is the calling program itself, unless [Config].Init names another. A
// program that boots guests calls Main first thing in main, when
// [guestinit.IsInit] says so:
//
//	func main() {
//		if guestinit.IsInit() {
//			guestinit.Main() // never returns
//		}
//		…
//	}
//
// The guest is not trusted: kernel images, module files, and every byte that
// comes over the control line are parsed with bounds and cost an error at
// most.
package guest
