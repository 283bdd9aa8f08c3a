//go:build !unix

package oci

const openNonblock = 0
