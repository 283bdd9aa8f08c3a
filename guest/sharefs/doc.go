// Package sharefs shows a folder of the host to a guest over 9P.
//
// A file the guest refers to is a file descriptor of the host (O_PATH), and
// every step from there is one name, opened with openat2 and RESOLVE_BENEATH,
// RESOLVE_NO_SYMLINKS and RESOLVE_NO_MAGICLINKS. So the kernel keeps the guest
// inside the folder, whatever is renamed or replaced meanwhile: there is no
// path that could be checked first and used later.
//
//   - Symbolic links are contents: the guest reads them and follows them in its
//     own file tree. The host never does.
//   - FIFOs, sockets and device nodes are never opened: what a name is, is looked
//     at by O_PATH first, also by a create. Device nodes are shown
//     without number and permissions and cannot be made.
//   - Set-user-ID and set-group-ID bits are neither shown nor set, and a
//     file whose contents a guest changes loses them.
//   - Files belong to the user who runs the program; the guest sees that user
//     as root. Giving a file to somebody else is refused with EPERM.
//   - Mode and times are changed by an open descriptor. Only for what cannot be
//     opened it is by path, which a confined process is refused: then the times
//     of a symbolic link are ENOSYS.
//   - Extended attributes do not exist (EOPNOTSUPP), which tools take well.
//   - Locks of a writable share are real between guests and programs of the host
//     (open file description locks). Those of a read-only share are the guest's
//     own: each is granted, and none keeps a program of the host out.
//   - A share is read-only (EROFS) unless [Options.Writable] is set.
//
// The package needs Linux 5.8 and /proc; elsewhere New returns
// errors.ErrUnsupported.
package sharefs
