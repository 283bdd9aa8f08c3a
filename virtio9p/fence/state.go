package fence

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/hugelgupf/p9/linux"
)

// State is a session as plain data: its fids by where they lead, for a session
// of another server to open again by name. File names are bytes.
type State struct {
	// Msize is what was agreed on; 0 means that there was no Tversion yet.
	Msize uint32
	FIDs  []FIDState `json:",omitempty"`
}

// FIDState is one fid.
type FIDState struct {
	FID    uint32
	Attach []byte `json:",omitempty"` // the name attached to
	Path   []byte `json:",omitempty"` // from there, names separated by slashes
	QID    [qidLen]byte
	// Open is set once the fid is open, with Flags.
	Open  bool   `json:",omitempty"`
	Flags uint32 `json:",omitempty"`
	// Lost says that no name leads there any more.
	Lost bool `json:",omitempty"`
}

// ErrState says that a state makes no sense.
var ErrState = errors.New("9P server: the state of a session makes no sense")

// place is where a fid leads.
type place struct {
	attach, path string
	open         bool
	flags        uint32
	lost         bool
}

// Flags of Tlopen and Tlcreate (Linux include/net/9p/9p.h): those that have an
// effect once, which opening a file again must not have.
const onceFlags = 0o100 | 0o200 | 0o1000 // O_CREAT, O_EXCL, O_TRUNC

// fields takes apart what a checked message has behind its fids.
type fields []byte

func (b *fields) skip(n int) { *b = (*b)[n:] }

func (b *fields) u32() uint32 {
	v := binary.LittleEndian.Uint32(*b)
	b.skip(4)
	return v
}

func (b *fields) str() string {
	n := 2 + int(binary.LittleEndian.Uint16(*b))
	s := string((*b)[2:n])
	b.skip(n)
	return s
}

// under is the path of name in the folder p.
func under(p, name string) string {
	if p == "" {
		return name
	}
	return p + "/" + name
}

// follow notes where fids lead after r, which has succeeded; s is locked.
func (s *Session) follow(r *request) {
	b := fields(r.body)
	switch r.typ {
	case tattach:
		b.skip(8)
		b.str() // uname
		s.fids[r.fids[0]] = place{attach: b.str()}
	case twalk:
		b.skip(8)
		p, ok := s.fids[r.fids[0]]
		if !ok {
			return
		}
		to := place{attach: p.attach, path: p.path, lost: p.lost}
		b.skip(2)
		for range r.names {
			to.path = under(to.path, b.str())
		}
		s.fids[r.fids[1]] = to
	case tlopen:
		b.skip(4)
		s.opened(r.fids[0], "", b.u32())
	case tlcreate:
		b.skip(4)
		name := b.str()
		s.opened(r.fids[0], name, b.u32())
	case trename:
		b.skip(8)
		from, to := s.fids[r.fids[0]], s.fids[r.fids[1]]
		s.moved(from.attach, from.path, under(to.path, b.str()))
	case trenamat:
		b.skip(4)
		from, old := s.fids[r.fids[0]], b.str()
		b.skip(4)
		s.moved(from.attach, under(from.path, old), under(s.fids[r.fids[1]].path, b.str()))
	case tunlink:
		b.skip(4)
		dir := s.fids[r.fids[0]]
		s.removed(dir.attach, under(dir.path, b.str()))
	}
}

// opened notes that fid is open, and that it has gone down to name if there is
// one. A fid that is not known any more was clunked meanwhile.
func (s *Session) opened(fid uint32, name string, flags uint32) {
	if p, ok := s.fids[fid]; ok {
		if name != "" {
			p.path = under(p.path, name)
		}
		p.open, p.flags = true, flags&^onceFlags
		s.fids[fid] = p
	}
}

// beneath reports whether a path is at or below another.
func beneath(path, top string) bool {
	return path == top || strings.HasPrefix(path, top+"/")
}

// moved notes that what was at one path is at another now, and that what was
// there is gone.
func (s *Session) moved(attach, from, to string) {
	if from == to {
		return
	}
	for fid, p := range s.fids {
		switch {
		case p.attach != attach || p.lost:
		case beneath(p.path, from):
			p.path = to + p.path[len(from):]
			s.fids[fid] = p
		case beneath(p.path, to):
			p.lost = true
			s.fids[fid] = p
		}
	}
}

// removed notes that a path leads nowhere any more.
func (s *Session) removed(attach, path string) {
	for fid, p := range s.fids {
		if p.attach == attach && beneath(p.path, path) && !p.lost {
			p.lost = true
			s.fids[fid] = p
		}
	}
}

// State waits for what is in flight, locks that wait are given up, and returns
// where the session's fids lead. The session goes on. Submit must not be
// called meanwhile.
func (s *Session) State() (State, error) {
	s.Drain()
	s.mu.Lock()
	started := s.engine != nil
	st := State{Msize: s.msize}
	for fid, p := range s.fids {
		st.FIDs = append(st.FIDs, FIDState{FID: fid, Attach: []byte(p.attach), Path: []byte(p.path), Open: p.open, Flags: p.flags, Lost: p.lost})
	}
	for fid := range s.stale {
		st.FIDs = append(st.FIDs, FIDState{FID: fid, Lost: true})
	}
	s.mu.Unlock()
	if !started {
		return State{}, nil
	}
	slices.SortFunc(st.FIDs, func(a, b FIDState) int { return int(int64(a.FID) - int64(b.FID)) })
	for i := range st.FIDs {
		f := &st.FIDs[i]
		if f.Lost {
			continue
		}
		const qidAt = 8 // behind valid[8]
		body, err := s.ask(tgetattr, headerLen+153, binary.LittleEndian.AppendUint64(u32s(f.FID), 0x7ff))
		if err != nil || len(body) < qidAt+qidLen {
			f.Lost = true
			continue
		}
		f.QID = [qidLen]byte(body[qidAt:])
	}
	return st, nil
}

// Drain finishes what is in flight, and gives up locks that wait. Submit must
// not be called meanwhile.
func (s *Session) Drain() {
	s.giveUp(func(*request) bool { return true })
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drain()
}

// Restore brings a fresh session to a state: it opens every fid again by its
// name. One that no name leads to, that leads to another file now, or that
// cannot be opened any more answers ESTALE until it is clunked; how many of
// them there are is returned. The error is ErrState for a state that cannot be.
func (s *Session) Restore(st State) (stale int, err error) {
	if err := st.check(s.cfg); err != nil || st.Msize == 0 {
		return 0, err
	}
	if _, err := s.ask(tversion, headerLen+6+len(version9P), versionBody(st.Msize, version9P)); err != nil {
		return 0, fmt.Errorf("%w: message size %d: %w", ErrState, st.Msize, err)
	}
	for _, f := range st.FIDs {
		if f.Lost || !s.reopen(f) {
			s.mu.Lock()
			s.stale[f.FID] = struct{}{}
			s.mu.Unlock()
			stale++
		}
	}
	if stale > 0 {
		s.cfg.Logger.Warn("9P server: files that were open are gone or are other files now", "fids", stale)
	}
	return stale, nil
}

func (st *State) check(cfg Config) error {
	seen := map[uint32]bool{}
	for _, f := range st.FIDs {
		switch {
		case f.FID == noFID || seen[f.FID]:
			return fmt.Errorf("%w: fid %d", ErrState, f.FID)
		case len(f.Path) > 64<<10 || len(f.Attach) > maxString:
			return fmt.Errorf("%w: the path of fid %d is too long", ErrState, f.FID)
		}
		seen[f.FID] = true
	}
	if len(st.FIDs) > cfg.MaxFIDs || len(st.FIDs) > 0 && st.Msize == 0 {
		return fmt.Errorf("%w: %d fids", ErrState, len(st.FIDs))
	}
	return nil
}

// reopen makes f by the way a client would go.
func (s *Session) reopen(f FIDState) bool {
	var names []string
	if len(f.Path) > 0 {
		names = strings.Split(string(f.Path), "/")
	}
	attach := slices.Concat(u32s(f.FID, noFID), u16str(""), u16str(string(f.Attach)), u32s(noFID))
	qid, err := s.ask(tattach, headerLen+qidLen, attach)
	if err != nil || len(qid) != qidLen {
		return false
	}
	undo := func() bool {
		s.ask(tclunk, rlerrorLen, u32s(f.FID))
		return false
	}
	for part := range slices.Chunk(names, maxNames) {
		walk := binary.LittleEndian.AppendUint16(u32s(f.FID, f.FID), uint16(len(part)))
		for _, n := range part {
			if n == "" || len(n) > maxName {
				return undo()
			}
			walk = append(walk, u16str(n)...)
		}
		body, err := s.ask(twalk, headerLen+2+maxNames*qidLen, walk)
		if err != nil || len(body) != 2+len(part)*qidLen {
			return undo()
		}
		qid = body[len(body)-qidLen:]
	}
	// The version in the middle of a QID changes with the contents.
	if qid[0] != f.QID[0] || string(qid[5:]) != string(f.QID[5:]) {
		return undo()
	}
	if f.Open {
		if _, err := s.ask(tlopen, headerLen+qidLen+4, u32s(f.FID, f.Flags&^onceFlags)); err != nil {
			return undo()
		}
	}
	return true
}

// dead answers a message about a fid that Restore could not open again; false
// if it is about none.
func (s *Session) dead(r *request) (err error, dead bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.stale) == 0 {
		return nil, false
	}
	for i, fid := range r.fids[:r.nfids] {
		if _, ok := s.stale[fid]; !ok {
			continue
		}
		if r.newFID && i == r.nfids-1 {
			return linux.EINVAL, true // it is in use
		}
		if r.typ == tclunk || r.typ == tremove {
			delete(s.stale, fid)
		}
		if r.typ == tclunk {
			return nil, true
		}
		return linux.ESTALE, true
	}
	return nil, false
}

// asked is an exchange of the session with itself.
type asked struct {
	msg, reply []byte
	done       chan struct{}
}

func (a *asked) Read(p []byte) (int, error) {
	n := copy(p, a.msg)
	a.msg = a.msg[n:]
	return n, nil
}

func (a *asked) Write(p []byte) (int, error) {
	a.reply = append(a.reply, p...)
	return len(p), nil
}

func (a *asked) Done() { close(a.done) }

// ask sends a message and returns the body of its reply. Nothing may be in
// flight.
func (s *Session) ask(typ uint8, room int, body []byte) ([]byte, error) {
	const tag = 0xfffe
	msg := make([]byte, headerLen, headerLen+len(body))
	putHeader(msg, headerLen+len(body), typ, tag)
	a := &asked{msg: append(msg, body...), done: make(chan struct{})}
	s.Submit(a, len(a.msg), max(room, rlerrorLen))
	<-a.done
	switch {
	case len(a.reply) < headerLen:
		return nil, linux.EIO
	case a.reply[4] == rlerror:
		return nil, linux.EIO
	}
	return a.reply[headerLen:], nil
}

func u32s(v ...uint32) (b []byte) {
	for _, x := range v {
		b = binary.LittleEndian.AppendUint32(b, x)
	}
	return b
}

func u16str(s string) []byte {
	return append(binary.LittleEndian.AppendUint16(nil, uint16(len(s))), s...)
}
