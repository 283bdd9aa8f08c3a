package archtest

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const (
	// netstack stands for all of gVisor's.
	netstack = "gvisor.dev/gvisor/pkg/tcpip/stack"
	// registryClient is what speaks to registries of container images.
	registryClient = "github.com/google/go-containerregistry/pkg/v1/remote"
)

// unlinked says what a program or room does not link, directly or through
// others.
var unlinked = map[string][]string{
	// Flags of package testing, and all it drags along, are not the program's.
	"cmd/moovm": {"testing"},
	// An init has no use for the host's side: the machine, its devices, the
	// servers of shares, the disks.
	"guest/guestinit": {
		module + "vmm", module + "virtio", module + "virtio9p", module + "virtio9p/fence", module + "cowdisk",
		registryClient, module + "guest", "github.com/hugelgupf/p9/p9",
	},
	// A TCP/IP stack is for who wants it: the program, and tests of guests; a client of registries for the program alone.
	"virtionet":       {netstack, registryClient},
	"virtioblk":       {netstack, registryClient},
	"virtio9p":        {netstack, registryClient},
	"cowdisk":         {netstack, registryClient},
	"guest":           {netstack, registryClient},
	"guest/guesttest": {registryClient},
	// A machine knows no kind of device.
	"vmm": {netstack, registryClient, module + "virtioblk", module + "virtio9p", "github.com/hugelgupf/p9/p9"},
}

func TestLinks(t *testing.T) {
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("needs the go command in PATH, to list what a package links")
	}
	for room, banned := range unlinked {
		cmd := exec.Command(goTool, "list", "-deps", "./"+room)
		cmd.Dir = "../.."
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go list -deps ./%s: %v", room, err)
		}
		deps := strings.Fields(string(out))
		if !slices.Contains(deps, module+room) {
			t.Errorf("%s is not among the %d packages that it links: looking in the wrong place", room, len(deps))
		}
		for _, b := range banned {
			if slices.Contains(deps, b) {
				t.Errorf("%s links %s", room, b)
			}
		}
	}
}
