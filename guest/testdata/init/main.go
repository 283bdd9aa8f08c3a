// Command init is the smallest program that can be the init of a guest.
package main

import (
	"os"

	"github.com/moovm/moovm/guest"
)

func main() {
	if guest.IsInit() {
		guest.InitMain()
	}
	os.Exit(1)
}
