package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
)

// output is standard output as all commands print to it: it keeps the first
// error, which decides the exit status at the end, so that nobody has to look
// at each line's.
type output struct {
	w   io.Writer
	err error
}

func (o *output) Write(p []byte) (int, error) {
	if o.err != nil {
		return 0, o.err
	}
	n, err := o.w.Write(p)
	o.err = err
	return n, err
}

// watchOutput makes what root and its commands print checked at the end.
func watchOutput(root *cobra.Command) *output {
	o := &output{w: root.OutOrStdout()}
	root.SetOut(o)
	return o
}

// failed is the error of the command whose output this was: its own, or that
// its output is not whole.
func (o *output) failed(err error) error {
	if o.err == nil {
		return err
	}
	if pe := (*fs.PathError)(nil); errors.As(o.err, &pe) {
		o.err = pe.Err
	}
	return fmt.Errorf("standard output is not whole: %w", o.err)
}

// writeFile writes into what path names. A regular file, or one that is not
// there yet, is replaced when all is written, so a failure leaves it as it was;
// everything else (a pipe, a device, what a symbolic link or a second name
// shares with others) is written to.
func writeFile(path string, write func(io.Writer) error) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return replaceFile(path, 0o666, write)
	case err == nil && st.Mode().IsRegular() && links(st) == 1:
		return replaceFile(path, st.Mode().Perm(), write)
	}
	// Into memory first: a link's target is not cut before there is something new.
	var b bytes.Buffer
	if err := write(&b); err != nil {
		return err
	}
	f, err := os.Create(path) // the umask is the kernel's matter
	if err != nil {
		return err
	}
	if _, err := b.WriteTo(f); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// replaceFile makes a file that is there only when it is complete. perm is what
// an existing file has; a new one gets 0666 less the umask.
func replaceFile(path string, perm fs.FileMode, write func(io.Writer) error) error {
	f, name, err := createBeside(path)
	if err != nil {
		if pe := (*fs.PathError)(nil); errors.As(err, &pe) { // name what was asked for
			err = pe.Err
		}
		return fmt.Errorf("%s cannot be made: %w", path, err)
	}
	defer os.Remove(name) // fails when all went well
	defer f.Close()
	if perm != 0o666 {
		if err := f.Chmod(perm); err != nil {
			return err
		}
	}
	w := bufio.NewWriter(f)
	if err := write(w); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(name, path)
}

// createBeside makes a new file in path's folder, with the umask respected,
// which os.CreateTemp's 0600 cannot be.
func createBeside(path string) (*os.File, string, error) {
	for i := 0; ; i++ {
		name := filepath.Join(filepath.Dir(path), fmt.Sprintf(".moovm-%d-%d", os.Getpid(), i))
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
		if !errors.Is(err, fs.ErrExist) || i >= 1000 {
			return f, name, err
		}
	}
}

// links is how many names a file has.
func links(st fs.FileInfo) uint64 {
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		return uint64(s.Nlink)
	}
	return 1
}
