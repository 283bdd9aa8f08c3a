package b

import "testing"

func TestFails(t *testing.T) { t.Error("fails on purpose") }
