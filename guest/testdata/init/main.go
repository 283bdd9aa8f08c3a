// Command init is the smallest program that can be the init of a guest.
package main

import (
	"os"

	"github.com/moovm/moovm/guest/guestinit"
)

func main() {
	if guestinit.IsInit() {
		guestinit.Main()
	}
	os.Exit(1)
}
