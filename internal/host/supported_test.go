package host

import (
	"errors"
	"strings"
	"testing"
)

func TestSupported(t *testing.T) {
	if err := supported("linux", "amd64"); err != nil {
		t.Error(err)
	}
	for _, c := range [][2]string{{"linux", "arm64"}, {"darwin", "arm64"}, {"freebsd", "amd64"}} {
		err := supported(c[0], c[1])
		if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "needs Linux on x86-64") || !strings.Contains(err.Error(), c[0]+"/"+c[1]) {
			t.Errorf("%s: %v", c, err)
		}
	}
}
