package control

// ShareTag is the 9P tag of the control line's share.
const ShareTag = "moovm.control"

// The files of that share.
const (
	ToHost   = "to-host"
	FromHost = "from-host"
)
