package fence

import (
	"testing"

	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"

	"github.com/moovm/moovm/virtio9p/virtio9ptest/wire"
)

// lock is a Tlock of fid 1.
func lock(tag uint16, flags uint32) []byte {
	return wire.Msg(wire.Tlock, tag, uint32(1), uint8(p9.WriteLock), flags, uint64(0), uint64(0), uint32(42), "guest")
}

// lockSession has fid 1 open, and a lock of it that has been asked for twice.
func lockSession(t *testing.T) (*fakeFS, *Session, *call) {
	fs := newFakeFS()
	s := attached(t, fs, Config{})
	roundTrip(t, s, wire.Walk(1, 0, 1, "f"), 0)
	roundTrip(t, s, wire.Open(1, 1, 0), 0)
	c := submit(t, s, lock(5, lockBlock), 4096)
	<-fs.locking
	<-fs.locking
	return fs, s, c
}

func status(t *testing.T, c *call, want p9.LockStatus) {
	t.Helper()
	if r := c.wait(); r.Type != rlock || len(r.Body) != 1 || r.Body[0] != uint8(want) {
		t.Errorf("reply %+v, want %v", r, want)
	}
}

// A lock that somebody else has is waited for; meanwhile everything else goes on.
func TestLockWaits(t *testing.T) {
	fs, s, c := lockSession(t)
	roundTrip(t, s, wire.Getattr(1, 1), 0)
	roundTrip(t, s, wire.Msg(tunlink, 1, uint32(0), "fgone", uint32(0)), 0)
	roundTrip(t, s, lock(5, lockBlock), linux.EBUSY) // the tag is in use
	select {
	case <-c.done:
		t.Fatal("answered while somebody else has the lock")
	default:
	}
	fs.free.Store(true)
	status(t, c, p9.LockStatusOK)
}

// Who does not want to wait is told at once.
func TestLockNoWait(t *testing.T) {
	_, s, c := lockSession(t)
	status(t, submit(t, s, lock(6, 0), 4096), p9.LockStatusBlocked)
	s.Close()
	status(t, c, p9.LockStatusBlocked)
}

// Whatever cannot wait for a lock ends the waiting.
func TestLockGivenUp(t *testing.T) {
	for name, f := range map[string]func(s *Session){
		"flush":   func(s *Session) { roundTrip(t, s, wire.Flush(6, 5), 0) },
		"clunk":   func(s *Session) { roundTrip(t, s, wire.Clunk(6, 1), 0) },
		"version": func(s *Session) { roundTrip(t, s, wire.Version(8192), 0) },
		"close":   func(s *Session) { s.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			_, s, c := lockSession(t)
			f(s)
			status(t, c, p9.LockStatusBlocked)
			if s.waiting != 0 {
				t.Errorf("%d locks are waited for", s.waiting)
			}
		})
	}
}

// Locks that are waited for leave room for other messages.
func TestLockLimit(t *testing.T) {
	_, s, c := lockSession(t)
	calls := []*call{c}
	for tag := uint16(6); len(calls) < maxWaiting; tag++ {
		calls = append(calls, submit(t, s, lock(tag, lockBlock), 4096))
	}
	// One of them is now and then in the server, and makes room for another.
	for tag := uint16(100); tag < 200; tag++ {
		calls = append(calls, submit(t, s, lock(tag, lockBlock), 4096))
	}
	s.mu.Lock()
	n := s.waiting
	s.mu.Unlock()
	if n > maxWaiting {
		t.Errorf("%d locks are waited for", n)
	}
	s.Close()
	for _, c := range calls {
		status(t, c, p9.LockStatusBlocked)
	}
}
