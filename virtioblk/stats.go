package virtioblk

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// Stats are a device's counters since it was built.
type Stats struct {
	Reads       uint64 `json:"reads"`
	Writes      uint64 `json:"writes"`
	Flushes     uint64 `json:"flushes"`
	Discards    uint64 `json:"discards"`
	WriteZeroes uint64 `json:"write_zeroes"`

	ReadBytes        uint64 `json:"read_bytes"`
	WriteBytes       uint64 `json:"write_bytes"`
	DiscardBytes     uint64 `json:"discard_bytes"`
	WriteZeroesBytes uint64 `json:"write_zeroes_bytes"`

	Errors   uint64 `json:"errors"`    // requests that ended with IOERR or UNSUPP
	InFlight uint64 `json:"in_flight"` // requests being handled right now

	// Latency counts all requests by how long they were handled: bucket i
	// holds those below 2^i microseconds that bucket i-1 does not; the last
	// bucket holds the rest.
	Latency [LatencyBuckets]uint64 `json:"latency"`
}

// LatencyBuckets is the number of buckets in Stats.Latency: the last but one
// ends at about 4 seconds.
const LatencyBuckets = 24

// kind is what a request costs and counts as.
type kind uint8

const (
	kindOther kind = iota
	kindRead
	kindWrite
	kindFlush
	kindDiscard
	kindWriteZeroes
	numKinds
)

// counters are the statistics of one queue: no two queues share a cache line,
// except where the allocator puts the first and last words.
type counters struct {
	_       [64]byte
	ops     [numKinds]atomic.Uint64
	bytes   [numKinds]atomic.Uint64
	errors  atomic.Uint64
	started atomic.Uint64
	ended   atomic.Uint64
	latency [LatencyBuckets]atomic.Uint64
	_       [64]byte
}

func (c *counters) done(k kind, n int64, ok bool, took time.Duration) {
	if ok {
		c.ops[k].Add(1)
		c.bytes[k].Add(uint64(n))
	} else {
		c.errors.Add(1)
	}
	b := bits.Len64(uint64(max(took, 0)) / uint64(time.Microsecond))
	c.latency[min(b, LatencyBuckets-1)].Add(1)
	c.ended.Add(1)
}

// ReportStats implements virtio.StatsReporter: it returns Stats.
func (d *Device) ReportStats() any { return d.Stats() }

// Stats returns the counters, summed over the queues.
func (d *Device) Stats() Stats {
	var s Stats
	for i := range d.counters {
		c := &d.counters[i]
		s.Reads += c.ops[kindRead].Load()
		s.Writes += c.ops[kindWrite].Load()
		s.Flushes += c.ops[kindFlush].Load()
		s.Discards += c.ops[kindDiscard].Load()
		s.WriteZeroes += c.ops[kindWriteZeroes].Load()
		s.ReadBytes += c.bytes[kindRead].Load()
		s.WriteBytes += c.bytes[kindWrite].Load()
		s.DiscardBytes += c.bytes[kindDiscard].Load()
		s.WriteZeroesBytes += c.bytes[kindWriteZeroes].Load()
		s.Errors += c.errors.Load()
		ended := c.ended.Load() // before started, so the difference is never negative
		s.InFlight += c.started.Load() - ended
		for j := range s.Latency {
			s.Latency[j] += c.latency[j].Load()
		}
	}
	return s
}
