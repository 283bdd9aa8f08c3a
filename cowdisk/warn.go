package cowdisk

import "log/slog"

// warnUnknownTime says of which overlays in a chain the backing file can change unnoticed: their headers have time 0, which means unknown.
// Block devices have no time that could be known.
func warnUnknownTime(log *slog.Logger, layers []*layer) {
	if log == nil {
		return
	}
	for i, l := range layers[:len(layers)-1] {
		base := layers[i+1]
		st, err := base.file.Stat()
		if err != nil || st.Device || l.hdr.MTime != 0 {
			continue
		}
		remedy := "rebase -u records its time"
		if st.mtime32() == 0 {
			remedy = "give the backing file a time (touch), then rebase -u"
		}
		log.Warn("the image does not know when its backing file was last changed, so a change will not be noticed", "image", l.path, "backing", base.path, "remedy", remedy)
	}
}
