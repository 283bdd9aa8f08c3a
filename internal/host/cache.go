package host

import (
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
)

// CacheDir is where kernels and images are kept between runs: $MOOVM_CACHE, or
// moovm in the user's cache folder ($XDG_CACHE_HOME, or .cache in the home
// folder, which the user database names when $HOME does not). It need not exist.
func CacheDir() (string, error) {
	if dir := os.Getenv("MOOVM_CACHE"); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir()
	if err == nil {
		return filepath.Join(dir, "moovm"), nil
	}
	if u, err2 := user.LookupId(strconv.Itoa(os.Getuid())); err2 == nil && filepath.IsAbs(u.HomeDir) {
		return filepath.Join(u.HomeDir, ".cache", "moovm"), nil
	}
	return "", fmt.Errorf("no folder for the cache: %w; set $HOME or $MOOVM_CACHE", err)
}
