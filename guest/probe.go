package guest

import (
	"context"

	"github.com/moovm/moovm/vmm"
)

// ProbeKVM says whether guests can run on this machine's KVM, and if not, why.
// It runs real guest code: see vmm.Probe. The error is that of a ctx that
// ended.
func ProbeKVM(ctx context.Context) (usable bool, reason string, err error) {
	r, err := vmm.Probe(ctx, "")
	return r.Usable, r.Reason, err
}
