// Package guestinit is PID 1 of a guest: [Main] reads the control.InitConfig of
// the initramfs, loads the modules, mounts the root disk, and then either hands
// over to the disk's own init or runs one command and reports its exit status.
//
// The init is any program that calls Main first thing in main, when [IsInit]
// says so; the one that boots guests can be its own:
//
//	func main() {
//		if guestinit.IsInit() {
//			guestinit.Main() // never returns
//		}
//		…
//	}
//
// It links nothing of the machine, so that a program that is only an init is
// small.
package guestinit
