package guestinit

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/moovm/moovm/guest/control"
)

// account is who a command runs as.
type account struct {
	cred syscall.Credential
	env  []string
}

// lookAccount finds who is meant by NAME, UID, NAME:GROUP or UID:GID, by the
// root file system's own /etc/passwd and /etc/group. nil = root.
func lookAccount(user string) (*account, error) {
	if user == "" {
		return nil, nil
	}
	a, err := readAccount(user, "/etc/passwd", "/etc/group")
	if err != nil {
		return nil, &stageError{control.FailCommand, 126, err}
	}
	return a, nil
}

func readAccount(user, passwd, group string) (*account, error) {
	name, groupName, hasGroup := strings.Cut(user, ":")
	a := &account{}
	home, found := "/", false
	err := eachLine(passwd, 7, func(f []string) bool {
		if f[0] != name && f[2] != name {
			return true
		}
		uid, err1 := parseID(f[2])
		gid, err2 := parseID(f[3])
		if err1 != nil || err2 != nil {
			return true
		}
		a.cred.Uid, a.cred.Gid = uid, gid
		name, home, found = f[0], f[5], true
		return false
	})
	if err != nil {
		return nil, err
	}
	if !found {
		if a.cred.Uid, err = parseID(name); err != nil {
			return nil, fmt.Errorf("the guest's %s knows no user %.80q", passwd, name)
		}
	}
	found = false
	err = eachLine(group, 4, func(f []string) bool {
		gid, err := parseID(f[2])
		switch {
		case err != nil:
		case hasGroup && (f[0] == groupName || f[2] == groupName):
			a.cred.Gid, found = gid, true
			return false
		case !hasGroup && slices.Contains(strings.Split(f[3], ","), name):
			a.cred.Groups = append(a.cred.Groups, gid)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	if hasGroup && !found {
		if a.cred.Gid, err = parseID(groupName); err != nil {
			return nil, fmt.Errorf("the guest's %s knows no group %.80q", group, groupName)
		}
	}
	// As initgroups(3) has it: the first group is one of all.
	if !slices.Contains(a.cred.Groups, a.cred.Gid) {
		a.cred.Groups = append([]uint32{a.cred.Gid}, a.cred.Groups...)
	}
	a.env = []string{"HOME=" + home, "USER=" + name, "LOGNAME=" + name}
	return a, nil
}

func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err
}

// eachLine calls f with the fields of each line that has that many; a file that
// is not there has none.
func eachLine(path string, fields int, f func([]string) bool) error {
	r, err := os.Open(path)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer r.Close()
	lines := bufio.NewScanner(io.LimitReader(r, 16<<20))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if parts := strings.Split(lines.Text(), ":"); len(parts) >= fields && !f(parts) {
			return nil
		}
	}
	return lines.Err()
}

// own gives the command's streams to who it runs as: programs open them anew
// by /dev/stdout.
func (a *account) own(files ...*os.File) {
	if a == nil {
		return
	}
	for _, f := range files {
		_ = f.Chown(int(a.cred.Uid), -1)
	}
}

// attributes are those of the process, which runs as a.
func (a *account) attributes(s *syscall.SysProcAttr) *syscall.SysProcAttr {
	if a != nil {
		s.Credential = &a.cred
	}
	return s
}
