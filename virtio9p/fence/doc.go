// Package fence puts a 9P2000.L server (github.com/hugelgupf/p9) behind a
// framer that trusts its client with nothing, so that a hostile guest or a
// stranger on a socket can neither crash, hang nor bloat the host.
//
// A [Session] is one client. Every T-message goes through Submit, which reads
// it into private memory, checks it field by field, and only then lets the
// server see it; every R-message is matched by its tag to the exchange it
// answers and bounded by the room that exchange has. [Serve] does the same for
// the connections of a listener.
//
// What the framer keeps from the server, and why (p9 v0.4.1):
//
//   - A Tflush of its own tag, or two of each other, would wait for ever. The
//     framer answers Tflush itself, after the reply to the old message.
//   - A second message with a tag in flight would never be answered: refused.
//   - A malformed message would be answered with NOTAG, or end the session:
//     lengths, strings and counts are checked first, and answered with Rlerror.
//   - A Tread or Treaddir for more than msize would panic or overrun the
//     reply: counts are clamped to the message size and the room for the reply.
//   - Tversion in mid-session races with requests and keeps the fids: the
//     framer drains, starts a fresh server, and then forwards it.
//   - Anything before Tversion would meet a server without buffers: refused.
//   - Two Tlopen of one fid at once would both open the file; messages that
//     change a fid wait until no other message uses it.
//   - A rename while a fid of the same file is clunked can lock the server up:
//     renames and removals run alone.
//   - Fids and names are unbounded: at most MaxFIDs fids, 16 names a walk,
//     255 bytes a name. A fid in use is not silently replaced.
//   - Extended attributes share one File among fids, take unbounded memory and
//     answer EINVAL: they are answered with EOPNOTSUPP, as by a file system
//     without them. Protocol extensions (9P2000.L.Google.N) are not offered.
//   - A Tunlinkat that fails leaves its name in the server's memory: after 65536
//     of them in a session, the next is refused with ENOMEM.
//   - Contents would be copied twice on their way, wiped once and, when written,
//     newly allocated for: between a [VectorFile] and a [Spans] exchange they go
//     straight. The server still decides whether a fid may be read or written;
//     of a Tread or Twrite it is given the tag for an offset, and no data.
//     A [ResidentFile] it has let be read is read without it from then on.
//   - Files without an iounit would be read and written by msize - 24 bytes,
//     across the borders of pages: they get the whole pages of a message.
//   - Attributes of a file whose name has gone could not be set (EINVAL): a
//     Tgetattr stands in for a Tsetattr, whose SetAttr the file then gets, also at
//     the same time as other calls. A rename of one link of a file to another does nothing,
//     and the server would take the file for removed: it is not told.
//   - A lock that somebody else has would be asked for again by Linux after 30
//     seconds only: the session asks the file, until it is granted, or the client
//     flushes the request or closes the fid. At most 8 locks wait so.
//   - EPERM would become EACCES and ENOTEMPTY EEXIST: errors keep their number.
//
// Known and not fenced off: until the next Tversion a session keeps some 200
// bytes for each file that was walked to and is still there, and for each that
// was removed while a fid referred to it; and a file that has been removed
// cannot be opened once more by a fid that is left (EINVAL).
package fence
