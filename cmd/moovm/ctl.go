package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/moovm/moovm/ctl"
	"github.com/moovm/moovm/internal/printable"
)

func newCtlCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ctl PATH VERB [ARG…]",
		Short: "Ask a running machine: how it is, to pause, to freeze its disks",
		Long: `Asks the machine that was started with --control unix:PATH, which is a socket for
the same user alone. Scripts and other programs can ask it directly: it is HTTP
with JSON, which docs/CONTROL.md describes, and GET /openapi.json.

  status [--json]             how it is
  pause, resume               stop its processors, let them go on
  power-button                ask the guest to switch off
  reset, stop                 restart it; end it as if its power failed
  disk-snapshot DISK NEW.cow [DISK NEW.cow]…
                              freeze disks (vda, vdb…), all at one instant: each goes
                              on in a new overlay, and the image it had is its base
  console [--last N] [--follow]
                              what the guest wrote to its console
  metrics                     counters in Prometheus's text format
  watch [--interval TIME]     a line of JSON for each event, and statistics

Disk snapshots are made below the folder that the machine was started with
(--control unix:PATH,dir=DIR). A frozen image is what a power cut would have
left: all that the guest has flushed is in it.`,
		Example: `  moovm run --disk root.cow --control unix:vm.sock,dir=. &
  moovm ctl vm.sock status
  moovm ctl vm.sock disk-snapshot vda root-2.cow
  moovm ctl vm.sock console --follow`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usageError(errors.New("moovm ctl: name the socket and what to do"))
			}
			return nil
		},
		RunE: nil,
	}
	o := &ctlOptions{}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		verb, ok := ctlVerbs[args[1]]
		if !ok {
			return usageError(fmt.Errorf("moovm ctl: there is no %q; moovm help ctl lists what there is", args[1]))
		}
		if err := verb.check(args[1], args[2:]); err != nil {
			return usageError(fmt.Errorf("moovm ctl: %w", err))
		}
		c, err := ctl.Dial(cmd.Context(), strings.TrimPrefix(args[0], "unix:"))
		if err != nil {
			return err
		}
		defer c.Close()
		return verb.do(cmd.Context(), c, o, args[2:])
	}
	f := cmd.Flags()
	f.BoolVar(&o.json, "json", false, "status: print JSON")
	f.IntVar(&o.last, "last", ctl.Backlog, "console: how many of the last `BYTES`")
	f.BoolVar(&o.follow, "follow", false, "console: go on until the machine ends")
	f.DurationVar(&o.interval, "interval", time.Second, "watch: `TIME` between statistics; 0 for none but the first")
	return cmd
}

type ctlOptions struct {
	json, follow bool
	last         int
	interval     time.Duration
}

// ctlVerb is something to ask a machine.
type ctlVerb struct {
	pairs bool // of arguments, one at least; else there are none
	do    func(ctx context.Context, c *ctl.Client, o *ctlOptions, args []string) error
}

func (v ctlVerb) check(name string, args []string) error {
	switch {
	case v.pairs && (len(args) == 0 || len(args)%2 != 0):
		return fmt.Errorf("%s: name a disk and its new overlay, such as vda new.cow", name)
	case !v.pairs && len(args) > 0:
		return fmt.Errorf("%s takes no %q", name, args[0])
	}
	return nil
}

func simply(do func(*ctl.Client, context.Context) error) ctlVerb {
	return ctlVerb{do: func(ctx context.Context, c *ctl.Client, _ *ctlOptions, _ []string) error { return do(c, ctx) }}
}

var ctlVerbs = map[string]ctlVerb{
	"status":        {do: ctlStatus},
	"pause":         simply((*ctl.Client).Pause),
	"resume":        simply((*ctl.Client).Resume),
	"power-button":  simply((*ctl.Client).PowerButton),
	"reset":         simply((*ctl.Client).Reset),
	"stop":          simply((*ctl.Client).Stop),
	"disk-snapshot": {pairs: true, do: ctlDiskSnapshot},
	"console": {do: func(ctx context.Context, c *ctl.Client, o *ctlOptions, _ []string) error {
		return c.Console(ctx, o.last, o.follow, os.Stdout)
	}},
	"metrics": simply(func(c *ctl.Client, ctx context.Context) error { return c.Metrics(ctx, os.Stdout) }),
	"watch": {do: func(ctx context.Context, c *ctl.Client, o *ctlOptions, _ []string) error {
		out := json.NewEncoder(os.Stdout)
		return c.Watch(ctx, o.interval, func(e ctl.Event) error { return out.Encode(e) })
	}},
}

func ctlStatus(ctx context.Context, c *ctl.Client, o *ctlOptions, _ []string) error {
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	if o.json {
		return printJSON(os.Stdout, s)
	}
	writeStatus(os.Stdout, s)
	return nil
}

func writeStatus(w io.Writer, s ctl.Status) {
	bytes := func(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }
	fmt.Fprintf(w, "state:      %s\nversion:    %s\nstarted:    %s\nprocessors: %d\nmemory:     %s, of which %s were touched\n",
		printable.Text(s.State), printable.Text(s.Version), s.Started.Local().Format(time.DateTime), s.CPUs, bytes(s.Memory), bytes(s.MemoryUsed))
	for _, d := range s.Disks {
		path, ro := printable.Text(d.Path), ""
		if d.Path == "" {
			path = "an overlay without a name"
		}
		if d.ReadOnly {
			ro = ", read-only"
		}
		fmt.Fprintf(w, "disk %-7s%s: %s, %s of its own, %s%s\n", printable.Text(d.Name)+":", path, bytes(d.Size), bytes(d.ActualSize), layers(d.Layers), ro)
	}
}

func layers(n int) string {
	if n == 1 {
		return "1 layer"
	}
	return fmt.Sprintf("%d layers", n)
}

func ctlDiskSnapshot(ctx context.Context, c *ctl.Client, _ *ctlOptions, args []string) error {
	overlays := map[string]string{}
	for i := 0; i < len(args); i += 2 {
		if overlays[args[i]] != "" {
			return usageError(fmt.Errorf("moovm ctl: disk-snapshot: %s is named twice", args[i]))
		}
		path, err := filepath.Abs(args[i+1]) // this folder's, not the machine's
		if err != nil {
			return err
		}
		overlays[args[i]] = path
	}
	err := c.SnapshotDisks(ctx, overlays)
	if e := (*ctl.Error)(nil); errors.As(err, &e) && len(e.Done) > 0 {
		return fmt.Errorf("%w (%s did go on in the new overlay)", err, strings.Join(e.Done, ", "))
	}
	return err
}
