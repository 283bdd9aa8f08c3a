package main

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/moovm/moovm/internal/confine"
)

const noConfineHelp = "do not confine this process once everything is open (moovm help run)"

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
	log.Info("this process is confined", "landlock", r.Landlock, "seccomp", r.Seccomp)
	return nil
}
