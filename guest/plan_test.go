package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kernel/kerneltest"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/kmod/kmodtest"
	"github.com/moovm/moovm/vmm"
)

func TestKernelCmdline(t *testing.T) {
	disk := []Disk{{}}
	for _, c := range []struct {
		cfg  Config
		want string
	}{
		{Config{}, "console=ttyS0 panic=-1 pci=noearly quiet"},
		{Config{Disks: disk}, "console=ttyS0 panic=-1 pci=noearly quiet root=/dev/vda rw"},
		{Config{Disks: []Disk{{ReadOnly: true}}}, "console=ttyS0 panic=-1 pci=noearly quiet root=/dev/vda ro"},
		{Config{Disks: disk, Append: "root=LABEL=x ro debug"}, "console=ttyS0 panic=-1 pci=noearly quiet root=LABEL=x ro debug"},
	} {
		if got := kernelCmdline(&c.cfg, parseBootParams(c.cfg.Append)); got != c.want {
			t.Errorf("got  %s\nwant %s", got, c.want)
		}
	}
}

func TestInitConfigFor(t *testing.T) {
	cfg := Config{
		Disks: []Disk{{}}, Append: "root=UUID=1 rootflags=noatime ro init=/x",
		Shares: []Share{{Tag: "src", Target: "/src", ReadOnly: true}, {Tag: "only"}, {Tag: "out", Target: "/out"}, {Tag: "own", Target: "/own", Options: "cache=none"}},
	}
	c := initConfigFor(&cfg, parseBootParams(cfg.Append))
	if c.Root == nil || *c.Root != (control.Root{Device: "UUID=1", Options: "noatime", ReadOnly: true}) || c.Init != "/x" || c.Control == "" {
		t.Errorf("%+v, root %+v", c, c.Root)
	}
	var mounts []string
	for _, m := range c.Mounts {
		options, _ := strings.CutPrefix(m.Options, shareOptions)
		mounts = append(mounts, fmt.Sprintf("%s %s %s %v", m.Source, m.Target, options, m.Optional))
	}
	if got := strings.Join(mounts, "; "); got != "moovm /run/moovm ,ro,nosuid,nodev,noexec,cache=none true; src /src ,ro false; "+
		"out /out ,cache=mmap false; own /own ,cache=none false" {
		t.Error(got)
	}
	c = initConfigFor(&Config{NoTree: true, Command: &control.Command{}}, bootParams{})
	if c.Root != nil || len(c.Mounts) != 0 {
		t.Errorf("%+v", c)
	}
}

// The kernel's configuration goes along where it lies beside the kernel or
// among the modules, for guests that may be added to.
func TestKernelConfig(t *testing.T) {
	dir := t.TempDir()
	k := &kernel.Kernel{Path: filepath.Join(dir, "boot/vmlinuz"), Release: kerneltest.Release}
	modules := filepath.Join(dir, "lib/modules", kerneltest.Release)
	writeFile(t, filepath.Join(modules, "modules.dep"), nil)
	m, err := kmod.OpenModules(modules, "")
	if err != nil {
		t.Fatal(err)
	}
	want := func(text string, cfg Config) {
		t.Helper()
		if b, err := kernelConfig(&cfg); err != nil || string(b) != text {
			t.Errorf("%q, %v; want %q", b, err, text)
		}
	}
	want("", Config{Kernel: k, Modules: m})
	writeFile(t, filepath.Join(modules, "config"), []byte("CONFIG_A=m\n"))
	want("CONFIG_A=m\n", Config{Kernel: k, Modules: m})
	want("", Config{Kernel: k})
	config := strings.Repeat("# not in this program\n", 2)
	writeFile(t, filepath.Join(dir, "boot/config-"+k.Release), []byte(config))
	want(config, Config{Kernel: k, Modules: m})
	want("", Config{Kernel: &kernel.Kernel{Path: k.Path, Release: "../boot/config-" + k.Release}}) // a path is no release
	want("", Config{Kernel: &kernel.Kernel{Path: k.Path}})
	huge := filepath.Join(dir, "boot/config-huge")
	writeFile(t, huge, nil)
	if err := os.Truncate(huge, maxKernelConfig+1); err != nil {
		t.Fatal(err)
	}
	want("", Config{Kernel: &kernel.Kernel{Path: k.Path, Release: "huge"}})
	for _, scratch := range []bool{true, false} {
		p, err := makePlan(&Config{Kernel: k, Scratch: scratch, Command: &control.Command{Args: []string{"x"}}, Setup: []string{"true"}})
		if err != nil || (p.init.KernelConfig == "/boot/config-"+k.Release) != scratch || len(p.init.Setup) != 1 ||
			bytes.Contains(p.initrd, []byte(config)) != scratch {
			t.Errorf("scratch %v: %+v, %v", scratch, p.init, err)
		}
	}
}

type memoryDisk struct{ data []byte }

func (m memoryDisk) ReadAt(p []byte, off int64) (int, error)  { return copy(p, m.data[off:]), nil }
func (m memoryDisk) WriteAt(p []byte, off int64) (int, error) { return copy(m.data[off:], p), nil }
func (m memoryDisk) Flush() error                             { return nil }
func (m memoryDisk) Size() int64                              { return int64(len(m.data)) }

func TestModulesFor(t *testing.T) {
	root, _ := kmodtest.Tree(t, true)
	m, err := kmod.OpenModules(root, kerneltest.Release)
	if err != nil {
		t.Fatal(err)
	}
	ext4 := make([]byte, 1<<17)
	copy(ext4[1024+0x38:], "\x53\xef")
	xfs := make([]byte, 1<<17)
	copy(xfs, "XFSB")
	for name, c := range map[string]struct {
		cfg  Config
		want string
	}{
		"nothing":    {Config{NoTree: true}, ""},
		"built in":   {Config{}, ""},
		"tree":       {Config{Modules: m}, "virtio_ring? virtio? virtio_pci?"},
		"ext4":       {Config{Modules: m, NoTree: true, Disks: []Disk{{Backend: memoryDisk{ext4}}}}, "virtio_ring virtio virtio_pci virtio_blk crc32c_generic? crc32c_intel? jbd2 after? mbcache ext4"},
		"partitions": {Config{Modules: m, NoTree: true, Disks: []Disk{{Backend: memoryDisk{make([]byte, 1<<17)}}}}, "virtio_ring virtio virtio_pci virtio_blk crc32c_generic? crc32c_intel? jbd2? after? mbcache? ext4?"},
		"more":       {Config{Modules: m, NoTree: true, LoadModules: []string{"round"}}, "about round"},
	} {
		files, err := modulesFor(&c.cfg, control.InitConfig{Command: &control.Command{}})
		if err != nil || names(files) != c.want {
			t.Errorf("%s: got %s, want %s, %v", name, names(files), c.want, err)
		}
	}
	for name, cfg := range map[string]Config{
		"no xfs module":  {Modules: m, NoTree: true, Disks: []Disk{{Backend: memoryDisk{xfs}}}},
		"no 9p module":   {Modules: m, Shares: []Share{{Tag: "x"}}},
		"no mmio module": {Modules: m, NoTree: true, Transport: vmm.TransportMMIO, Disks: []Disk{{Backend: memoryDisk{ext4}}}},
		"unknown":        {Modules: m, LoadModules: []string{"nonesuch"}},
	} {
		if _, err := modulesFor(&cfg, control.InitConfig{}); !errors.Is(err, kmod.ErrUnknownModule) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := modulesFor(&Config{LoadModules: []string{"x"}}, control.InitConfig{}); !errors.Is(err, kmod.ErrNoModules) {
		t.Error(err)
	}
}

func TestStartRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vmlinux")
	writeFile(t, path, kerneltest.ELF())
	k, err := kernel.LoadKernel(path)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	cmd := &control.Command{Args: []string{"true"}}
	script := filepath.Join(t.TempDir(), "init")
	writeFile(t, script, []byte("#!/bin/sh\n"))
	for name, c := range map[string]struct {
		cfg  Config
		want string
	}{
		"no kernel":   {Config{Command: cmd}, "no kernel was given"},
		"nothing":     {Config{Kernel: k, NoTree: true}, "nothing to run"},
		"empty disk":  {Config{Kernel: k, Disks: []Disk{{}}}, "disk vda has no contents"},
		"own initrd":  {Config{Kernel: k, Initrd: []byte("x"), Command: cmd}, "initrd of its own"},
		"no init":     {Config{Kernel: k, Command: cmd, Init: filepath.Join(t.TempDir(), "x")}, "no such file"},
		"no KVM":      {Config{Kernel: k, Command: cmd, Init: script, KVM: filepath.Join(t.TempDir(), "kvm")}, "kvm"},
		"no module":   {Config{Kernel: k, Command: cmd, LoadModules: []string{"x"}}, "no modules folder"},
		"tiny memory": {Config{Kernel: k, Command: cmd, Init: script, Memory: 1 << 20}, ""},
	} {
		_, err := Boot(t.Context(), c.cfg)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
			continue
		}
		t.Logf("%s: %v", name, err)
		if ExitStatus(Result{}, err) != StatusCannotRun || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDiskName(t *testing.T) {
	for i, want := range map[int]string{0: "vda", 25: "vdz", 26: "vdaa", 27: "vdab", 701: "vdzz", 702: "vdaaa"} {
		if got := diskName(i); got != want {
			t.Errorf("%d: %s", i, got)
		}
	}
}

func TestConsoleLog(t *testing.T) {
	var out strings.Builder
	c := newConsoleLog(&out)
	told := func() bool {
		select {
		case <-c.panics:
			return true
		default:
			return false
		}
	}
	write := func(s string) {
		t.Helper()
		if n, err := c.Write([]byte(s)); n != len(s) || err != nil {
			t.Errorf("%d, %v", n, err)
		}
	}
	for i := range consoleLines + 10 {
		write(fmt.Sprintf("line %d\x1b[0m\r\n\r\n", i))
	}
	write(strings.Repeat("x", 3*consoleLineLen) + "\n")
	write("unfinished")
	tail := c.tail()
	if len(tail) != consoleLines+1 || tail[0] != `line 11\x1b[0m` || len(tail[consoleLines-1]) != consoleLineLen || tail[consoleLines] != "unfinished" {
		t.Errorf("%d lines, %q", len(tail), tail[0])
	}
	if _, ok := c.panicked(); ok || c.hangsInPanic(0) {
		t.Error("panic without a panic")
	}
	write("\n[    1.0] Kernel panic - not ")
	write("syncing: VFS: no root\r\n[    1.1] Call Trace:\n")
	if cause, ok := c.panicked(); !ok || cause != "VFS: no root" || c.hangsInPanic(0) {
		t.Errorf("%q %v", cause, ok)
	}
	if told() {
		t.Error("told of a panic's last line before there was one")
	}
	write("[    1.2] ---[ end Kernel panic - not syncing: VFS: no root ]---\n")
	if !told() || told() {
		t.Error("not told of the panic's last line, once")
	}
	if !c.hangsInPanic(0) || c.hangsInPanic(time.Hour) {
		t.Error("the end of the panic was not seen, or too soon")
	}
	if cause, _ := c.panicked(); cause != "VFS: no root" {
		t.Errorf("%q", cause)
	}
	write("login: ") // it was only a file that somebody looked at
	if c.hangsInPanic(0) {
		t.Error("life after a panic")
	}
	if !strings.HasSuffix(out.String(), "login: ") {
		t.Error("not everything was passed on")
	}
}

func TestVerdict(t *testing.T) {
	const p = "[ 1.0] Kernel panic - not syncing: test\n"
	ended, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	<-ended.Done()
	caused, cancel := context.WithTimeoutCause(t.Context(), 0, fmt.Errorf("--timeout 5s: %w", context.DeadlineExceeded))
	defer cancel()
	<-caused.Done()
	cmd := &control.Command{Args: []string{"x"}}
	failure := &control.GuestError{Kind: control.FailRoot, Message: "no root"}
	for name, c := range map[string]struct {
		ctx     context.Context
		cfg     Config
		foreign bool
		console string
		result  Result
		err     error
		slow    bool
		want    int
		text    string
	}{
		"status":             {cfg: Config{Command: cmd}, result: Result{Reason: vmm.PowerOff, ExitStatus: 7, Control: control.State{Hello: true, Exited: true, Status: 7, Bye: true}}, want: 7},
		"status, then reset": {cfg: Config{Command: cmd}, result: Result{Reason: vmm.Reset, ExitStatus: 7, Control: control.State{Hello: true, Exited: true}}, want: 7},
		"status, then panic": {cfg: Config{Command: cmd}, console: p, result: Result{Reason: vmm.Reset, Control: control.State{Hello: true, Exited: true}}, want: 126, text: "not syncing: test"},
		"power-off":          {result: Result{Reason: vmm.PowerOff, Control: control.State{Hello: true, Started: true}}, want: 0},
		"reboot":             {result: Result{Reason: vmm.Reset, Control: control.State{Hello: true, Started: true}}, want: 0},
		"old panic shown":    {console: p, result: Result{Reason: vmm.PowerOff, Control: control.State{Hello: true, Started: true}}, want: 0},
		"panic":              {console: p, result: Result{Reason: vmm.Reset, Control: control.State{Hello: true}}, want: 126, text: "| [ 1.0] Kernel panic"},
		"early panic":        {console: p, result: Result{Reason: vmm.Reset}, want: 126},
		"hanging panic":      {console: p + "---[ end Kernel panic - not syncing: test ]---\n", result: Result{Reason: vmm.Stopped}, want: 126},
		"no root":            {result: Result{Reason: vmm.PowerOff, Control: control.State{Hello: true, Failure: failure}}, want: 125, text: "no root"},
		"not found":          {result: Result{Reason: vmm.PowerOff, Control: control.State{Failure: &control.GuestError{Kind: control.FailCommand, Status: 127}}}, want: 127},
		"timeout":            {ctx: ended, cfg: Config{Command: cmd}, result: Result{Reason: vmm.Stopped, Took: 20003 * time.Millisecond, Control: control.State{Hello: true}}, want: 124, text: "20s"},
		"timeout at boot":    {ctx: ended, result: Result{Reason: vmm.Stopped}, want: 124},
		"old panic, timeout": {ctx: ended, console: p + "$ ", result: Result{Reason: vmm.Stopped, Control: control.State{Hello: true}}, want: 124},
		"slow set-up": {cfg: Config{BootTimeout: time.Minute, Setup: []string{"sleep 100"}}, slow: true, result: Result{Reason: vmm.Stopped, Control: control.State{Hello: true}},
			want: 125, text: "the set-up in the guest did not end in time: not within 1m0s"},
		"slow boot":    {cfg: Config{BootTimeout: time.Minute}, slow: true, result: Result{Reason: vmm.Stopped}, want: 125, text: "not within 1m0s"},
		"silent reset": {result: Result{Reason: vmm.Reset}, want: 125, text: "nothing was said on the console"},
		"cut short":    {cfg: Config{Command: cmd}, console: "bye\n", result: Result{Reason: vmm.PowerOff, Control: control.State{Hello: true, Started: true}}, want: 125, text: "  | bye"},
		"machine":      {result: Result{Reason: vmm.Failed}, err: errors.New("no KVM"), want: 125, text: "no KVM"},
		"own cause":    {ctx: caused, result: Result{Reason: vmm.Stopped}, want: 124, text: "--timeout 5s"},
		"own initrd":   {foreign: true, result: Result{Reason: vmm.PowerOff}, want: 0},
	} {
		t.Run(name, func(t *testing.T) {
			g := &Guest{cfg: c.cfg, foreign: c.foreign, console: &consoleLog{}}
			_, _ = g.console.Write([]byte(c.console))
			c.result.Console = g.console.tail()
			ctx := c.ctx
			if ctx == nil {
				ctx = t.Context()
			}
			err := g.verdict(ctx, c.result, c.err, c.slow)
			if got := ExitStatus(c.result, err); got != c.want {
				t.Errorf("exit status %d, want %d: %v", got, c.want, err)
			}
			if err == nil && c.text != "" || err != nil && !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v lacks %q", err, c.text)
			}
		})
	}
}

func names(files []kmod.ModuleFile) string {
	var out []string
	for _, f := range files {
		n := f.Name
		if f.Optional {
			n += "?"
		}
		out = append(out, n)
	}
	return strings.Join(out, " ")
}

// What a test harness needs of the plan: a root of its own, mounts before
// shares, overlaid shares.
func TestPlanRootAndMounts(t *testing.T) {
	cfg := Config{
		NoTree: true, Command: &control.Command{Args: []string{"x"}}, Disks: []Disk{{}},
		Root:   &control.Root{Device: "host", Type: "9p", ReadOnly: true, Overlay: true},
		Mounts: []control.Mount{{Source: "tmpfs", Target: "/tmp", Type: "tmpfs"}},
		Shares: []Share{{Tag: "host"}, {Tag: "pkg", Target: "/src", Overlay: true, Options: "cache=loose"}},
	}
	c := initConfigFor(&cfg, bootParams{})
	if c.Root == nil || *c.Root != *cfg.Root {
		t.Errorf("root %+v", c.Root)
	}
	want := []control.Mount{cfg.Mounts[0], {Source: "pkg", Target: "/src", Type: "9p", Options: shareOptions + ",cache=loose,ro", Overlay: true}}
	if !slices.Equal(c.Mounts, want) {
		t.Errorf("mounts %+v", c.Mounts)
	}
	cfg.NoRoot = true
	if c := initConfigFor(&cfg, bootParams{}); c.Root != nil {
		t.Errorf("a root all the same: %+v", c.Root)
	}
}
