//go:build !linux

package oci

import "os"

func punch(*os.File) func(off, n int64) error { return nil }
