package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/internal/printable"
)

// Exit statuses of check.
const (
	exitProblems = 3
	exitRepaired = 4
)

func newCheckCommand(g *globals) *cobra.Command {
	var (
		images         imageFlags
		repair, asJSON bool
		inUse          bool
	)
	cmd := &cobra.Command{
		Use:   "check [--repair|--in-use] [--json] IMAGE",
		Short: "Look for damage in an image, and repair what loses no data",
		Long: `Looks at the header, the bitmap and the data of an image and at its backing
file, and says what is wrong.

Exit status: 0 clean, 3 problems found, 4 problems found and all repaired, 1 the
image could not be looked at.`,
		Example: "  moovm check root.cow\n  moovm check --repair root.cow",
		Args:    wantArgs("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if repair && inUse {
				return usageError(errors.New("moovm check: an image in use cannot be repaired; leave --in-use or --repair out"))
			}
			var r *cowdisk.CheckResult
			err := job(cmd.Context(), g, "checking", "run the same command again", func(report func(done, total int64)) (err error) {
				o := images.tool(report)
				o.NoLock = inUse
				r, err = cowdisk.Check(cmd.Context(), args[0], repair, o)
				return err
			})
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if asJSON {
				if err := printJSON(out, r); err != nil {
					return err
				}
			} else {
				for _, p := range r.Problems {
					done := ""
					if p.Repaired {
						done = " (repaired)"
					}
					fmt.Fprintf(out, "%s: %s: %s%s\n", printable.Text(args[0]), p.Kind, printable.Text(p.Detail), done)
				}
				problems := "problems"
				if len(r.Problems) == 1 {
					problems = "problem"
				}
				fmt.Fprintf(out, "%s: %d of %d sectors allocated, %d %s\n", printable.Text(args[0]), r.AllocatedSectors, r.TotalSectors, len(r.Problems), problems)
			}
			switch {
			case r.Clean():
				return nil
			case r.Repaired():
				return &statusError{status: exitRepaired}
			}
			return &statusError{status: exitProblems}
		},
	}
	f := cmd.Flags()
	f.BoolVar(&repair, "repair", false, "repair what can be repaired without losing data")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	registerInUse(f, &inUse)
	images.register(f)
	return cmd
}
