package e2e

import (
	"os"
	"testing"
)

// long skips a test that takes minutes unless it was asked for.
func long(t *testing.T) {
	t.Helper()
	if os.Getenv("MOOVM_TEST_LONG") == "" {
		t.Skip("takes minutes: run with MOOVM_TEST_LONG=1, as make test-e2e-long does")
	}
}
