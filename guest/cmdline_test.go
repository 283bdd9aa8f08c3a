package guest

import (
	"strings"
	"testing"

	"github.com/moovm/moovm/guest/control"
)

func TestParseBootParams(t *testing.T) {
	p := parseBootParams(`quiet root=UUID=1-2 rootfstype=xfs rootflags=noatime,discard ro rw init=/bin/sh rootdelay=5 foo`)
	if want := (control.Root{Device: "UUID=1-2", Type: "xfs", Options: "noatime,discard", WaitSeconds: 5}); p.root != want {
		t.Errorf("%+v", p.root)
	}
	if p.readOnly == nil || *p.readOnly || p.init != "/bin/sh" || strings.Join(p.rest, " ") != "quiet foo" {
		t.Errorf("%+v", p)
	}
	if p := parseBootParams("rootwait"); p.root.WaitSeconds < 600 || p.readOnly != nil {
		t.Errorf("%+v", p)
	}
}
