package vmm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moovm/moovm/internal/kvm"
)

func TestProbeWithoutKVM(t *testing.T) {
	locked := filepath.Join(t.TempDir(), "kvm")
	if err := os.WriteFile(locked, nil, 0); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]ProbeStatus{
		"/nonexistent/kvm": ProbeMissing,
		os.DevNull:         ProbeNotKVM,
		t.TempDir():        ProbeNotKVM,
		locked:             ProbePermission,
	} {
		if path == locked && os.Geteuid() == 0 {
			want = ProbeNotKVM // root may open anything
		}
		r, err := Probe(context.Background(), path)
		if err != nil || r.Status != want || r.Usable || r.Path != path || !strings.Contains(r.Reason, path) {
			t.Errorf("%s: %+v, %v; want %s", path, r, err, want)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Probe(ctx, os.DevNull); !errors.Is(err, context.Canceled) {
		t.Errorf("Probe with an ended context: %v", err)
	}
}

// TestProbe asks the real device. What it is on this machine is not known, but
// the answer must make sense.
func TestProbe(t *testing.T) {
	needKVM(t)
	r, err := Probe(context.Background(), "")
	if err != nil {
		t.Fatal(err)
	}
	if r.Path != DefaultKVM || r.Usable != (r.Status == ProbeUsable) || !strings.Contains(r.Reason, DefaultKVM) {
		t.Errorf("%+v", r)
	}
	if (r.Status == ProbeEmulation) != (r.Instruction != "") {
		t.Errorf("%+v", r)
	}
	t.Logf("%s", r.Reason)
}

func TestProbeProgram(t *testing.T) {
	mem := make([]byte, probeMemory)
	all := []kvm.CPUIDEntry{{Function: 1, Ecx: 1<<13 | 1<<26}, {Function: 0x8000_0001, Edx: 1 << 27}}
	steps, xsave := probeProgram(mem, all)
	if len(steps) != len(probeSteps) || !xsave {
		t.Errorf("%v, XSAVE %v", steps, xsave)
	}
	for _, s := range probeSteps {
		if !bytes.Contains(mem[probeCode:probeInt3], s.code) {
			t.Errorf("%s is not in the program", s.name)
		}
	}
	steps, xsave = probeProgram(make([]byte, probeMemory), nil)
	if strings.Join(steps, " ") != "pxor addps fld1 fxrstor int3" || xsave {
		t.Errorf("without CPUID features: %v, XSAVE %v", steps, xsave)
	}
}
