// Package guesttest runs Go tests as root in a real, disposable kernel.
//
// There are three ways in, and one machinery behind them:
//
//   - [Main] in TestMain: the package's tests run in a guest. The same test
//     binary is, on the host, the program that boots the machine, and in the
//     guest first the init and then the tests.
//   - `moovm test`, also as `go test -exec 'moovm test'`: packages that know
//     nothing of this one. [Run] is what it calls.
//   - [Start] in a host test: a running [Machine] to run commands in, to type
//     to, to look at the disks of, and to cut the power of. [HostMain] in
//     TestMain brings the KVM for it.
//
// A Machine can be frozen, with its disks: from the Snapshot come any number of
// twins (Fork), and it goes back to it itself (Rewind), in a fraction of a boot.
//
// # What the tests find
//
// Without a base image the guest's root file system is the host's own,
// read-only over 9P below an overlay in the guest's memory, and an empty /tmp.
// So every program, library and file is where it is on the host, dynamic test
// binaries run as they are, and nothing that the tests write is kept. With
// Config.Base the root is an overlay of its own on that disk image, and the
// module that the package belongs to appears under its own name. With
// RootInitramfs there is nothing but that. In all three, the working folder is
// the package's, /lib/modules has the kernel's modules, the environment is the
// host's, and the rest is as systemd leaves it: mounts, nodes, names, limits.
//
// Standard streams, signals and the exit status pass through. The files that a
// test binary is told to write (-test.coverprofile and the other profiles,
// -test.outputdir, -test.gocoverdir, GOCOVERDIR, -test.testlogfile) are
// written to a folder shared with the guest and copied to their places; a
// guest can put nothing else on the host. Of an output folder only _artifacts
// comes back, and that with -test.artifacts; of a coverage folder the covmeta
// and covcounters files. A file that a flag names is replaced; files whose names
// the guest chose are only made anew. No link is followed, nothing is
// executable, and a run brings at most 10 000 files and 8 GiB of data.
//
// # When things go wrong
//
// A kernel panic (exit status 126), a guest that ends early (125) or takes too
// long (124) is reported at the end of the output as a failure of the test
// that was running, with the console's last lines; -test.v is how it is known
// which one that was. An oops or a lockup fails a run that would have passed.
// An OOM kill is reported. A guest that does not reach user space is an error
// with the console's end and the usual causes.
//
// # Without KVM
//
// Where /dev/kvm is missing or cannot run a kernel, guests run on an emulated
// host (see `moovm help sandbox`), and one line on stderr says so and why. All
// test binaries of a user that run at a time share one emulated host; it ends
// when it has been idle for ten seconds. Only guests that may write to a
// folder of the host, or need more than 2 GiB, get one of their own.
package guesttest
