package guestinit

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

func TestReadAccount(t *testing.T) {
	dir := t.TempDir()
	passwd, group := filepath.Join(dir, "passwd"), filepath.Join(dir, "group")
	for path, text := range map[string]string{
		passwd: "root:x:0:0:root:/root:/bin/sh\nbroken\nbad:x:many:1::/:\nweb:x:33:33:www:/srv:/bin/false\n",
		group:  "root:x:0:\nweb:x:33:\nstaff:x:50:web,other\nvideo:x:44:other,web\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		user string
		want syscall.Credential
		home string
		name string
	}{
		{"web", syscall.Credential{Uid: 33, Gid: 33, Groups: []uint32{33, 50, 44}}, "/srv", "web"},
		{"33", syscall.Credential{Uid: 33, Gid: 33, Groups: []uint32{33, 50, 44}}, "/srv", "web"},
		{"web:staff", syscall.Credential{Uid: 33, Gid: 50, Groups: []uint32{50}}, "/srv", "web"},
		{"web:7", syscall.Credential{Uid: 33, Gid: 7, Groups: []uint32{7}}, "/srv", "web"},
		{"1000", syscall.Credential{Uid: 1000, Groups: []uint32{0}}, "/", "1000"},
		{"1000:44", syscall.Credential{Uid: 1000, Gid: 44, Groups: []uint32{44}}, "/", "1000"},
		{"root", syscall.Credential{Groups: []uint32{0}}, "/root", "root"},
	} {
		a, err := readAccount(c.user, passwd, group)
		if err != nil {
			t.Errorf("%s: %v", c.user, err)
			continue
		}
		if !reflect.DeepEqual(a.cred, c.want) || a.env[0] != "HOME="+c.home || a.env[1] != "USER="+c.name {
			t.Errorf("%s: %+v", c.user, a)
		}
	}
	for _, user := range []string{"nobody", "web:nobody", "-1", "4294967296", "bad", "broken", ":"} {
		if a, err := readAccount(user, passwd, group); err == nil || !strings.Contains(err.Error(), "knows no") {
			t.Errorf("%s: %+v, %v", user, a, err)
		}
	}
	if a, err := readAccount("5", dir+"/none", dir+"/none"); err != nil || a.cred.Uid != 5 {
		t.Errorf("without files: %+v, %v", a, err)
	}
	if a, err := lookAccount(""); a != nil || err != nil {
		t.Errorf("nobody asked for: %+v, %v", a, err)
	}
}
