package control

// ShareTag is the 9P tag of the control line's share.
const ShareTag = "moovm.control"

// ModulesTag is the 9P tag of the kernel's modules.
const ModulesTag = "moovm.modules"

// The files of the control line's share.
const (
	ToHost   = "to-host"
	FromHost = "from-host"
)
