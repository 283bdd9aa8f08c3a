// Package a is tested in a guest.
package a

// Sign says which side of zero n is.
func Sign(n int) string {
	if n < 0 {
		return "-"
	}
	return "+"
}
