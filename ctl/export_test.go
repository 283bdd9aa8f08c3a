package ctl

import (
	"reflect"
	"strings"
)

// Routes are the patterns of all requests.
func Routes() (out []string) {
	for _, r := range routes {
		out = append(out, r.pattern)
	}
	return out
}

// Schemas are the names of the fields of all that travels.
func Schemas() map[string][]string {
	out := map[string][]string{}
	for name, v := range map[string]any{
		"Versions": Versions{}, "Status": Status{}, "Disk": Disk{}, "Event": Event{},
		"DiskSnapshot": snapshotRequest{}, "Problem": problem{},
	} {
		t := reflect.TypeOf(v)
		for i := range t.NumField() {
			field, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
			out[name] = append(out[name], field)
		}
	}
	return out
}
