package qcow2

import "sync/atomic"

// ways is how many entries share a set of a cache: they replace each other in turn.
const ways = 4

// cached is an entry of a cache. It does not change.
type cached[T any] struct {
	key int64
	val []T
}

// cache keeps what was read last. Finding something takes no lock and allocates nothing; its memory is bounded by its number of slots.
type cache[T any] struct {
	slots []atomic.Pointer[cached[T]]
	next  []atomic.Uint32 // which slot of a set is replaced next
}

// newCache makes a cache of at most bytes bytes (but for four entries) for things of unit bytes, of which there are count.
func newCache[T any](bytes, unit, count int64) *cache[T] {
	sets := int64(1)
	for sets*2*ways*unit <= bytes && sets*ways < count {
		sets *= 2
	}
	return &cache[T]{slots: make([]atomic.Pointer[cached[T]], sets*ways), next: make([]atomic.Uint32, sets)}
}

func (c *cache[T]) set(key int64) int { return int(key & int64(len(c.next)-1)) }

// get finds the entry of key; nil = it is not there.
func (c *cache[T]) get(key int64) []T {
	set := c.set(key)
	for i := range ways {
		if e := c.slots[set*ways+i].Load(); e != nil && e.key == key {
			return e.val
		}
	}
	return nil
}

func (c *cache[T]) put(key int64, val []T) {
	set := c.set(key)
	c.slots[set*ways+int(c.next[set].Add(1)%ways)].Store(&cached[T]{key, val})
}

func (c *cache[T]) drop() {
	for i := range c.slots {
		c.slots[i].Store(nil)
	}
}
