package main

import (
	"strings"
	"testing"
)

func TestParseNet(t *testing.T) {
	for _, s := range []string{"none", ""} {
		if f, err := parseNet(s); f != nil || err != nil {
			t.Errorf("%q: %+v, %v", s, f, err)
		}
	}
	f, err := parseNet("user")
	if err != nil || !f.user || !f.policy.Public || f.policy.Host {
		t.Errorf("%+v, %v", f, err)
	}
	f, err = parseNet("user,host,forward=8080:80,forward=0.0.0.0:2222:22,allow=mirror.example:80,allow=10.1.0.0/16,mac=02:00:00:00:00:09,mtu=9000")
	if err != nil || f.policy.Public || !f.policy.Host || len(f.forwards) != 2 || len(f.policy.Allow) != 2 || f.mac[5] != 9 || f.mtu != 9000 {
		t.Errorf("%+v, %v", f, err)
	}
	if f, err = parseNet("user,allow=public,allow=10.1.2.3"); err != nil || !f.policy.Public || len(f.policy.Allow) != 1 {
		t.Errorf("%+v, %v", f, err)
	}
	if f, err = parseNet("tap=moovm0,mac=02:00:00:00:00:09"); err != nil || f.tap != "moovm0" || f.user {
		t.Errorf("%+v, %v", f, err)
	}
	for in, says := range map[string]string{
		"user,":                           "there is no option",
		"bridge":                          `there is no network "bridge"`,
		"tap=":                            "there is no network",
		"none,host":                       "none has no options",
		"user,hots":                       `there is no option "hots"`,
		"tap=x,host":                      "tap has no option",
		"user,mac=1:2":                    "is no MAC address",
		"user,mac=01:00:00:00:00:01":      "no address of one station",
		"user,mac=00:00:00:00:00:00":      "no address of one station",
		"user,mac=02:00:00:00:00:00:00:1": "is no MAC address",
		"user,mtu=100":                    "from 576",
		"user,mtu=x":                      "from 576",
		"user,allow=":                     "neither an address nor a name",
		"user,allow=127.0.0.1":            "by the option host",
		"user,allow=::1":                  "no IPv6",
		"user,forward=80":                 "the guest's port is missing",
		"user,forward=8080:80,forward=127.0.0.1:8080:81": "listen on the same port",
		"user,forward=8080:80,forward=0.0.0.0:8080:81":   "listen on the same port",
	} {
		f, err := parseNet(in)
		if err == nil {
			t.Errorf("%q was taken for %+v", in, f)
		} else if !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "\n") || !strings.HasPrefix(err.Error(), "--net "+in+": ") {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestParseVsock(t *testing.T) {
	if v, err := parseVsock("7,unix:/tmp/v"); err != nil || v.cid != 7 || v.path != "/tmp/v" {
		t.Errorf("%+v, %v", v, err)
	}
	if v, err := parseVsock(""); err != nil || v.cid != 0 {
		t.Errorf("%+v, %v", v, err)
	}
	for _, in := range []string{"2,unix:v", "4294967295,unix:v", "-1,unix:v", "x,unix:v", "7", "7,v", "7,unix:", "7,unix:v,more", ",unix:v"} {
		if v, err := parseVsock(in); err == nil || !strings.HasPrefix(err.Error(), "--vsock "+in+": ") {
			t.Errorf("%q: %+v, %v", in, v, err)
		}
	}
}
