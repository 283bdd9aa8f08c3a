package virtio_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtiorng"
)

// A driver that does the same wrong thing again and again is heard of, but
// does not fill the host's log.
func TestLogFlood(t *testing.T) {
	mem, err := virtio.NewMemory(virtio.Region{Bytes: make([]byte, 4096)})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	c, err := virtio.NewCore(virtiorng.Device{}, mem, virtio.CoreOptions{
		QueueInterrupt: func(int) {}, ConfigInterrupt: func() {}, Logger: slog.New(slog.NewTextHandler(&out, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close(t.Context())
	for range 20_000 {
		c.SetStatus(virtio.StatusAcknowledge | virtio.StatusDriver | virtio.StatusFeaturesOK) // without VERSION_1
	}
	if n := strings.Count(out.String(), "features refused"); n == 0 || n > 100 {
		t.Errorf("%d lines about 20000 wrong writes; want some, at most ten and one a second", n)
	}
}
