// Package unixsock makes the UNIX sockets that this module's servers listen on:
// for this user alone from their first moment, and in the place of one that a
// killed process has left behind.
package unixsock
