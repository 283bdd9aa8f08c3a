package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/spf13/pflag"

	"github.com/moovm/moovm/cowdisk"
)

// requested is what the flags ask for.
func requested(t *testing.T, command []string, flags ...string) (*machineRequest, error) {
	t.Helper()
	var m machineFlags
	f := pflag.NewFlagSet("run", pflag.ContinueOnError)
	m.register(f)
	if err := f.Parse(flags); err != nil {
		t.Fatal(err)
	}
	return m.request(command)
}

// The base is the first disk, the others follow in their order.
func TestBaseAndDisks(t *testing.T) {
	dir := t.TempDir()
	base, data := filepath.Join(dir, "base.img"), filepath.Join(dir, "data.img")
	for i, name := range []string{base, data} {
		if err := os.WriteFile(name, make([]byte, (i+1)<<20), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	over := filepath.Join(dir, "over.cow")
	if err := cowdisk.Create(over, cowdisk.CreateOptions{Backing: base}); err != nil {
		t.Fatal(err)
	}
	r, err := requested(t, nil, "--disk", data+",format=raw,serial=data", "--base", base, "--disk", over+",ro")
	if err != nil {
		t.Fatal(err)
	}
	var o opened
	defer o.Close(t.Context(), slog.Default())
	if err := r.openDisks(&o); err != nil {
		t.Fatal(err)
	}
	if len(o.disks) != 3 {
		t.Fatalf("%d disks", len(o.disks))
	}
	for i, want := range []struct {
		size     int64
		serial   string
		readOnly bool
	}{{1 << 20, "", false}, {2 << 20, "data", false}, {1 << 20, "", true}} {
		d := o.disks[i]
		if d.COW.Size() != want.size || d.Serial != want.serial || d.ReadOnly != want.readOnly {
			t.Errorf("disk %d: %d bytes, serial %q, read-only %v; want %+v", i, d.COW.Size(), d.Serial, d.ReadOnly, want)
		}
	}
	if _, err := o.disks[0].COW.WriteAt(make([]byte, 512), 0); err != nil || o.disks[0].COW.Allocated() == 0 {
		t.Errorf("the first disk is no overlay: %v", err)
	}
}

func TestRequestRefused(t *testing.T) {
	for _, c := range []struct {
		command []string
		flags   []string
		says    string
	}{
		{nil, []string{"--tty"}, "--tty is for a COMMAND; without one, the terminal is the guest's console anyway"},
		{[]string{"true"}, []string{"--initrd", "x"}, "an initrd of your own cannot run a COMMAND; leave --initrd or COMMAND out"},
		{nil, []string{"--timeout", "-1s"}, "--timeout -1s: a time cannot be negative"},
		{nil, []string{"--share", "a=x", "--share", "a=y"}, "--share: the tag a is used twice"},
		{nil, []string{"--virtio", "isa"}, "--virtio isa: use pci or mmio"},
	} {
		if _, err := requested(t, c.command, c.flags...); err == nil || err.Error() != c.says {
			t.Errorf("%q: %v, want %q", c.flags, err, c.says)
		}
	}
}
