package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/spf13/cobra"

	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/internal/printable"
	"github.com/moovm/moovm/internal/sandbox"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/vmm"
)

// finding is one thing the doctor looked at.
type finding struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Found  string `json:"found"`
	Advice string `json:"advice,omitempty"`
}

// diagnosis is what `moovm doctor --json` prints.
type diagnosis struct {
	// Accel is what `moovm run --accel auto` would use: kvm, sandbox or none.
	Accel    string    `json:"accel"`
	Reason   string    `json:"reason"`
	Findings []finding `json:"findings"`
}

func newDoctorCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this machine can do, and what would help",
		Long: `Looks at what running guests needs: a KVM that executes real code (it runs a
few instructions, rather than only opening /dev/kvm), a kernel with its
modules, and the tools of the sandbox, which stands in where KVM is not enough.

Exit status: 0 if guests can run here, 1 if not.`,
		Example: "  moovm doctor\n  moovm doctor --json | jq -r .accel",
		Args:    wantArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := examine(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				if err := printJSON(cmd.OutOrStdout(), d); err != nil {
					return err
				}
			} else {
				d.print(cmd)
			}
			if d.Accel == "none" {
				return &statusError{status: exitFailed}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (d *diagnosis) print(cmd *cobra.Command) {
	out := cmd.OutOrStdout()
	for _, f := range d.Findings {
		mark := "ok  "
		if !f.OK {
			mark = "MISS"
		}
		fmt.Fprintf(out, "%s  %-14s %s\n", mark, f.Name, printable.Text(f.Found))
		if f.Advice != "" {
			fmt.Fprintf(out, "      %-14s → %s\n", "", printable.Lines(f.Advice))
		}
	}
	fmt.Fprintf(out, "\nGuests run with: %s. %s\n", d.Accel, printable.Text(d.Reason))
}

// examine looks at everything and draws the conclusion.
func examine(ctx context.Context) (*diagnosis, error) {
	probe, err := vmm.Probe(ctx, "")
	if err != nil {
		return nil, err
	}
	d := &diagnosis{}
	kvm := finding{Name: "KVM", OK: probe.Usable, Found: probe.Reason}
	switch probe.Status {
	case vmm.ProbeMissing:
		kvm.Advice = "load kvm-intel or kvm-amd, or enable nested virtualisation if this is a virtual machine; the sandbox works without"
	case vmm.ProbePermission:
		kvm.Advice = "join the group that owns " + probe.Path + " (usually kvm), or run as root"
	}
	d.Findings = append(d.Findings, kvm, kernelFinding())

	qemu := finding{Name: "QEMU", Found: "not installed", Advice: "apt-get install qemu-system-x86 (for the sandbox; not needed where KVM works)"}
	if path, err := exec.LookPath(sandbox.DefaultQEMU); err == nil {
		qemu = finding{Name: "QEMU", OK: true, Found: firstLine(ctx, path, "--version")}
	}
	d.Findings = append(d.Findings, qemu)
	for _, tool := range [][2]string{{"mmdebstrap", "mmdebstrap"}, {"mke2fs", "e2fsprogs"}} {
		f := finding{Name: tool[0], Found: "not installed", Advice: "apt-get install " + tool[1] + " (to build base images)"}
		if path, err := exec.LookPath(tool[0]); err == nil {
			f = finding{Name: tool[0], OK: true, Found: path}
		}
		d.Findings = append(d.Findings, f)
	}

	d.Findings = append(d.Findings, rootsFinding())
	switch {
	case probe.Usable:
		d.Accel, d.Reason = "kvm", "KVM runs real guest code."
	case qemu.OK && d.Findings[1].OK:
		d.Accel, d.Reason = "sandbox", "KVM here is not enough: "+lowerFirst(probe.Reason)
	default:
		d.Accel, d.Reason = "none", "KVM here is not enough ("+lowerFirst(probe.Reason)+"), and the sandbox lacks something; see above."
	}
	return d, nil
}

// rootsFinding lists the folders that the user trusts for backing files.
func rootsFinding() finding {
	f := finding{Name: "backing roots", OK: true, Found: "none: backing files must lie in the folder of their image, or below"}
	if roots := host.BackingRoots(); len(roots) > 0 {
		f.Found = strings.Join(roots, ", ")
		for _, r := range roots {
			if st, err := os.Stat(r); err != nil || !st.IsDir() {
				f.OK, f.Advice = false, r+" is no folder: take it out of $"+host.BackingRootsEnv+" or "+host.BackingRootsFile()
			}
		}
	}
	return f
}

func kernelFinding() finding {
	path, err := host.Kernel()
	if err != nil {
		return finding{Name: "kernel", Found: "none found", Advice: err.Error()}
	}
	k, err := kernel.LoadKernel(path)
	if err != nil {
		return finding{Name: "kernel", Found: err.Error(), Advice: "name another with --kernel or $MOOVM_KERNEL"}
	}
	defer k.Close()
	f := finding{Name: "kernel", OK: true, Found: fmt.Sprintf("%s (%s)", path, k.Release)}
	if _, err := kmod.FindModules(k); err != nil {
		f.Advice = err.Error()
	}
	return f
}

func firstLine(ctx context.Context, name string, args ...string) string {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return name + " does not run: " + err.Error()
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}

func lowerFirst(s string) string {
	if s == "" || strings.HasPrefix(s, "/") {
		return s
	}
	return strings.ToLower(s[:1]) + s[1:]
}
