//go:build linux

package cowdisk

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// TestMain is also the program that the kill tests start and kill.
func TestMain(m *testing.M) {
	if os.Getenv(killEnv) != "" {
		killChild()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}
