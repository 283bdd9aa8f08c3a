//go:build !linux

package guestinit

func dropCaches() {}
func syncFiles()  {}
