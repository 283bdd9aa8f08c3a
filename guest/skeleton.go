package guest

// IsInit says whether this process is the init of a moovm guest.
func IsInit() bool { return false }

// InitMain is the init. It never returns.
func InitMain() {}
