//go:build !linux

package fence

// exact leaves errors to the server: their numbers are not those of Linux.
func exact(err error) error { return err }
