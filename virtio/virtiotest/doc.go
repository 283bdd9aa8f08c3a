// Package virtiotest is the other side of a virtio device: a driver. It lays
// out guest memory, fills rings, and speaks to a device through its transport,
// for tests, fuzzers and benchmarks; Conformance runs the rules of the
// specification against any transport and device.
package virtiotest
