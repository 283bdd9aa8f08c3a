package control

import (
	"reflect"
	"strings"
	"testing"
)

func TestParseInitConfig(t *testing.T) {
	full := InitConfig{
		Version: ConfigVersion, Modules: []InitModule{{"m", "/m.ko", true}}, Control: "/dev/ttyS1", Hostname: "h", Init: "/i",
		Root:    &Root{Device: "/dev/vda", Type: "ext4", Options: "noatime", ReadOnly: true, Overlay: true, WaitSeconds: 3},
		Mounts:  []Mount{{"moovm", "/run/moovm", "9p", "ro", true, false}},
		Command: &Command{Args: []string{"a", "b c"}, Env: []string{"X=1"}, Dir: "/d", Terminal: true, Rows: 2, Columns: 3},
	}
	b, err := full.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ParseInitConfig(b); err != nil || !reflect.DeepEqual(got, full) {
		t.Errorf("got %+v, %v", got, err)
	}
	for text, want := range map[string]string{
		"":                                  "init configuration: ",
		`{"version":2,"root":{}}`:           "has version 2",
		`{"version":1}`:                     "nothing to run",
		`{"version":1,"command":{}}`:        "command is empty",
		`{"version":1,"command":{"args":7}`: "init configuration: ",
	} {
		if _, err := ParseInitConfig([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// Any byte may stand in an argument, a variable or a path.
func TestInitConfigBytes(t *testing.T) {
	all := make([]byte, 0, 255)
	for b := 1; b < 256; b++ {
		all = append(all, byte(b))
	}
	x := string(all)
	c := InitConfig{
		Version: ConfigVersion, Hostname: x, Init: x, CorePattern: x, KernelConfig: x, Setup: []string{x}, Settings: map[string]string{x: x, "\xff": "1", "\xfe": "2"},
		Modules: []InitModule{{Name: x, Path: x}}, Root: &Root{Device: "LABEL=" + x, Options: x}, Mounts: []Mount{{Source: x, Target: "/" + x, Type: x, Options: x}},
		Command: &Command{Args: []string{x, "\xff", "\xfe", "ü"}, Env: []string{"X=" + x}, Dir: "/" + x},
	}
	b, err := c.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ParseInitConfig(b); err != nil || !reflect.DeepEqual(got, c) {
		t.Errorf("got %+v, %v", got, err)
	}
}
