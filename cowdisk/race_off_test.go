//go:build !race

package cowdisk

const raceEnabled = false
