//go:build !linux

package guest

func dropCaches() {}
func syncFiles()  {}
