package fence

import (
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"

	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"

	"github.com/moovm/moovm/internal/ratelog"
)

const (
	// DefaultMsize is the largest message size agreed on unless Config says
	// otherwise: what a Linux guest can place in a queue of 128 descriptors
	// (4096 * 125 bytes, net/9p/trans_virtio.c).
	DefaultMsize = 512000
	// MinMsize is the smallest message size accepted, as in Linux.
	MinMsize = 4096
	// DefaultFIDs is the most fids a session may hold unless Config says
	// otherwise.
	DefaultFIDs = 1 << 16

	maxMsize  = 1 << 20
	maxLost   = 1 << 16
	version9P = "9P2000.L"
)

// Config says what a session serves and within which bounds.
type Config struct {
	// Attacher is the file tree.
	Attacher p9.Attacher
	// MaxMsize bounds the message size in bytes; 0 means DefaultMsize. It is
	// brought into the range MinMsize to 1 MiB.
	MaxMsize uint32
	// MaxFIDs bounds the fids; 0 means DefaultFIDs.
	MaxFIDs int
	// Logger hears of what should not happen; nil means nobody does.
	Logger *slog.Logger
}

// withDefaults fills in what was left out.
func (c Config) withDefaults() Config {
	if c.MaxMsize == 0 {
		c.MaxMsize = DefaultMsize
	}
	c.MaxMsize = min(max(c.MaxMsize, MinMsize), maxMsize)
	if c.MaxFIDs <= 0 {
		c.MaxFIDs = DefaultFIDs
	}
	c.Logger = ratelog.New(c.Logger)
	return c
}

// Exchange is one T-message and the room for its reply. Read yields the bytes
// of the T-message, Write takes those of the reply; the session never reads or
// writes more than Submit was told there is. Done is called exactly once, when
// the reply is whole or, if nothing has been written, when none will come; the
// session does not touch the exchange after that.
type Exchange interface {
	io.Reader
	io.Writer
	Done()
}

// Session is one client of a file tree: a fenced 9P server.
//
//	       Tversion                Tversion: drain, start afresh
//	new ────────────▶ running ◀──────────┐
//	 │                 │   └─────────────┘
//	 └────▶ closed ◀───┘  Close: drain
//
// Submit and Close must be called from one goroutine at a time; Exchange
// methods are called from goroutines of the session.
type Session struct {
	cfg Config

	mu       sync.Mutex
	idle     sync.Cond // an exchange has been answered
	inflight map[uint16]*request
	fids     map[uint32]place
	stale    map[uint32]struct{}     // fids that Restore could not open again
	readers  map[uint32]ResidentFile // fids that have been read
	engine   *engine                 // nil before the first Tversion and after Close
	alone    *request                // runs alone
	waiting  int                     // locks that are asked for again
	lost     int                     // names the server keeps for nothing: of Tunlinkat that failed
	msize    uint32
}

// request is a T-message under way.
type request struct {
	message
	x        Exchange
	wire     []byte // for the server: header and body, of a Twrite only the fixed part
	body     []byte // wire without the header
	room     int    // for the reply
	off      int64  // of a Tread or Twrite
	count    int    // likewise: bytes to read, or of the data still in x
	attrs    []byte // of a Tsetattr: its body, of which wire has only the fid
	answered bool   // in place, whatever the server says
	again    retry
	flushers []*request
}

// NewSession returns a session that waits for Tversion. The caller must Close it.
func NewSession(cfg Config) *Session {
	s := &Session{
		cfg:      cfg.withDefaults(),
		inflight: make(map[uint16]*request),
		fids:     make(map[uint32]place),
		stale:    make(map[uint32]struct{}),
		readers:  make(map[uint32]ResidentFile),
	}
	s.idle.L = &s.mu
	s.msize = s.cfg.MaxMsize
	return s
}

// Msize is the message size agreed on, or the largest there may be before the
// client has asked.
func (s *Session) Msize() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.msize
}

// Submit takes in one T-message: readable bytes can be read from x, writable
// bytes written to it. It returns when the message is under way or answered,
// which may be after others have been answered, never before its bytes other
// than the payload of a Twrite have been read.
func (s *Session) Submit(x Exchange, readable, writable int) {
	var hdr [headerLen]byte
	if readable < headerLen {
		x.Done()
		return
	}
	if _, err := io.ReadFull(x, hdr[:]); err != nil {
		x.Done()
		return
	}
	r := &request{x: x, room: writable}
	r.typ, r.tag = hdr[4], binary.LittleEndian.Uint16(hdr[5:])
	if writable < rlerrorLen {
		x.Done()
		return
	}
	if err := s.admit(r, int64(binary.LittleEndian.Uint32(hdr[:])), int64(readable)); err != nil {
		s.refuse(r, err)
	}
}

// admit reads and checks r, whose header says it is size bytes long, and sets
// it under way. An error means that nothing has been.
func (s *Session) admit(r *request, size, readable int64) error {
	if size < headerLen || size > readable {
		return linux.EINVAL
	}
	if size > int64(s.Msize()) {
		return linux.EMSGSIZE
	}
	n := int(size) - headerLen
	switch {
	case r.typ == twrite:
		if n < twriteHdr {
			return linux.EINVAL
		}
		r.count = n - twriteHdr
		n = twriteHdr
	case n > maxBody:
		return linux.EMSGSIZE
	}
	r.wire = make([]byte, headerLen+n)
	r.body = r.wire[headerLen:]
	putHeader(r.wire, len(r.wire), r.typ, r.tag)
	if _, err := io.ReadFull(r.x, r.body); err != nil {
		return linux.EIO
	}

	switch r.typ {
	case tversion:
		return s.version(r)
	case tflush:
		return s.flush(r)
	case tauth:
		return linux.ENOENT // how diod says, and hears, that nobody needs to
	}
	if shapes[r.typ].body == "" {
		return linux.EOPNOTSUPP
	}
	if err := r.parse(r.body); err != nil {
		return err
	}
	if r.room < r.replyRoom() {
		return linux.EMSGSIZE
	}
	if err, dead := s.dead(r); dead {
		if err == nil {
			s.reply(r, tclunk+1, nil)
		}
		return err
	}
	if err := s.clamp(r); err != nil {
		return err
	}
	if r.typ == tread && s.readResident(r) {
		return nil
	}
	return s.start(r)
}

// clamp bounds what r asks to be sent back, and checks what it sends. The
// server gets a Tread or Twrite with the tag for an offset, by which the call it
// makes is told from others, and a Twrite without its data.
func (s *Session) clamp(r *request) error {
	switch r.typ {
	case tread, treaddir, twrite:
	case tsetattr:
		r.standIn()
		return nil
	case tgetattr:
		r.body[4+1] &^= standInBit >> 8 // in request_mask[8]: nobody has it
		return nil
	case tlock:
		pid := r.body[lockPID:]
		r.off = int64(binary.LittleEndian.Uint32(pid))
		binary.LittleEndian.PutUint32(pid, uint32(r.tag))
		return nil
	default:
		return nil
	}
	off, count := binary.LittleEndian.Uint64(r.body[4:]), binary.LittleEndian.Uint32(r.body[12:])
	if r.typ == twrite {
		if int64(count) != int64(r.count) {
			return linux.EINVAL
		}
	} else {
		count = min(count, uint32(min(r.room, int(s.Msize()))-payloadHdr))
	}
	if r.typ != treaddir {
		if off > maxFileOff-uint64(count) {
			return linux.EINVAL
		}
		r.off, r.count = int64(off), int(count)
		binary.LittleEndian.PutUint64(r.body[4:], uint64(r.tag))
	}
	if r.typ == twrite {
		count = 0
	}
	binary.LittleEndian.PutUint32(r.body[12:], count)
	return nil
}

// start waits until r may run and passes it to the server.
func (s *Session) start(r *request) error {
	s.giveUp(func(lock *request) bool { return r.conflicts(&lock.message) })
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.engine == nil {
		return linux.EPROTO // no Tversion yet
	}
	if s.inflight[r.tag] != nil {
		return linux.EBUSY
	}
	if r.typ == tunlink && s.lost >= maxLost {
		return linux.ENOMEM
	}
	for s.mustWait(r) {
		s.idle.Wait()
	}
	for i, fid := range r.fids[:r.nfids] {
		if r.changesFID(i) {
			delete(s.readers, fid)
		}
	}
	var taken bool
	if r.newFID {
		fid := r.fids[r.nfids-1]
		_, used := s.fids[fid]
		same := r.typ == twalk && r.fids[0] == fid
		switch {
		case fid == noFID, used && !same:
			return linux.EINVAL
		case !used && len(s.fids) >= s.cfg.MaxFIDs:
			return linux.ENFILE
		case !used:
			s.fids[fid] = place{} // taken back if the server says no
			taken = true
		default:
			r.newFID = false // it is there whatever the reply
		}
	}
	if !s.engine.send(r) {
		if taken {
			delete(s.fids, r.fids[r.nfids-1])
		}
		return linux.EIO
	}
	if r.alone() {
		for s.alone = r; s.alone == r; {
			s.idle.Wait()
		}
	}
	return nil
}

// mustWait reports whether r has to wait for something in flight.
func (s *Session) mustWait(r *request) bool {
	if r.alone() {
		return len(s.inflight) > s.waiting
	}
	for _, other := range s.inflight {
		if r.conflicts(&other.message) || r.sameToken(other) {
			return true
		}
	}
	return false
}

// drain waits until nothing is in flight. The session is locked.
func (s *Session) drain() {
	for len(s.inflight) > 0 {
		s.idle.Wait()
	}
}

// flush answers a Tflush when the message it is about has been answered.
// The wait cannot be circular: a message waits only for one that came before.
func (s *Session) flush(r *request) error {
	if len(r.body) < 2 {
		return linux.EINVAL
	}
	oldtag := binary.LittleEndian.Uint16(r.body)
	s.mu.Lock()
	if s.inflight[r.tag] != nil {
		s.mu.Unlock()
		return linux.EBUSY
	}
	if old := s.inflight[oldtag]; old != nil {
		old.flushers = append(old.flushers, r)
		s.inflight[r.tag] = r
		s.mu.Unlock()
		s.giveUp(func(lock *request) bool { return lock == old })
		return nil
	}
	s.mu.Unlock()
	s.reply(r, rflush, nil)
	return nil
}

// version ends the server there is and starts another.
func (s *Session) version(r *request) error {
	if len(r.body) < 6 || int(binary.LittleEndian.Uint16(r.body[4:])) > len(r.body)-6 {
		return linux.EINVAL
	}
	msize := binary.LittleEndian.Uint32(r.body)
	name := string(r.body[6 : 6+int(binary.LittleEndian.Uint16(r.body[4:]))])
	if r.room < headerLen+6+len(version9P) {
		return linux.EMSGSIZE
	}
	s.stop()
	if name != version9P && !strings.HasPrefix(name, version9P+".") {
		s.reply(r, rversion, versionBody(0, "unknown"))
		return nil
	}
	if msize < MinMsize {
		return linux.EMSGSIZE
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.msize = min(msize, s.cfg.MaxMsize)
	body := versionBody(s.msize, version9P)
	r.wire = append(r.wire[:headerLen], body...)
	putHeader(r.wire, len(r.wire), r.typ, r.tag)
	s.engine = startEngine(s)
	if !s.engine.send(r) {
		return linux.EIO
	}
	s.drain()
	return nil
}

// versionBody is the body of a Tversion or Rversion.
func versionBody(msize uint32, name string) []byte {
	b := binary.LittleEndian.AppendUint32(nil, msize)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(name)))
	return append(b, name...)
}

// stop drains and ends the server, which closes every fid.
func (s *Session) stop() {
	s.giveUp(func(*request) bool { return true })
	s.mu.Lock()
	s.drain()
	e := s.engine
	s.engine = nil
	clear(s.fids)
	clear(s.stale)
	clear(s.readers)
	s.lost = 0
	s.msize = s.cfg.MaxMsize
	s.mu.Unlock()
	if e != nil {
		e.close()
	}
}

// Close finishes what is in flight and closes every fid. It is idempotent; a
// later Tversion would start the session again.
func (s *Session) Close() error {
	s.stop()
	return nil
}

// refuse answers r, which is not in flight, with an error.
func (s *Session) refuse(r *request, err error) {
	s.reply(r, rlerror, binary.LittleEndian.AppendUint32(nil, uint32(linux.ExtractErrno(err))))
}

// reply answers r, which is not in flight, without the server.
func (s *Session) reply(r *request, typ uint8, body []byte) {
	b := make([]byte, headerLen, headerLen+len(body))
	putHeader(b, headerLen+len(body), typ, r.tag)
	b = append(b, body...)
	if len(b) <= r.room {
		r.x.Write(b)
	}
	r.x.Done()
}

// finish takes r, to which a reply of type typ has been written, out of the
// table, tells its client, and answers whoever waited for that.
func (s *Session) finish(r *request, typ uint8) {
	s.mu.Lock()
	delete(s.inflight, r.tag)
	switch {
	case r.typ == tunlink && typ == rlerror:
		s.lost++
	case r.newFID && typ == rlerror:
		delete(s.fids, r.fids[r.nfids-1])
	case r.typ == tclunk, r.typ == tremove: // the fid is gone even after an error
		if p := s.fids[r.fids[0]]; r.typ == tremove && typ != rlerror {
			s.removed(p.attach, p.path)
		}
		delete(s.fids, r.fids[0])
	case typ != rlerror:
		s.follow(r)
	}
	flushers := r.flushers
	r.flushers = nil
	s.mu.Unlock()

	// Nobody may see the session idle before the reply is out, or a reset
	// would overtake it: wake up last.
	r.x.Done()
	for _, f := range flushers {
		var hdr [headerLen]byte
		putHeader(hdr[:], headerLen, rflush, f.tag)
		f.x.Write(hdr[:])
		s.finish(f, rflush)
	}
	s.mu.Lock()
	if s.alone == r {
		s.alone = nil
	}
	s.idle.Broadcast()
	s.mu.Unlock()
}

// failed writes an Rlerror.
func (r *request) failed(err error) {
	var b [rlerrorLen]byte
	putHeader(b[:], rlerrorLen, rlerror, r.tag)
	binary.LittleEndian.PutUint32(b[headerLen:], uint32(linux.ExtractErrno(exact(err))))
	r.x.Write(b[:])
}

// abandon answers everything in flight with EIO: the server has gone.
func (s *Session) abandon() {
	s.mu.Lock()
	var left []*request
	for _, r := range s.inflight {
		if r.typ != tflush { // answered after what it waits for
			s.endWait(r)
			left = append(left, r)
		}
	}
	s.mu.Unlock()
	for _, r := range left {
		r.failed(linux.EIO)
		s.finish(r, rlerror)
	}
}

func putHeader(b []byte, size int, typ uint8, tag uint16) {
	binary.LittleEndian.PutUint32(b, uint32(size))
	b[4] = typ
	binary.LittleEndian.PutUint16(b[5:], tag)
}

// logger is the p9 library's logger: it hears every message, and of interest
// are only the handlers' panics and what goes wrong on the connection.
type logger struct {
	l    *slog.Logger
	once sync.Once
}

func (l *logger) Printf(format string, v ...any) {
	if strings.HasPrefix(format, "panic") {
		// Once is enough: a guest that can cause one can cause a million.
		l.once.Do(func() {
			l.l.Error("9P server: a request failed in an unexpected way", "detail", fmt.Sprintf(format, v...))
		})
	}
}

func (l *logger) Print(v ...any) {}
