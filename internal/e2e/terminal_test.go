package e2e

import (
	"testing"

	"github.com/moovm/moovm/internal/ptytest"
)

// The terminal of a machine that runs in this process. cmd/moovm has the same
// tests for the sandbox.
func TestTerminal(t *testing.T) {
	needKVM(t)
	m := ptytest.Moovm{Program: moovmBin, Dir: folder(t), Flags: []string{"--kernel", kernel, "--base", "base.img"}}
	t.Run("Command", m.CommandTTY)
	t.Run("CommandQuit", m.CommandQuit)
	t.Run("Console", m.Console)
	t.Run("QuitAtOnce", m.QuitAtOnce)
}
