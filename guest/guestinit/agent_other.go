//go:build !linux

package guestinit

import (
	"errors"

	"github.com/moovm/moovm/internal/agent"
)

func dropCaches() {}
func syncFiles()  {}

func takeIdentity(agent.Identity) error { return errors.ErrUnsupported }
