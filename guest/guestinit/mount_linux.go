package guestinit

import (
	"fmt"
	"strings"

	"github.com/moovm/moovm/guest/control"
	"golang.org/x/sys/unix"
)

// mountFlags are the options of mount(8) that are flags of mount(2).
func mountFlag(option string) (set, clear uintptr, ok bool) {
	switch option {
	case "ro":
		return unix.MS_RDONLY, 0, true
	case "rw":
		return 0, unix.MS_RDONLY, true
	case "nosuid":
		return unix.MS_NOSUID, 0, true
	case "nodev":
		return unix.MS_NODEV, 0, true
	case "noexec":
		return unix.MS_NOEXEC, 0, true
	case "sync":
		return unix.MS_SYNCHRONOUS, 0, true
	case "dirsync":
		return unix.MS_DIRSYNC, 0, true
	case "noatime":
		return unix.MS_NOATIME, 0, true
	case "nodiratime":
		return unix.MS_NODIRATIME, 0, true
	case "relatime":
		return unix.MS_RELATIME, 0, true
	case "strictatime":
		return unix.MS_STRICTATIME, 0, true
	case "lazytime":
		return unix.MS_LAZYTIME, 0, true
	case "bind":
		return unix.MS_BIND, 0, true
	case "rbind":
		return unix.MS_BIND | unix.MS_REC, 0, true
	case "", "defaults", "suid", "dev", "exec", "async", "auto", "noauto", "user", "nouser":
		return 0, 0, true
	}
	return 0, 0, false
}

// parseMountOptions splits the options of mount(8) into the flags and the data
// of mount(2).
func parseMountOptions(options string) (flags uintptr, data string) {
	var rest []string
	for o := range strings.SplitSeq(options, ",") {
		if set, clear, ok := mountFlag(o); ok {
			flags = flags&^clear | set
		} else {
			rest = append(rest, o)
		}
	}
	return flags, strings.Join(rest, ",")
}

func mountOne(m control.Mount) error {
	flags, data := parseMountOptions(m.Options)
	if err := unix.Mount(m.Source, m.Target, m.Type, flags, data); err != nil {
		return fmt.Errorf("mount -t %s -o %q %s %s: %w", m.Type, m.Options, m.Source, m.Target, err)
	}
	return nil
}

// unescapeMount undoes the octal escapes of /proc/self/mounts.
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
