package virtiotest_test

import (
	"testing"

	"github.com/moovm/moovm/virtio/pci"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

// The conformance suites in the tests of a device of one's own.
func Example() {
	test := func(t *testing.T) {
		open := func(t *testing.T, g *virtiotest.Guest, readOnly bool) virtiotest.Transport {
			dev, err := virtioblk.New(virtioblk.Config{Backend: virtioblk.NewRAM(2 << 20), ReadOnly: readOnly})
			if err != nil {
				t.Fatal(err)
			}
			p, err := virtiotest.NewPCI(dev, g, pci.Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { p.F.Close() })
			return p
		}
		virtiotest.Conformance(t, func(t *testing.T, g *virtiotest.Guest) virtiotest.Transport { return open(t, g, false) })
		virtiotest.BlockConformance(t, open)
	}
	_ = test
}
