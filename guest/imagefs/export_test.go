package imagefs

import "time"

// Held is how many bytes the open files of t hold.
func Held(t *Tree) int64 { return t.held.Load() }

// SetMaxWalk bounds how long t makes a piece of a map.
func SetMaxWalk(t *Tree, d time.Duration) { t.maxWalk = d }
