package guest

import (
	"testing"

	"go.uber.org/goleak"
)

// TestMain lets the test binary be the init of the guests that the tests boot.
func TestMain(m *testing.M) {
	if IsInit() {
		InitMain()
	}
	goleak.VerifyTestMain(m)
}
