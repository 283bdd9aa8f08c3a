package guestinit

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moovm/moovm/internal/blkid"
)

// rootSpec says how the root device is recognised.
type rootSpec struct {
	by    string // NAME, UUID, LABEL, PARTUUID, SERIAL or DEVNO
	value string
}

// parseRootSpec reads the value of root=.
func parseRootSpec(s string) (rootSpec, error) {
	if s == "" {
		return rootSpec{}, fmt.Errorf("root= is empty; use /dev/vda, UUID=…, LABEL=…, PARTUUID=… or SERIAL=…")
	}
	if key, value, ok := strings.Cut(s, "="); ok {
		value = strings.Trim(value, `"`)
		switch by := strings.ToUpper(key); by {
		case "UUID", "LABEL", "PARTUUID", "SERIAL":
			if value == "" {
				return rootSpec{}, fmt.Errorf("root=%s names nothing after the =", s)
			}
			return rootSpec{by, value}, nil
		}
		return rootSpec{}, fmt.Errorf("root=%s is not understood; use /dev/vda, UUID=…, LABEL=…, PARTUUID=… or SERIAL=…", s)
	}
	for prefix, by := range map[string]string{
		"/dev/disk/by-uuid/": "UUID", "/dev/disk/by-label/": "LABEL",
		"/dev/disk/by-partuuid/": "PARTUUID", "/dev/disk/by-id/virtio-": "SERIAL",
	} {
		if v, ok := strings.CutPrefix(s, prefix); ok && v != "" {
			return rootSpec{by, v}, nil
		}
	}
	if major, minor, ok := strings.Cut(s, ":"); ok {
		_, err1 := strconv.ParseUint(major, 10, 12)
		_, err2 := strconv.ParseUint(minor, 10, 20)
		if err1 == nil && err2 == nil {
			return rootSpec{"DEVNO", s}, nil
		}
	}
	name := strings.TrimPrefix(s, "/dev/")
	if name == "" || strings.ContainsAny(name, " /") || name == "." || name == ".." {
		return rootSpec{}, fmt.Errorf("root=%s is not understood; use /dev/vda, UUID=…, LABEL=…, PARTUUID=… or SERIAL=…", s)
	}
	return rootSpec{"NAME", name}, nil
}

// blockDevice is one disk or partition the kernel knows.
type blockDevice struct {
	Name     string // vda, vda1
	Size     int64  // bytes
	DevNo    string // major:minor
	Serial   string
	PartUUID string
	ReadOnly bool
	FS       blkid.FS
}

// matches says whether d is what the specification means.
func (s rootSpec) matches(d blockDevice) bool {
	switch s.by {
	case "NAME":
		return d.Name == s.value
	case "UUID":
		return d.FS.UUID != "" && strings.EqualFold(d.FS.UUID, s.value)
	case "LABEL":
		return d.FS.Label == s.value
	case "PARTUUID":
		return d.PartUUID != "" && strings.EqualFold(d.PartUUID, s.value)
	case "SERIAL":
		return d.Serial == s.value
	case "DEVNO":
		return d.DevNo == s.value
	}
	return false
}

// String is the disk as an error message lists it.
func (d blockDevice) String() string {
	s := fmt.Sprintf("%s (%s", d.Name, byteSize(d.Size))
	for _, f := range []struct{ name, value string }{
		{"", d.FS.Type}, {"LABEL=", d.FS.Label}, {"UUID=", d.FS.UUID}, {"PARTUUID=", d.PartUUID}, {"SERIAL=", d.Serial},
	} {
		if f.value != "" {
			s += ", " + f.name + f.value
		}
	}
	return s + ")"
}

// byteSize writes a size in the largest unit that keeps it readable.
func byteSize(n int64) string {
	units := []string{"bytes", "KiB", "MiB", "GiB", "TiB", "PiB"}
	i := 0
	f := float64(n)
	for f >= 1024 && i < len(units)-1 {
		f /= 1024
		i++
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0") + " " + units[i]
}

// noRootError says which disks there are instead of the wanted one.
func noRootError(device string, found []blockDevice, seconds int) error {
	list := "no disks at all; are the virtio modules loaded?"
	if len(found) > 0 {
		var names []string
		for _, d := range found {
			names = append(names, d.String())
		}
		list = strings.Join(names, ", ")
	}
	return fmt.Errorf("no root device %s after %d s; the guest has: %s", device, seconds, list)
}

// listBlockDevices reads the disks and partitions from sys (normally
// /sys/class/block); open reads a device.
func listBlockDevices(sys string, open func(name string) (readAtCloser, error)) []blockDevice {
	entries, _ := os.ReadDir(sys)
	attribute := func(name ...string) string {
		b, _ := os.ReadFile(filepath.Join(append([]string{sys}, name...)...))
		return strings.TrimSpace(string(b))
	}
	var out []blockDevice
	parts := map[string]map[int]string{}
	for _, e := range entries {
		d := blockDevice{Name: e.Name(), DevNo: attribute(e.Name(), "dev"), Serial: attribute(e.Name(), "serial"), ReadOnly: attribute(e.Name(), "ro") == "1"}
		sectors, _ := strconv.ParseInt(attribute(e.Name(), "size"), 10, 50)
		d.Size = sectors * 512
		if d.Size == 0 || strings.HasPrefix(d.Name, "loop") || strings.HasPrefix(d.Name, "ram") {
			continue
		}
		number, partition := 0, false
		if n, err := strconv.Atoi(attribute(e.Name(), "partition")); err == nil {
			number, partition = n, true
		}
		if r, err := open(d.Name); err == nil {
			d.FS = blkid.Probe(r)
			if !partition {
				parts[d.Name] = blkid.PartUUIDs(r)
			}
			r.Close()
		}
		if partition {
			disk := strings.TrimRight(d.Name, "0123456789")
			if ids, ok := parts[disk]; ok {
				d.PartUUID = ids[number]
			} else {
				d.PartUUID = parts[strings.TrimSuffix(disk, "p")][number]
			}
		}
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b blockDevice) int { return strings.Compare(a.Name, b.Name) })
	return out
}

type readAtCloser interface {
	io.ReaderAt
	io.Closer
}
