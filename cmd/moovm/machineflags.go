package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/oci"
	"github.com/moovm/moovm/vmm"
)

// machineFlags describe the guest on the command line, as it was typed. What is
// asked with them is a machineRequest.
type machineFlags struct {
	kernel, modules, initrd, append string
	disks                           []string
	base                            string
	shares                          []string
	memory                          sizeFlag
	cpus                            int
	noTree                          bool
	timeout                         time.Duration
	console                         string
	accel                           string
	virtio                          string
	metrics                         string
	control                         string
	net, vsock                      string
	noConfine                       bool
	tty                             bool
	images                          imageFlags
	image                           string
	pull                            pullFlags
}

func (m *machineFlags) register(f *pflag.FlagSet) {
	m.memory = guest.DefaultMemory
	f.StringVar(&m.kernel, "kernel", "", "kernel "+kernelHelp+" (default: $MOOVM_KERNEL, or the cached one)")
	f.StringVar(&m.modules, "modules", "", "the kernel's modules `DIR` (default: beside the kernel, or /lib/modules)")
	f.StringVar(&m.initrd, "initrd", "", "initrd `FILE` instead of moovm's own init")
	f.StringVar(&m.append, "append", "", "added to the kernel's command line: `\"ARG…\"`")
	f.StringArrayVar(&m.disks, "disk", nil, "`FILE[,ro][,serial=NAME][,format=raw|cow]` (repeatable); the first is /dev/vda, after --base /dev/vdb; a comma in FILE is written twice")
	f.StringVar(&m.base, "base", "", "an ephemeral overlay on `FILE[,format=raw|cow]` as /dev/vda, gone when the machine stops")
	f.StringArrayVar(&m.shares, "share", nil, "`TAG=DIR[,rw]`: a folder of this machine, at /mnt/TAG in the guest (repeatable); read-only unless rw; a comma in DIR is written twice")
	f.Var(&m.memory, "memory", "the guest's memory")
	f.IntVar(&m.cpus, "cpus", 1, "the guest's processors")
	f.BoolVar(&m.noTree, "no-9p", false, "leave the metadata tree out")
	f.DurationVar(&m.timeout, "timeout", 0, "stop the machine after `TIME`, such as 60s (exit status 124); starting the sandbox counts")
	f.StringVar(&m.console, "console", "", "write the serial console to `FILE` (- for standard output)")
	f.StringVar(&m.accel, "accel", host.AccelAuto, "auto, kvm or sandbox: where the machine runs")
	f.StringVar(&m.virtio, "virtio", "pci", "pci or mmio: how disks and shares are attached to the machine")
	f.StringVar(&m.metrics, "metrics", "", "`unix:PATH` of a socket to make, where Prometheus can read the machine's counters by HTTP")
	f.StringVar(&m.net, "net", "none", "none, or `user[,forward=[ADDRESS:]PORT:GUESTPORT][,allow=public|CIDR[:PORT]|NAME[:PORT]][,host]|tap=NAME`: a network interface (moovm help run)")
	f.StringVar(&m.vsock, "vsock", "", "`CID,unix:PATH`: a socket device. A program that connects to PATH and says CONNECT PORT reaches the guest; the guest's connections to port N go to PATH_N")
	f.StringVar(&m.control, "control", "", "`unix:PATH[,dir=DIR]` of a socket to make, where `moovm ctl` and others can ask the machine; disk snapshots are made below DIR; a comma in a path is written twice")
	f.BoolVar(&m.noConfine, "no-confine", false, noConfineHelp)
	f.BoolVarP(&m.tty, "tty", "t", false, "give COMMAND a terminal, which is this one: for shells, editors and passwords")
	f.StringVar(&m.image, "image", "", "run COMMAND on an ephemeral overlay of a container image, `REF` or file as moovm pull takes it; entrypoint, environment, folder and user are the image's")
	f.Var(&m.pull.size, "size", "size of the disk of --image (default: what it needs, and more)")
	m.pull.register(f)
	m.images.register(f)
}

// maxCommandLine is what an x86 kernel keeps of its command line, in bytes
// (COMMAND_LINE_SIZE less the zero at its end; arch/x86/include/asm/setup.h).
const maxCommandLine = 2047

// machineRequest is what is asked of `moovm run`: plain data, checked as far as
// it can be without looking at files.
type machineRequest struct {
	kernel, modules, initrd, append string
	base                            string // becomes the first disk
	disks                           []diskFlag
	shares                          []shareFlag
	images                          imageFlags
	image                           string // becomes base, and more of command
	pull                            oci.Options
	create                          oci.CreateOptions
	root                            *oci.Root // of image, once it is there
	memory                          int64
	cpus                            int
	noTree                          bool
	transport                       vmm.Transport

	command []string // empty: the disk's init takes over
	tty     bool     // the command has a terminal
	timeout time.Duration
	console string // a file, "-" or empty
	accel   string
	metrics string // the socket's path, or empty
	control controlFlag
	net     *netFlag // nil = none
	vsock   vsockFlag
	confine bool
}

// request finds what is wrong with the flags alone, and takes them apart.
func (m *machineFlags) request(command []string) (*machineRequest, error) {
	r := &machineRequest{
		kernel: m.kernel, modules: m.modules, initrd: m.initrd, append: m.append, base: m.base, images: m.images, image: m.image,
		memory: int64(m.memory), cpus: m.cpus, noTree: m.noTree,
		command: command, tty: m.tty, timeout: m.timeout, console: m.console, accel: m.accel, confine: !m.noConfine,
	}
	if host.CheckAccel(m.accel) != nil || m.accel == "" {
		return nil, fmt.Errorf("--accel %s: use auto, kvm or sandbox", m.accel)
	}
	switch m.virtio {
	case "pci":
	case "mmio":
		r.transport = vmm.TransportMMIO
	default:
		return nil, fmt.Errorf("--virtio %s: use pci or mmio", m.virtio)
	}
	switch {
	case m.timeout < 0:
		return nil, fmt.Errorf("--timeout %v: a time cannot be negative", m.timeout)
	case m.cpus < 1 || m.cpus > vmm.MaxCPUs:
		return nil, fmt.Errorf("--cpus %d: a machine has 1 to %d processors", m.cpus, vmm.MaxCPUs)
	case len(m.append) > maxCommandLine:
		return nil, fmt.Errorf("--append: its %d bytes are more than the %d that the kernel keeps; shorten it", len(m.append), maxCommandLine)
	case len(command) > 0 && m.initrd != "":
		return nil, errors.New("an initrd of your own cannot run a COMMAND; leave --initrd or COMMAND out")
	case m.image != "" && m.base != "":
		return nil, errors.New("--image is a base itself; leave --image or --base out")
	case m.image != "" && m.initrd != "":
		return nil, errors.New("an initrd of your own cannot run an image's command; leave --initrd or --image out")
	case m.image == "" && m.pull.used():
		return nil, errors.New("--size, --platform and --mirror are for --image; leave them out")
	case m.tty && len(command) == 0 && m.image == "":
		return nil, errors.New("--tty is for a COMMAND; without one, the terminal is the guest's console anyway")
	}
	var err error
	if r.pull, r.create, err = m.pull.options(); err != nil {
		return nil, err
	}
	if m.metrics != "" {
		var ok bool
		if r.metrics, ok = strings.CutPrefix(m.metrics, "unix:"); !ok || r.metrics == "" {
			return nil, fmt.Errorf("--metrics %s: write unix:PATH", m.metrics)
		}
	}
	if r.net, err = parseNet(m.net); err != nil {
		return nil, err
	}
	if r.vsock, err = parseVsock(m.vsock); err != nil {
		return nil, err
	}
	if r.control, err = parseControl(m.control); err != nil {
		return nil, err
	}
	for _, d := range m.disks {
		f, err := parseDisk(d)
		if err != nil {
			return nil, fmt.Errorf("--disk %w", err)
		}
		r.disks = append(r.disks, f)
	}
	tags := make(map[string]bool)
	for _, s := range m.shares {
		f, err := parseShare(s)
		if err != nil {
			return nil, err
		}
		if tags[f.tag] {
			return nil, fmt.Errorf("--share: the tag %s is used twice", f.tag)
		}
		tags[f.tag], f.text = true, s
		r.shares = append(r.shares, f)
	}
	if len(command) == 0 && m.image == "" && m.base == "" && m.initrd == "" && len(m.disks) == 0 {
		return nil, errors.New("there is nothing to run; name a disk (--image, --base or --disk), an --initrd, or a COMMAND after --")
	}
	return r, nil
}
