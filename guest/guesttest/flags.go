package guesttest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// outputs are files and folders that a test binary is to write. The guest
// writes them in the out folder, and they are brought back from there.
type outputs struct {
	out   string // the folder that the guest can write to
	items []output
}

type output struct {
	name   string // below out
	target string // on this machine, absolute
	kind   outputKind
}

type outputKind int

const (
	outputFile      outputKind = iota
	outputProfile              // of coverage: those of several kernels are joined
	outputCover                // a folder of coverage data
	outputNothing              // a folder of which nothing comes back
	outputArtifacts            // a folder of which the artifacts come back
)

// fileFlags are the flags of a test binary that name a file to write; true =
// below -test.outputdir.
var fileFlags = map[string]bool{
	"coverprofile": true, "cpuprofile": true, "memprofile": true, "blockprofile": true, "mutexprofile": true,
	"trace": true, "testlogfile": false,
}

// testFlag splits -test.NAME=VALUE.
func testFlag(arg string) (name, value string, hasValue, ok bool) {
	rest, ok := strings.CutPrefix(arg, "-")
	if !ok {
		return
	}
	rest = strings.TrimPrefix(rest, "-")
	if rest, ok = strings.CutPrefix(rest, "test."); !ok {
		return
	}
	name, value, hasValue = strings.Cut(rest, "=")
	return name, value, hasValue, true
}

// redirect returns arguments and environment with which the test binary writes
// its files below out, and what to bring back. dir is its working folder.
func redirect(args, env []string, dir, out string) ([]string, []string, *outputs) {
	o := &outputs{out: out}
	args, env = slices.Clone(args), slices.Clone(env)
	outputDir, artifacts := dir, outputNothing
	hasDir := false
	end := len(args) // of the flags
	for i := 0; i < len(args); i++ {
		name, value, hasValue, ok := testFlag(args[i])
		if !ok {
			if args[i] == "--" || !strings.HasPrefix(args[i], "-") {
				end = i
				break
			}
			continue
		}
		_, isFile := fileFlags[name]
		if isDir := name == "outputdir" || name == "gocoverdir"; !hasValue && (isFile || isDir || valueFlags[name]) && i+1 < len(args) {
			// -test.name value: made one word
			args[i] += "=" + args[i+1]
			value = args[i+1]
			args = slices.Delete(args, i+1, i+2)
			end--
		}
		switch {
		case name == "outputdir" && value != "":
			outputDir = join(dir, value)
		case name == "artifacts":
			artifacts = outputNothing
			if on, err := strconv.ParseBool(value); !hasValue || err == nil && on {
				artifacts = outputArtifacts
			}
		}
	}
	for i := range args[:end] {
		name, value, _, ok := testFlag(args[i])
		if !ok || value == "" {
			continue
		}
		below, isFile := fileFlags[name]
		switch {
		case isFile && below:
			args[i] = "-test." + name + "=" + o.add(join(outputDir, value), fileKind(name))
		case isFile:
			args[i] = "-test." + name + "=" + o.add(join(dir, value), fileKind(name))
		case name == "gocoverdir":
			args[i] = "-test." + name + "=" + o.add(join(dir, value), outputCover)
		case name == "outputdir":
			args[i] = "-test.outputdir=" + o.add(outputDir, artifacts)
			hasDir = true
		}
	}
	if artifacts == outputArtifacts && !hasDir {
		args = slices.Insert(args, 0, "-test.outputdir="+o.add(outputDir, artifacts))
	}
	for i, e := range env {
		if v, ok := strings.CutPrefix(e, "GOCOVERDIR="); ok && v != "" {
			env[i] = "GOCOVERDIR=" + o.add(join(dir, v), outputCover)
		}
	}
	return args, env, o
}

// valueFlags are the other flags of a test binary that have a value, so that
// -test.run X is not taken for the end of the flags.
var valueFlags = map[string]bool{
	"bench": true, "benchtime": true, "blockprofilerate": true, "count": true, "cpu": true, "fuzz": true, "fuzzcachedir": true,
	"fuzzminimizetime": true, "fuzztime": true, "list": true, "memprofilerate": true, "mutexprofilefraction": true,
	"parallel": true, "run": true, "shuffle": true, "skip": true, "timeout": true,
}

func join(dir, path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(dir, path)
}

func fileKind(flag string) outputKind {
	if flag == "coverprofile" {
		return outputProfile
	}
	return outputFile
}

// add gives an output its place and returns that.
func (o *outputs) add(target string, kind outputKind) string {
	it := output{name: filepath.Join("o"+strconv.Itoa(len(o.items)), filepath.Base(target)), target: target, kind: kind}
	if target == "/" {
		it.name = filepath.Join(filepath.Dir(it.name), "root")
	}
	o.items = append(o.items, it)
	return filepath.Join(o.out, it.name)
}

// prepare makes the folders.
func (o *outputs) prepare() error {
	for _, it := range o.items {
		dir := filepath.Join(o.out, it.name)
		if it.kind == outputFile || it.kind == outputProfile {
			dir = filepath.Dir(dir)
		}
		if err := os.MkdirAll(dir, 0o777); err != nil {
			return err
		}
	}
	return nil
}

// collect brings back what was written, with c. A run brings back no other
// names than those that its flags imply.
func (o *outputs) collect(c *collector) error {
	if len(o.items) == 0 {
		return nil
	}
	root, err := os.OpenRoot(o.out)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, it := range o.items {
		switch it.kind {
		case outputFile, outputProfile:
			err = c.named(root, it.name, it.target, it.kind == outputProfile)
		case outputCover:
			err = c.folder(root, it.name, it.target, coverNames)
		case outputArtifacts:
			err = c.folder(root, filepath.Join(it.name, artifactsDir), filepath.Join(it.target, artifactsDir), nil)
		}
		if err != nil {
			return fmt.Errorf("bring back %s from the guest: %w", it.target, err)
		}
	}
	return nil
}

// flagValue returns the last value of a flag of the test binary.
func flagValue(args []string, name string) (value string, ok bool) {
	for _, a := range args {
		if a == "--" {
			break
		}
		if n, v, has, is := testFlag(a); is && n == name {
			value, ok = v, true
			if !has {
				value = "true"
			}
		}
	}
	return value, ok
}

// testTimeout is the test binary's own deadline; 0 = none.
func testTimeout(args []string) time.Duration {
	v, _ := flagValue(args, "timeout")
	d, err := time.ParseDuration(v)
	if err != nil {
		return 0
	}
	return d
}
