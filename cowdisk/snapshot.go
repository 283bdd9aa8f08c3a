package cowdisk

import "path/filepath"

// Snapshot freezes what the disk contains now and goes on in a new overlay at path: the image that was written so far becomes its backing
// file. Requests wait while it happens (a flush and the making of a small file). The new overlay gets the layout of the old one where that
// can be created, else v2. After an error the disk goes on as it was.
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
	return nil
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
