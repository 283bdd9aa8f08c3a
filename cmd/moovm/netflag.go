package main

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/usernet"
	"github.com/moovm/moovm/virtiovsock"
)

// netFlag is one --net.
type netFlag struct {
	user     bool
	policy   usernet.Policy
	forwards []usernet.Forward
	tap      string
	mac      net.HardwareAddr
	mtu      int // 0 = 1500
}

const netUsage = "use none, user[,forward=[ADDRESS:]PORT:GUESTPORT][,allow=public|CIDR[:PORT]|NAME[:PORT]][,host] or tap=NAME, each with [,mac=MAC][,mtu=BYTES]"

// parseNet reads --net; nil is none.
func parseNet(s string) (*netFlag, error) {
	bad := func(format string, args ...any) (*netFlag, error) {
		return nil, fmt.Errorf("--net %s: %w", s, fmt.Errorf(format, args...))
	}
	words := splitCommas(s)
	f := &netFlag{}
	name, isTap := strings.CutPrefix(words[0], "tap=")
	switch {
	case words[0] == "none" || s == "":
		if len(words) > 1 {
			return bad("none has no options")
		}
		return nil, nil
	case words[0] == "user":
		f.user = true
	case isTap && name != "":
		f.tap = name
	default:
		return bad("there is no network %q; %s", words[0], netUsage)
	}
	var err error
	allow := false
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		switch {
		case key == "mac":
			f.mac, err = guest.ParseMAC(value)
		case key == "mtu":
			if f.mtu, err = strconv.Atoi(value); err != nil || f.mtu < 576 || f.mtu > 65535 {
				err = fmt.Errorf("mtu=%s: write a number from 576 to 65535", value)
			}
		case !f.user:
			err = fmt.Errorf("tap has no option %q; %s", w, netUsage)
		case w == "host":
			f.policy.Host = true
		case w == "allow=public":
			f.policy.Public, allow = true, true
		case key == "allow":
			var r usernet.Rule
			r, err = usernet.ParseRule(value)
			f.policy.Allow, allow = append(f.policy.Allow, r), true
		case key == "forward":
			var p usernet.Forward
			if p, err = usernet.ParseForward(value); err == nil {
				err = f.addForward(p)
			}
		default:
			err = fmt.Errorf("there is no option %q; %s", w, netUsage)
		}
		if err != nil {
			return bad("%w", err)
		}
	}
	if !allow {
		f.policy.Public = true
	}
	return f, nil
}

// addForward refuses one that would listen where another does.
func (f *netFlag) addForward(p usernet.Forward) error {
	for _, q := range f.forwards {
		a, b := q.Listen.Addr(), p.Listen.Addr()
		if p.Listen.Port() != 0 && p.Listen.Port() == q.Listen.Port() && (a == b || a.IsUnspecified() || b.IsUnspecified()) {
			return fmt.Errorf("the forwards %v and %v listen on the same port", q, p)
		}
	}
	f.forwards = append(f.forwards, p)
	return nil
}

// vsockFlag is --vsock CID,unix:PATH.
type vsockFlag struct {
	cid  uint32 // 0 = none
	path string
}

func parseVsock(s string) (v vsockFlag, err error) {
	if s == "" {
		return v, nil
	}
	words := splitCommas(s)
	cid, err := strconv.ParseUint(words[0], 10, 64)
	switch {
	case err != nil || cid < virtiovsock.MinCID || cid > virtiovsock.MaxCID:
		return v, fmt.Errorf("--vsock %s: the CID %q is no number from %d to %d", s, words[0], virtiovsock.MinCID, uint32(virtiovsock.MaxCID))
	case len(words) != 2:
		return v, errors.New("--vsock " + s + ": write CID,unix:PATH")
	}
	path, ok := strings.CutPrefix(words[1], "unix:")
	if !ok || path == "" {
		return v, errors.New("--vsock " + s + ": write CID,unix:PATH")
	}
	return vsockFlag{uint32(cid), path}, nil
}
