// Package lineage knows which images stand on which.
//
// An overlay names its base; a base knows nothing of its overlays. Who wants to
// remove, move or write a base must look at all that might stand on it: [Scan]
// reads the headers of all images below some folders and makes a [Forest] of
// them, and [Forest.StandingOn] answers. [Remove] is the removal that asks
// first.
//
// Headers are not trusted: what one names outside of the folders that were
// scanned is told, and not looked at.
package lineage
