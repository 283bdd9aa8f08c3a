// Package halfword gives both sides of a split virtqueue atomic access to the
// 16-bit fields they share. Go has no 16-bit atomics, so a field is reached
// through the aligned 32-bit word around it.
package halfword
