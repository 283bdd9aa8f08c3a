package guestinit

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/internal/agent"
)

// clockSlack is how far off a wall clock may be that is left alone: stepping it
// for less does more harm than good.
const clockSlack = time.Second

// takeIdentity makes this guest another one than that which it is a copy of. The
// kernel's random numbers come first: nothing else of the clone may ask for some
// that its twins have, too.
func takeIdentity(id agent.Identity) error {
	if len(id.Entropy) > 0 {
		if err := reseed(id.Entropy); err != nil {
			return fmt.Errorf("the kernel's random numbers cannot be reseeded: %w", err)
		}
	}
	if id.Time != 0 {
		if d := time.Until(time.Unix(0, id.Time)); d.Abs() > clockSlack {
			ts := unix.NsecToTimespec(id.Time)
			if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
				return fmt.Errorf("the clock cannot be set: %w", err)
			}
		}
	}
	if id.Hostname != "" {
		if err := unix.Sethostname([]byte(id.Hostname)); err != nil {
			return fmt.Errorf("the host name cannot be set: %w", err)
		}
	}
	if id.MachineID != "" {
		if err := os.WriteFile("/etc/machine-id", []byte(id.MachineID+"\n"), 0o444); err != nil {
			return fmt.Errorf("the machine-id cannot be set: %w", err)
		}
	}
	if id.Forget {
		dropCaches()
	}
	return nil
}

// reseed mixes bytes of the host into the kernel's random numbers and makes it
// use them at once (random(4)). Writing them to /dev/urandom would not do that.
func reseed(entropy []byte) error {
	f, err := os.OpenFile("/dev/urandom", os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w; is /dev a devtmpfs?", err)
	} else if err != nil {
		return err
	}
	defer f.Close()
	return addEntropy(int(f.Fd()), entropy)
}
