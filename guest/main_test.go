package guest

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/moovm/moovm/guest/guestinit"
	"github.com/moovm/moovm/initramfs"
	"go.uber.org/goleak"
)

// initDir is where testInit puts its program.
var initDir string

// TestMain lets the test binary be the init of the guests that the tests boot.
func TestMain(m *testing.M) {
	if guestinit.IsInit() {
		guestinit.Main()
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if initDir != "" {
			os.RemoveAll(initDir)
		}
		os.Exit(code)
	}))
}

var buildInit = sync.OnceValues(func() (string, error) {
	// A static test binary can be the init itself.
	if self, err := os.Executable(); err == nil && initramfs.CheckStatic(self) == nil {
		return self, nil
	}
	dir, err := os.MkdirTemp("", "moovm-init-")
	if err != nil {
		return "", err
	}
	initDir = dir
	name := filepath.Join(dir, "init")
	cmd := exec.Command("go", "build", "-o", name, "./testdata/init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", &exec.Error{Name: string(out), Err: err}
	}
	return name, nil
})

// testInit returns a static program that is the init of a guest.
func testInit(t *testing.T) string {
	t.Helper()
	p, err := buildInit()
	if err != nil {
		t.Skipf("no init could be built; run with CGO_ENABLED=0 or with the go command in PATH: %v", err)
	}
	return p
}

func writeFile(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
		t.Fatal(err)
	}
}
