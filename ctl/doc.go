// Package ctl lets other processes of the same user ask a running machine: what
// it is doing, to pause, to freeze its disks.
//
//	NewServer(machine) ── Serve ──▶ a UNIX socket, HTTP/1.1 and JSON ◀── Client, curl
//
// Any number of clients may ask at once; one that is slow, or dies, holds up
// nobody. Who may connect is decided by the socket: Listen makes it for this
// user alone, and looks at the credentials of those who connect.
//
// The interface is versioned by the first part of its paths. GET /version says
// which versions a server has; openapi.json, which it serves too, describes
// them.
package ctl
