// Package guest is everything that runs in, or is shown to, a guest: it loads
// the kernel image, picks kernel modules, builds the initramfs, is the init
// inside it, talks to that init over a serial line, and ties all of it to a
// machine.
//
// The pieces can be used apart:
//
//   - [kernel.LoadKernel] turns a distribution's vmlinuz (bzImage with a gzip, xz, lz4,
//     zstd, bzip2 or lzma payload) or an ELF vmlinux into the ELF image a
//     machine boots, with its release name.
//   - [kmod.OpenModules] and [kmod.Modules.Resolve] find the modules a guest needs, with
//     their dependencies, in load order.
//   - [initramfs.Archive] writes the newc archive the kernel unpacks.
//   - [InitMain] is PID 1: it reads [control.InitConfig] from the archive, loads the
//     modules, mounts the root disk and then either hands over to the disk's
//     own init or runs one command and reports its exit status.
//   - [control.Host] is the host's end of the line to that init.
//   - [Boot] does all of it: a kernel, some disks, a command, a [Result].
//
// The init is the calling program itself. A program that boots guests calls
// InitMain first thing in main, when [IsInit] says so:
//
//	func main() {
//		if guest.IsInit() {
//			guest.InitMain() // never returns
//		}
//		…
//	}
//
// The guest is not trusted: kernel images, module files, and every byte that
// comes over the control line are parsed with bounds and cost an error at
// most.
package guest
