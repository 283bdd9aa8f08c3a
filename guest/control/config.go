package control

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"github.com/moovm/moovm/internal/bytejson"
)

// ConfigPath is where the initramfs holds the InitConfig. Its presence tells a
// program that runs as PID 1 that it is the init of a moovm guest.
const ConfigPath = "/moovm/config.json"

// KernelConfigPath is where the initramfs holds the configuration that the
// kernel was built with, if the host has it.
const KernelConfigPath = "/moovm/kernel-config"

// Mount is one file system that the init mounts, below the root of the disk
// (or of the initramfs when there is no disk).
type Mount struct {
	Source  string `json:"source"`            // device, or 9P tag
	Target  string `json:"target"`            // absolute path; created when missing
	Type    string `json:"type"`              // as /proc/filesystems names it
	Options string `json:"options,omitempty"` // comma separated, as for mount -o
	// Optional mounts may fail; the host is told.
	Optional bool `json:"optional,omitempty"`
	// Overlay keeps what is changed in the guest's memory. The kernel needs its
	// overlay module.
	Overlay bool `json:"overlay,omitempty"`
}

// Root says what the root file system is, as the kernel parameters of the same
// names do: a disk, or a 9P share if Type is 9p; Device is its tag then.
type Root struct {
	Device  string `json:"device"`            // /dev/vda, UUID=…, LABEL=…, PARTUUID=…, SERIAL=…
	Type    string `json:"type,omitempty"`    // rootfstype; empty = recognised from the superblock
	Options string `json:"options,omitempty"` // rootflags
	// ReadOnly mounts the root file system read-only.
	ReadOnly bool `json:"read_only,omitempty"`
	// Overlay puts an overlayfs on the root file system, whose changes live in
	// memory. The kernel needs its overlay module.
	Overlay bool `json:"overlay,omitempty"`
	// WaitSeconds is how long the init waits for the device; 0 = 10 seconds.
	WaitSeconds int `json:"wait_seconds,omitempty"`
}

// Wait is how long the root device may take to appear.
func (r Root) Wait() time.Duration {
	if r.WaitSeconds <= 0 {
		return 10 * time.Second
	}
	return time.Duration(r.WaitSeconds) * time.Second
}

// Network is how the init configures an interface.
type Network struct {
	MAC     string       `json:"mac"`
	Address netip.Prefix `json:"address,omitzero"`
	Gateway netip.Addr   `json:"gateway,omitzero"`
	DNS     netip.Addr   `json:"dns,omitzero"`
}

// Command is one program to run in the guest.
type Command struct {
	Args []string `json:"args"`
	Env  []string `json:"env,omitempty"` // added to PATH, HOME and TERM
	Dir  string   `json:"dir,omitempty"` // working folder; empty = /
	// User is who it runs as: NAME or UID, and :GROUP or :GID behind it, as the
	// root disk's own /etc/passwd and /etc/group know them; empty = root.
	User string `json:"user,omitempty"`
	// Terminal gives the command a pseudo terminal of its own; stdout and
	// stderr then arrive as one stream.
	Terminal bool `json:"terminal,omitempty"`
	// Merge makes stderr the same pipe as stdout, so that what is written to
	// both keeps its order. It arrives as stdout.
	Merge bool `json:"merge,omitempty"`
	// Rows and Columns are the terminal's size in characters.
	Rows    uint16 `json:"rows,omitempty"`
	Columns uint16 `json:"columns,omitempty"`
}

// InitModule is a kernel module of the initramfs.
type InitModule struct {
	Name     string `json:"name"` // as modprobe takes it, with _ for -
	Path     string `json:"path"`
	Optional bool   `json:"optional,omitempty"` // may fail to load
}

// InitConfig is what the host tells the init. It travels as JSON in the
// initramfs, at ConfigPath; strings may have any bytes.
type InitConfig struct {
	// Version of this structure; see ConfigVersion.
	Version int `json:"version"`
	// Modules are files in the initramfs, in load order.
	Modules []InitModule `json:"modules,omitempty"`
	// Root is the root disk; nil = stay in the initramfs.
	Root *Root `json:"root,omitempty"`
	// Init is the program of the root disk that takes over as PID 1 when there
	// is no Command; empty = /sbin/init and the places the kernel tries after it.
	Init string `json:"init,omitempty"`
	// Mounts are made after the root disk is mounted.
	Mounts []Mount `json:"mounts,omitempty"`
	// Command is run instead of Init; its exit status is reported.
	Command *Command `json:"command,omitempty"`
	// Control is the line to the host: a serial port, or a port of a virtio
	// console (which may appear when Modules are loaded); empty = none.
	Control string `json:"control,omitempty"`
	// ControlShare is the tag of a 9P share that is a faster control line; it
	// is used instead of Control from when the modules are loaded, if the
	// kernel has 9P.
	ControlShare string `json:"control_share,omitempty"`
	// ModulesShare is the tag of a 9P share of the kernel's modules. It is mounted
	// at /lib/modules/RELEASE, unless the root file system has them; what the
	// kernel wants to load, the init loads from there if there is no modprobe.
	ModulesShare string `json:"modules_share,omitempty"`
	// Scratch says that the root file system is gone with the guest: files that
	// programs expect, such as /etc/hosts, are added.
	Scratch bool `json:"scratch,omitempty"`
	// Setup are lines for /bin/sh to run, one after the other, before the
	// command, with its folder and environment; what they write goes to stderr.
	// One that fails is a failure of its own kind, and nothing else runs.
	Setup []string `json:"setup,omitempty"`
	// KernelConfig is where the kernel's configuration file is put that the
	// initramfs has, unless the root file system has it; empty = nowhere.
	KernelConfig string `json:"kernel_config,omitempty"`
	// CorePattern is where the memory of programs that crash is written, as in
	// core(5); empty = nowhere in particular.
	CorePattern string `json:"core_pattern,omitempty"`
	// Settings are files of /proc and /sys, and what is written into them before
	// the command runs. What the kernel lacks is left out.
	Settings map[string]string `json:"settings,omitempty"`
	// Networks are configured before the command runs, in /etc/resolv.conf too,
	// without a change to the root file system.
	Networks []Network `json:"networks,omitempty"`
	// Hostname is set before anything runs; empty = leave it.
	Hostname string `json:"hostname,omitempty"`
}

// ConfigVersion is the InitConfig version this package writes and reads.
const ConfigVersion = 1

// Marshal returns the JSON the init reads.
func (c InitConfig) Marshal() ([]byte, error) {
	if c.Version == 0 {
		c.Version = ConfigVersion
	}
	b, err := bytejson.Marshal(c)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = json.Indent(&out, b, "", "  ")
	return out.Bytes(), err
}

// ParseInitConfig reads what InitConfig.Marshal wrote.
func ParseInitConfig(b []byte) (InitConfig, error) {
	var c InitConfig
	if err := bytejson.Unmarshal(b, &c); err != nil {
		return c, fmt.Errorf("init configuration: %w", err)
	}
	if c.Version != ConfigVersion {
		return c, fmt.Errorf("init configuration has version %d, this init reads version %d", c.Version, ConfigVersion)
	}
	if c.Command != nil && len(c.Command.Args) == 0 {
		return c, fmt.Errorf("init configuration: the command is empty")
	}
	if c.Command == nil && c.Root == nil {
		return c, fmt.Errorf("init configuration has neither a root disk nor a command: nothing to run")
	}
	return c, nil
}
