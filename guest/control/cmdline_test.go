package control

import (
	"slices"
	"testing"
)

func TestSplitCmdline(t *testing.T) {
	got := slices.Collect(SplitCmdline("  a b=\"c d\" \te\n" + `x="un closed`))
	if want := []string{"a", `b="c d"`, "e", `x="un closed`}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	for w := range SplitCmdline("one two") {
		if w != "one" {
			t.Error("goes on after break")
		}
		break
	}
}
