package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/cowdisk"
)

// onTerminal runs moovm on a terminal of its own. With ctrlC that key is pressed as soon as the program shows something.
func onTerminal(t *testing.T, dir string, ctrlC bool, args ...string) (screen string, status int) {
	t.Helper()
	master, slave, err := pty.Open()
	if err != nil {
		t.Skipf("no pseudo-terminals here (mount devpts on /dev/pts): %v", err)
	}
	defer master.Close()
	if err := pty.Setsize(master, &pty.Winsize{Rows: 24, Cols: 100}); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("moovm", args...)
	cmd.Dir = dir
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	kill := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer kill.Stop()
	var b bytes.Buffer
	p := make([]byte, 4096)
	for {
		n, err := master.Read(p) // EIO when the last one has closed the terminal
		b.Write(p[:n])
		if n > 0 && ctrlC {
			ctrlC = false
			io.WriteString(master, "\x03")
		}
		if err != nil {
			break
		}
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return b.String(), cmd.ProcessState.ExitCode()
}

// busyImage makes base.img and over.cow in a new folder: an overlay in so many pieces that a tool is busy for a while.
func busyImage(t *testing.T, units int) string {
	t.Helper()
	dir := t.TempDir()
	size := int64(units) * 8192
	f, err := os.Create(filepath.Join(dir, "base.img"))
	if err == nil {
		_, err = f.WriteAt(bytes.Repeat([]byte{0xba}, 1<<20), size/2)
	}
	if err == nil {
		err = errors.Join(f.Truncate(size), f.Close())
	}
	img := filepath.Join(dir, "over.cow")
	if err == nil {
		err = cowdisk.Create(img, cowdisk.CreateOptions{Backing: "base.img"})
	}
	if err != nil {
		t.Fatal(err)
	}
	d, err := cowdisk.Open(img, cowdisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte{1}, 4096)
	for i := range units {
		p[0] = byte(i)
		if _, err := d.WriteAt(p, int64(i)*8192); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var s []string
	for _, e := range entries {
		s = append(s, e.Name())
	}
	return strings.Join(s, " ")
}

// Ctrl-C in the middle of a job: status 130 and one sentence; nothing is left behind, the disk's contents are what they were, and the
// same command finishes the job when it is run again.
func TestJobCtrlC(t *testing.T) {
	for _, c := range []struct {
		name, says string
		args       []string
	}{
		{"commit", "run the same command again", []string{"commit", "over.cow"}},
		{"rebase", "as good as before", []string{"rebase", "-b", "other.img", "over.cow"}},
		{"flatten", "nothing was left behind", []string{"flatten", "over.cow", "out.img"}},
		{"resize", "as it was", []string{"resize", "over.cow", "1G"}},
		{"compare", "nothing was decided", []string{"compare", "over.cow", "flat.img"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			for units := 2000; ; units *= 2 { // until it takes long enough to be interrupted
				dir := busyImage(t, units)
				flat := filepath.Join(dir, "flat.img")
				if err := cowdisk.Flatten(t.Context(), filepath.Join(dir, "over.cow"), flat, cowdisk.VariantUnknown, cowdisk.ToolOptions{Options: cowdisk.Options{Format: cowdisk.FormatCOW}}); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, "other.img"), bytes.Repeat([]byte{0xaa}, units*8192), 0o644); err != nil {
					t.Fatal(err)
				}
				before := names(t, dir)
				screen, status := onTerminal(t, dir, true, c.args...)
				if status == exitOK && units < 1<<17 {
					os.RemoveAll(dir)
					continue
				}
				if status != exitInterrupted || !strings.Contains(screen, "moovm: interrupted; ") || !strings.Contains(screen, c.says) {
					t.Fatalf("%d units: status %d: %q", units, status, screen)
				}
				if after := names(t, dir); after != before {
					t.Errorf("left behind: %s; before: %s", after, before)
				}
				r, err := cowdisk.Compare(t.Context(), filepath.Join(dir, "over.cow"), flat, cowdisk.ToolOptions{Options: cowdisk.Options{Format: cowdisk.FormatCOW}})
				if err != nil || !r.Equal || r.SizeA != r.SizeB {
					t.Errorf("after Ctrl-C: %+v %v", r, err)
				}
				if screen, status := onTerminal(t, dir, false, c.args...); status != exitOK {
					t.Errorf("again: status %d: %q", status, screen)
				}
				r, err = cowdisk.Compare(t.Context(), filepath.Join(dir, "over.cow"), flat, cowdisk.ToolOptions{Options: cowdisk.Options{Format: cowdisk.FormatCOW}})
				if err != nil || !r.Equal {
					t.Errorf("in the end: %+v %v", r, err)
				}
				return
			}
		})
	}
}

// On a terminal a long job shows how far it is, and clears the line when it is done; -q and a pipe show nothing.
func TestJobProgress(t *testing.T) {
	dir := busyImage(t, 4000)
	screen, status := onTerminal(t, dir, false, "flatten", "over.cow", "out.img")
	if status != exitOK || !strings.Contains(screen, "flattening") || !strings.Contains(screen, "%") || !strings.Contains(screen, "\r") {
		t.Errorf("status %d: %q", status, screen)
	}
	if i := strings.LastIndex(screen, "\r"); strings.TrimSpace(strings.NewReplacer("\x1b[2K", "", "\x1b[0K", "").Replace(screen[i+1:])) != "" {
		t.Errorf("the line is not cleared: %q", screen)
	}
	if screen, status := onTerminal(t, dir, false, "-q", "compare", "over.cow", "out.img"); status != exitOK || screen != "" {
		t.Errorf("-q: status %d: %q", status, screen)
	}
	cmd := exec.Command("moovm", "flatten", "over.cow", "piped.img")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil || len(out) != 0 {
		t.Errorf("without a terminal: %v %q", err, out)
	}
}
