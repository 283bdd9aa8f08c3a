package cowdisk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
)

// read returns what the image holds.
func readAll(path string, o Options) ([]byte, error) {
	o.ReadOnly = true
	d, err := Open(path, o)
	if errors.Is(err, ErrNotCOW) {
		d, err = OpenRaw(path, o)
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	b := make([]byte, d.Size())
	_, err = d.ReadAt(b, 0)
	return b, err
}

// crashTool is a maintenance command and the contents that the image may have while and after it runs.
type crashTool struct {
	name string
	run  func(fs *memFS) error
	path string // where the result is
	size int    // of the disk afterwards
}

func crashTools() []crashTool {
	opts := func(fs *memFS) ToolOptions {
		return ToolOptions{Options: Options{FS: fs, BitmapMemory: 1, Format: FormatCOW}}
	}
	ctx := context.Background()
	return []crashTool{
		{"commit", func(fs *memFS) error { return Commit(ctx, "/d/img", opts(fs)) }, "/d/img", crashDisk},
		{"rebase", func(fs *memFS) error { return Rebase(ctx, "/d/img", "other", opts(fs)) }, "/d/img", crashDisk},
		{"grow", func(fs *memFS) error { return Resize(ctx, "/d/img", crashDisk+5*4096, false, opts(fs)) }, "/d/img", crashDisk + 5*4096},
		{"shrink", func(fs *memFS) error { return Resize(ctx, "/d/img", crashDisk/2, true, opts(fs)) }, "/d/img", crashDisk / 2},
		{"repair", func(fs *memFS) error {
			r, err := Check(ctx, "/d/img", true, opts(fs))
			if err == nil && !r.Repaired() {
				err = fmt.Errorf("%+v", r.Problems)
			}
			return err
		}, "/d/img", crashDisk},
		{"flatten", func(fs *memFS) error {
			delete(fs.nodes, "/d/out")
			return Flatten(ctx, "/d/img", "/d/out", QEMUV2, opts(fs))
		}, "/d/out", crashDisk},
	}
}

// The maintenance commands are cut off at every change they make, by a kill or by a power failure: the image opens with its contents, and
// running the command again completes it.
func TestToolsCutOff(t *testing.T) {
	tools := crashTools()
	parallelSeeds(t, crashPoints()/4, func(seed uint64) (int, error) {
		c := newCrashRun(seed)
		tool := tools[seed%uint64(len(tools))]
		want := bytes.Clone(c.m.now)
		c.fs.put("/d/other", randomBytes([]int{crashDisk, 3000}[seed/2%2], seed+7), 80)
		if c.r.IntN(2) == 0 { // with a time that makes a changed base stale
			backing, format := "base", FormatRaw
			if c.fs.nodes["/d/mid"] != nil {
				backing, format = "mid", FormatCOW
			}
			if err := RebaseHeader("/d/img", backing, ToolOptions{Options: Options{FS: c.fs}, OtherFormat: format}); err != nil {
				return 0, err
			}
		}
		contents := func(b []byte) error {
			n := min(len(b), crashDisk)
			if !bytes.Equal(b[:n], want[:n]) || !isZero(b[n:]) {
				return errors.New("contents differ")
			}
			return nil
		}
		var failed error
		points := 0
		c.fs.after = func() {
			if failed != nil || c.r.IntN(3) != 0 {
				return
			}
			points++
			how := "crash"
			after := c.fs.killed()
			if c.r.IntN(2) == 0 {
				after = c.fs.crash(c.r)
			} else {
				how = "kill"
			}
			failed = func() error {
				b, err := readAll("/d/img", Options{FS: after})
				if err != nil {
					return fmt.Errorf("open: %w", err)
				}
				if len(b) != crashDisk && len(b) != tool.size {
					return fmt.Errorf("%d bytes", len(b))
				}
				if err := contents(b); err != nil {
					return err
				}
				if err := tool.run(after); err != nil {
					return fmt.Errorf("again: %w", err)
				}
				b, err = readAll(tool.path, Options{FS: after})
				if err == nil && len(b) != tool.size {
					err = fmt.Errorf("%d bytes", len(b))
				}
				if err == nil {
					err = contents(b)
				}
				if err != nil {
					return fmt.Errorf("after running it again: %w", err)
				}
				res, err := Check(neverDone, tool.path, false, ToolOptions{Options: Options{FS: after}})
				if err != nil || !res.Clean() {
					return fmt.Errorf("check after running it again: %+v %v", res, err)
				}
				return nil
			}()
			if failed != nil {
				failed = fmt.Errorf("%s of %v, point %d: %w", how, c.fs.names(), points, failed)
			}
		}
		err := tool.run(c.fs)
		if err == nil {
			err = failed
		}
		if err != nil {
			return points, fmt.Errorf("%s: %w", tool.name, err)
		}
		b, err := readAll(tool.path, Options{FS: c.fs})
		if err == nil {
			err = contents(b)
		}
		if err != nil {
			return points, fmt.Errorf("%s: %w", tool.name, err)
		}
		return points + 1, nil
	})
}

func TestCheckFindsAndRepairs(t *testing.T) {
	base := randomBytes(19*512, 1)
	for _, c := range []struct {
		name     string
		kind     ProblemKind
		repaired bool
		damage   func(b []byte) []byte
	}{
		{"clean", "", true, func(b []byte) []byte { return b }},
		{"pad", ProblemHeader, true, func(b []byte) []byte { b[1036] = 1; return b }},
		{"sector size", ProblemHeader, false, func(b []byte) []byte { b[1048] = 1; return b }},
		{"version", ProblemHeader, false, func(b []byte) []byte { b[7] = 9; return b }},
		{"truncated header", ProblemHeader, false, func(b []byte) []byte { return b[:1000] }},
		{"truncated bitmap", ProblemBitmap, false, func(b []byte) []byte { return b[:1058] }},
		{"bits beyond the end", ProblemBeyondEnd, true, func(b []byte) []byte { b[1058] |= 0x80; return b }},
		{"truncated data", ProblemDataMissing, false, func(b []byte) []byte { return b[:2000] }},
		{"oversized", ProblemOversized, true, func(b []byte) []byte { return append(b, make([]byte, 40000)...) }},
		{"oversized with data", ProblemOversized, false, func(b []byte) []byte { return append(b, randomBytes(40000, 1)...) }},
		{"stale base", ProblemBacking, false, func(b []byte) []byte { b[1035]++; return b }},
		{"missing base", ProblemBacking, false, func(b []byte) []byte { b[8] = 'x'; return b }},
		{"loop", ProblemBacking, false, func(b []byte) []byte { copy(b[8:], "/d/img\x00"); return b }},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMemFS()
			m.put("/d/base", base, 50)
			f := fixture{variant: QEMUV2, backing: "/d/base", size: 19 * 512, mtime: 50}
			over := randomBytes(19*512, 2)
			m.put("/d/img", c.damage(f.image(over, func(s int) bool { return s < 16 })), 1)
			o := ToolOptions{Options: Options{FS: m, Format: FormatCOW}}
			r, err := Check(t.Context(), "/d/img", false, o)
			if err != nil {
				t.Fatal(err)
			}
			if c.kind == "" {
				if !r.Clean() || r.AllocatedSectors != 16 || r.TotalSectors != 19 {
					t.Fatalf("%+v", r)
				}
				return
			}
			if len(r.Problems) != 1 || r.Problems[0].Kind != c.kind || r.Problems[0].Repaired {
				t.Fatalf("%+v", r.Problems)
			}
			t.Log(r.Problems[0].Detail)
			if r, err = Check(t.Context(), "/d/img", true, o); err != nil || r.Repaired() != c.repaired {
				t.Fatalf("repair: %+v %v", r.Problems, err)
			}
			r, err = Check(t.Context(), "/d/img", false, o)
			if err != nil || r.Clean() != c.repaired {
				t.Fatalf("after repair: %+v %v", r.Problems, err)
			}
			if c.repaired {
				b, err := readAll("/d/img", Options{FS: m})
				if err != nil || !bytes.Equal(b, slices.Concat(over[:16*512], base[16*512:])) {
					t.Fatalf("contents after repair differ: %v", err)
				}
			}
		})
	}
}

func TestCommitRefusesHeader(t *testing.T) {
	m := newMemFS()
	m.put("/d/base", make([]byte, 8192), 50)
	o := ToolOptions{Options: Options{FS: m, Format: FormatCOW}}
	if err := Create("/d/img", CreateOptions{Backing: "base", FS: m}); err != nil {
		t.Fatal(err)
	}
	d := mustOpen(t, "/d/img", o.Options)
	evil := fixture{variant: QEMUV2, backing: "/etc/shadow", size: 4096}.header()
	if _, err := d.WriteAt(evil, 0); err != nil {
		t.Fatal(err)
	}
	d.Close()
	if err := Commit(t.Context(), "/d/img", o); !errors.Is(err, ErrHeader) {
		t.Fatalf("%v", err)
	}
	if !isZero(m.contents("/d/base")) {
		t.Fatal("base was written")
	}
}

func TestToolsCancel(t *testing.T) {
	m := newMemFS()
	m.put("/d/base", randomBytes(1<<20, 1), 50)
	o := ToolOptions{Options: Options{FS: m, Format: FormatCOW}}
	if err := Create("/d/img", CreateOptions{Backing: "base", FS: m}); err != nil {
		t.Fatal(err)
	}
	d := mustOpen(t, "/d/img", o.Options)
	want := contents(t, d)
	d.WriteAt(want[:1<<19], 0)
	d.Close()
	for _, tool := range crashTools() {
		ctx, cancel := context.WithCancel(t.Context())
		var last int64
		o.Progress = func(done, total int64) {
			if done < last || done > total {
				t.Errorf("%s: progress %d of %d after %d", tool.name, done, total, last)
			}
			last = done
			cancel()
		}
		var err error
		switch tool.name {
		case "commit":
			err = Commit(ctx, "/d/img", o)
		case "rebase":
			m.put("/d/new", nil, 4)
			err = Rebase(ctx, "/d/img", "new", o)
		case "flatten":
			err = Flatten(ctx, "/d/img", "/d/out", VariantUnknown, o)
		case "grow":
			err = Resize(ctx, "/d/img", 2<<20, false, o)
		default:
			cancel()
			continue
		}
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", tool.name, err)
		}
		b, err := readAll("/d/img", o.Options)
		if err != nil || !bytes.Equal(b, want) {
			t.Errorf("%s was cancelled: contents differ, %v", tool.name, err)
		}
	}
	if m.nodes["/d/out"] != nil {
		t.Error("a cancelled flatten left a file")
	}
}
