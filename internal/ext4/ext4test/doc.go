// Package ext4test is for tests that make ext4 file systems: Check asks
// e2fsck, and Read reads one back.
package ext4test
