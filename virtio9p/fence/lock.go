package fence

import (
	"time"

	"github.com/hugelgupf/p9/p9"
)

const (
	// lockBlock is P9_LOCK_FLAGS_BLOCK: the client wants to wait.
	lockBlock = 1
	// lockPID is where in the body of a Tlock proc_id[4] is.
	lockPID = 4 + 1 + 4 + 8 + 8
	// maxWaiting bounds the locks of a session that are waited for: each takes
	// room in the queue that the others need.
	maxWaiting = 8

	firstRetry = 5 * time.Millisecond
	lastRetry  = 200 * time.Millisecond
)

// retry is what becomes of a Tlock that met another's lock. Linux asks again
// only 30 seconds after an Rlock that says so (P9_LOCK_TIMEOUT, fs/9p/vfs_file.c),
// so the session asks the file instead, until the lock is granted or something
// else is more important.
//
//	in the server ──blocked──▶ waiting ──time──▶ in the server
//	                              └──giveUp──▶ answered: blocked
type retry struct {
	blocked bool // what the file has just said
	waiting bool // not in the server now
	given   bool // up: the next answer counts
	delay   time.Duration
	timer   *time.Timer
}

// Lock asks the file for the lock that the request with tag token is about.
func (f exactFile) Lock(token int, typ p9.LockType, flags p9.LockFlags, start, length uint64, client string) (p9.LockStatus, error) {
	r := f.s.asked(int64(token))
	if r == nil || r.typ != tlock {
		return p9.LockStatusError, nil
	}
	status, err := f.File.Lock(int(r.off), typ, flags, start, length, client)
	f.s.mu.Lock()
	r.again.blocked = err == nil && status == p9.LockStatusBlocked && flags&lockBlock != 0
	f.s.mu.Unlock()
	return status, exact(err)
}

// waits takes r back from the server if its lock is to be waited for; if not,
// the reply is for the client.
func (s *Session) waits(r *request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := &r.again
	if !a.blocked || a.given || s.waiting >= maxWaiting {
		return false
	}
	a.delay = min(max(2*a.delay, firstRetry), lastRetry)
	a.blocked, a.waiting = false, true
	a.timer = time.AfterFunc(a.delay, func() { s.askAgain(r) })
	s.waiting++
	s.idle.Broadcast()
	return true
}

// askAgain passes r to the server once more.
func (s *Session) askAgain(r *request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !r.again.waiting:
	case s.alone != nil:
		r.again.timer.Reset(r.again.delay)
	case s.engine != nil && s.engine.send(r):
		s.endWait(r)
	}
	// A server that has gone leaves r to abandon.
}

// endWait makes r one that does not wait. The session is locked.
func (s *Session) endWait(r *request) {
	if r.again.waiting {
		r.again.timer.Stop()
		r.again.waiting = false
		s.waiting--
	}
}

// giveUp answers the locks that are waited for, if which says so, with what the
// file said last.
func (s *Session) giveUp(which func(lock *request) bool) {
	s.mu.Lock()
	var left []*request
	for _, r := range s.inflight {
		if r.typ != tlock || !which(r) {
			continue
		}
		r.again.given = true
		if r.again.waiting {
			s.endWait(r)
			left = append(left, r)
		}
	}
	s.mu.Unlock()
	for _, r := range left {
		var b [headerLen + 1]byte
		putHeader(b[:], len(b), rlock, r.tag)
		b[headerLen] = uint8(p9.LockStatusBlocked)
		r.x.Write(b[:])
		s.finish(r, rlock)
	}
}
