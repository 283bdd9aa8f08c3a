package guestinit

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/internal/printable"
	"github.com/moovm/moovm/kmod"
	"golang.org/x/sys/unix"
)

// modulesFallback is where the kernel's modules are mounted when the root file
// system has no place for them and takes none.
const modulesFallback = "/run/moovm-modules"

// modulesDir is where programs look for the running kernel's modules.
func modulesDir() string { return "/lib/modules/" + unameRelease() }

// modulesOnDemand gives the guest its kernel's modules, unless its root file
// system has them, and sees to it that the kernel can load what it is asked
// for. Nothing here is worth a guest that does not start: many need no module.
func (in *initProcess) modulesOnDemand() {
	dir := modulesDir()
	if _, err := os.Stat(dir + "/modules.dep"); err != nil && in.cfg.ModulesShare != "" {
		m := control.Mount{Source: in.cfg.ModulesShare, Target: dir, Type: "9p",
			Options: "trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro,nosuid,nodev"}
		if os.MkdirAll(dir, 0o755) != nil {
			dir = modulesFallback
			m.Target = dir
		}
		if err := mountAt(m); err != nil {
			in.line.warn(fmt.Sprintf("the kernel's modules are not at %s: %v", dir, errCause(err)))
			return
		}
	}
	nodes, err := kmod.StaticNodes(dir)
	if err != nil {
		in.line.warn(err.Error())
	}
	makeStaticNodes("/dev", nodes)
	if in.cfg.ModulesShare != "" {
		in.modprobe(dir)
	}
}

// makeStaticNodes makes the nodes that are not there yet.
func makeStaticNodes(dev string, nodes []kmod.StaticNode) {
	for _, n := range nodes {
		mode, kind := uint32(0o600), uint32(unix.S_IFCHR)
		if n.Block {
			kind = unix.S_IFBLK
		}
		switch n.Name {
		case "fuse", "net/tun": // these check by themselves who asks for what
			mode = 0o666
		}
		path := filepath.Join(dev, n.Name)
		_ = os.MkdirAll(filepath.Dir(path), 0o755)
		if unix.Mknod(path, kind|mode, int(unix.Mkdev(n.Major, n.Minor))) == nil {
			_ = os.Chmod(path, os.FileMode(mode)) // whatever the umask
		}
	}
}

// kernelModprobe holds the program that the kernel runs to load a module.
const kernelModprobe = "/proc/sys/kernel/modprobe"

// modprobeFile is this program's file in the initramfs if it has to become the
// kernel's modprobe, because the root disk has none: a file that was removed
// cannot be mounted anywhere.
func (in *initProcess) modprobeFile() string {
	path, err := os.ReadFile(kernelModprobe)
	if in.cfg.ModulesShare == "" || err != nil || unix.Access(sysroot+strings.TrimSpace(string(path)), unix.X_OK) == nil {
		return ""
	}
	file, _ := os.Readlink("/proc/self/exe")
	return file
}

// modprobe makes this program, once more, the kernel's modprobe, unless the
// root file system has one that finds the modules.
func (in *initProcess) modprobe(dir string) {
	path, err := os.ReadFile(kernelModprobe)
	if err != nil {
		return // a kernel that loads no modules
	}
	if dir == modulesDir() && unix.Access(strings.TrimSpace(string(path)), unix.X_OK) == nil {
		return
	}
	err = os.WriteFile(modprobeName, nil, 0o755)
	if err == nil {
		err = unix.Mount("/proc/self/exe", modprobeName, "", unix.MS_BIND, "")
	}
	if err == nil {
		err = os.WriteFile(kernelModprobe, []byte(modprobeName), 0)
	}
	if err != nil {
		in.line.warn(fmt.Sprintf("the kernel cannot load modules by itself: %v", err))
	}
	if in.cfg.Command == nil {
		maskStaticNodes()
	}
}

// maskStaticNodes tells systemd, if that is the disk's init, not to make the
// static nodes: they are there, and its unit for it needs kmod.
func maskStaticNodes() {
	const units = "/run/systemd/system"
	_ = os.MkdirAll(units, 0o755)
	_ = os.Symlink("/dev/null", units+"/kmod-static-nodes.service")
}

// modprobeMain loads what the kernel asks for, as modprobe -q does. What goes
// wrong is in the kernel's log: nobody reads this process's output.
func modprobeMain(name string) {
	err := loadOnDemand(name)
	switch {
	case err == nil:
		os.Exit(0)
	case !errors.Is(err, kmod.ErrUnknownModule):
		if f, err2 := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err2 == nil {
			fmt.Fprintf(f, "<4>moovm: %s", printable.Text(err.Error()))
		}
	}
	os.Exit(1)
}

// loadOnDemand loads a module, by name or alias, with all that it needs.
func loadOnDemand(name string) error {
	dir := modulesDir()
	if _, err := os.Stat(dir + "/modules.dep"); err != nil {
		dir = modulesFallback
	}
	m, err := kmod.OpenModules(dir, "")
	if err != nil {
		return err
	}
	files, err := m.Resolve(name)
	if err != nil {
		return err
	}
	line, _ := os.ReadFile("/proc/cmdline")
	for _, f := range files {
		if b, err := os.ReadFile("/sys/module/" + f.Name + "/initstate"); err == nil && strings.TrimSpace(string(b)) == "live" {
			continue
		}
		if err := loadModuleFile(f, moduleParams(string(line), f.Name)); err != nil && !f.Optional {
			return fmt.Errorf("module %s: %w", f.Name, err)
		}
	}
	return nil
}

// loadModuleFile loads one module from the modules folder, packed or not.
func loadModuleFile(f kmod.ModuleFile, params string) error {
	if strings.HasSuffix(f.Path, ".ko") {
		return loadKernelModule(f.Path, params)
	}
	image, err := f.Load()
	if err != nil {
		return err
	}
	if err = unix.InitModule(image, params); errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}
