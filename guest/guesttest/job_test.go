package guesttest

import (
	"path/filepath"
	"reflect"
	"testing"
)

// A job arrives in the process that runs it as it was, whatever bytes its paths,
// arguments and variables have.
func TestJobBytes(t *testing.T) {
	var all []byte
	for b := 1; b < 256; b++ {
		all = append(all, byte(b))
	}
	x := string(all)
	j := job{
		Config: Config{
			Kernels: []string{"/" + x}, Modules: x, LoadModules: []string{x}, Setup: []string{x}, Append: x, Base: x, Env: []string{"X=" + x}, Artifacts: x,
			Disks: []Disk{{Image: x, Serial: "\xff", Faults: []Fault{{Op: "read"}}}, {Image: x, Serial: "\xfe"}}, Shares: []Share{{Dir: x, Target: x, Writable: true}},
		},
		Binary: x, Args: []string{x, "\x80", "\x81"}, Env: []string{"Y=" + x, "\xff=1"}, Dir: x, Out: x, Keep: x, Tmp: x, Merge: true,
	}
	path := filepath.Join(t.TempDir(), "job.json")
	if err := j.save(path); err != nil {
		t.Fatal(err)
	}
	if got, err := loadJob(path); err != nil || !reflect.DeepEqual(got, j) {
		t.Errorf("got %+v, %v", got, err)
	}
}
