package ctl_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/moovm/moovm/ctl"
)

// A machine behind a socket, and a client that freezes its disk.
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "vm.sock")
	l, err := ctl.Listen(path)
	if err != nil {
		panic(err)
	}
	s := ctl.NewServer(&fake{}, ctl.Options{Version: "v1"}) // fake is a ctl.Machine
	go s.Serve(l)
	defer s.Close()

	ctx := context.Background()
	c, err := ctl.Dial(ctx, path)
	if err != nil {
		panic(err)
	}
	defer c.Close()
	status, err := c.Status(ctx)
	if err != nil {
		panic(err)
	}
	fmt.Println(status.State, status.Disks[0].Name)
	fmt.Println(c.SnapshotDisks(ctx, map[string]string{"vda": filepath.Join(dir, "next.cow")}))
	// Output:
	// running vda
	// <nil>
}
