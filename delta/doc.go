// Package delta moves images between machines: as a stream of what an image
// holds, or of what it holds above one of the images that it stands on.
//
//	Export(image, since) ──▶ stream ──▶ Import(base) ──▶ a new overlay
//
// A stream has only what was allocated, compressed (zstd) and with a checksum
// for each piece. It says what it stands on by a digest of contents, so that it
// cannot be put on another base; where that lies, and how it is stored, does not
// matter. One that was cut off is resumed from the piece that was last put on
// disk.
//
// Streams come from anywhere: every length and place in them is checked.
package delta
