package main

import (
	"fmt"
	"os"
	"path/filepath"
)

// findKernel returns the kernel to boot when none was named: $MOOVM_KERNEL, or
// the one that `make setup` keeps in the cache. The cached kernel's modules
// lie beside it.
func findKernel() (string, error) {
	if k := os.Getenv("MOOVM_KERNEL"); k != "" {
		return k, nil
	}
	if dir, err := cacheDir(); err == nil {
		if found, _ := filepath.Glob(filepath.Join(dir, "kernel", "current", "boot", "vmlinuz-*")); len(found) > 0 {
			return found[0], nil
		}
	}
	return "", fmt.Errorf("no kernel: name one with --kernel or $MOOVM_KERNEL (Debian: apt-get download linux-image-amd64's package and dpkg -x it; `make setup` does that)")
}

// cacheDir is where kernels and images are kept between runs.
func cacheDir() (string, error) {
	if dir := os.Getenv("MOOVM_CACHE"); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "moovm"), nil
}
