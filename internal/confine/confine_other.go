//go:build !linux || !amd64

package confine

// Apply returns ErrUnsupported.
func Apply(Needs) (Result, error) { return Result{}, ErrUnsupported }
