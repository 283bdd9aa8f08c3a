package host

import (
	"os"
	"path/filepath"
	"strings"
)

// BackingRootsEnv names folders that backing files may lie in, separated by colons.
const BackingRootsEnv = "MOOVM_BACKING_ROOTS"

// BackingRootsFile is the user's list of folders that backing files may lie in, one a line: backing-roots in moovm's configuration folder
// ($XDG_CONFIG_HOME/moovm, or .config/moovm in the home folder). It need not exist.
func BackingRootsFile() string {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "~/.config/moovm/backing-roots"
	}
	return filepath.Join(dir, "moovm", "backing-roots")
}

// BackingRoots are the folders that the user trusts for backing files, of $MOOVM_BACKING_ROOTS and of the file. Only absolute paths count:
// what is trusted must not depend on where one stands. Lines that begin with # are comments.
func BackingRoots() (roots []string) {
	list := filepath.SplitList(os.Getenv(BackingRootsEnv))
	if b, err := os.ReadFile(BackingRootsFile()); err == nil {
		list = append(list, strings.Split(string(b), "\n")...)
	}
	for _, dir := range list {
		if dir = strings.TrimSuffix(dir, "\r"); filepath.IsAbs(dir) {
			roots = append(roots, dir)
		}
	}
	return roots
}
