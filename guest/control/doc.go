// Package control is what the host and the init of a guest say to each other:
// [InitConfig], which the init reads when it starts, and the frames of the
// control line, whose host's end is [Host].
//
// Neither end trusts the other's lengths. What the guest says costs the host an
// error at most.
package control
