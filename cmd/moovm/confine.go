package main

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/moovm/moovm/internal/confine"
)

const noConfineHelp = "do not confine this process once everything is open (moovm help run)"

// confineServer confines a process that serves what it has open on a socket,
// which it removes at the end.
func (g *globals) confineServer(socket string) error {
	if !g.mayConfine || g.noConfine {
		return nil
	}
	dir, err := absPath(filepath.Dir(socket))
	if err != nil {
		return err
	}
	return confineSelf(g.logger(), confine.Needs{Remove: []string{dir}, Sockets: true})
}

// confineSelf takes from this process what it no longer needs. A kernel that
// has no means for it is no error.
func confineSelf(log *slog.Logger, n confine.Needs) error {
	r, err := confine.Apply(n)
	if errors.Is(err, confine.ErrUnsupported) {
		log.Info("this process is not confined", "reason", err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w; --no-confine goes on without", err)
	}
	log.Info("this process is confined", "landlock", r.Landlock, "seccomp", r.Seccomp, "capabilities", r.Capabilities, "root", r.Root)
	return nil
}
