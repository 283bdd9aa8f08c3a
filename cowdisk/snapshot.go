package cowdisk

import (
	"fmt"
	"path/filepath"
)

// Snapshot freezes what the disk contains now and goes on in a new overlay at path: the image that was written so far becomes its backing
// file. Requests wait while it happens (a flush and the making of a small file). The new overlay gets the layout of the old one where that
// can be created, else v2. After an error the disk goes on as it was.
//
// The frozen image is locked against writers only: other disks may be opened as overlays on it.
func (d *Disk) Snapshot(path string) error {
	if d.readOnly {
		return &Error{Path: d.path, Kind: ErrReadOnly, Detail: "it was opened read-only"}
	}
	if !d.gate.pause() {
		return d.errClosed()
	}
	defer d.gate.resume()
	old := d.chain.layers[0]
	if err := d.flush.run(d.flushPass); err != nil {
		return err
	}
	real, err := d.fs.Resolve(path)
	if err != nil {
		return err
	}
	backing := old.real
	if rel, err := filepath.Rel(filepath.Dir(real), old.real); err == nil && filepath.IsLocal(rel) {
		backing = rel
	}
	if err := old.file.SyncAll(); err != nil { // its time is on disk before a header relies on it
		return err
	}
	st, err := old.file.Stat()
	if err != nil {
		return err
	}
	if st.Nameless {
		return &Error{Path: d.path, Kind: ErrReadOnly, Detail: "it has no name any more, so that nothing can stand on it",
			Remedy: "make an overlay that stays (moovm create -b)"}
	}
	h := Header{Variant: QEMUV2, Size: d.size, SectorSize: sectorSize}
	if old.bm != nil && old.hdr.Variant == UMLV3 {
		h.Variant, h.Size, h.Alignment = UMLV3, old.hdr.Size, defaultAlign
	}
	// The backing file is locked by this disk, so what we know of it is used rather than opening it again.
	if err := h.setBacking(path, real, backing, old.asBacking(st.mtime32())); err != nil {
		return err
	}
	f, err := d.fs.Create(real)
	if err != nil {
		return renamed(err, real, path)
	}
	l, err := publishOverlay(f, path, real, h, d.memory)
	if err != nil {
		f.Close()
		return renamed(err, real, path)
	}
	l.backer = old.real
	if old.bm != nil {
		old.bm.movePending(l)
	}
	d.chain = newChain(append([]*layer{l}, d.chain.layers...))
	if s, ok := old.file.(lockSharer); ok {
		s.shareLock() // else nobody but this disk can open it
	}
	return nil
}

// lockSharer is a File whose lock can be changed into that of one opened for reading.
type lockSharer interface{ shareLock() }

// Become makes d what n is: from then on d reads and writes n's files, and what d had is closed as it is, without a flush. n is closed for
// its user. It is how a disk goes back to what it was: n is then a new overlay on an image that Snapshot froze. Requests wait while it
// happens. The two have one size, and either both or neither were opened read-only (ErrSize, ErrReadOnly). d.Path stays what it was.
func (d *Disk) Become(n *Disk) error {
	switch {
	case d.size != n.size:
		return &Error{Path: n.path, Kind: ErrSize, Detail: fmt.Sprintf("%d bytes, %s has %d", n.size, d.path, d.size)}
	case d.readOnly != n.readOnly:
		return &Error{Path: n.path, Kind: ErrReadOnly, Detail: "one of the two disks was opened read-only, the other was not"}
	}
	if !d.gate.pause() {
		return d.errClosed()
	}
	defer d.gate.resume()
	if bm := d.chain.layers[0].bm; bm != nil && bm.shared() {
		return &Error{Path: d.path, Kind: ErrLocked, Detail: "what it has pending is shared with another program", Remedy: "end that program first"}
	}
	if !n.gate.close() {
		return n.errClosed()
	}
	old := d.chain
	d.chain = n.chain
	d.written.Store(true) // n's may not be flushed
	d.failed.Store(n.failed.Load())
	return closeLayers(old.layers)
}

// publishOverlay makes f an image and the top layer of a chain. Image and name are on disk when it
// returns: the layer below will not be written any more.
func publishOverlay(f NewFile, path, real string, h Header, memory int64) (*layer, error) {
	l, err := newImage(f, path, real, h, nil, memory)
	if err != nil {
		return nil, err
	}
	l.write = true
	return l, f.Publish(false, true)
}
