package guest

import (
	"errors"
	"io"
)

var errSkeleton = errors.New("guest: not written yet")

// Modules is an opened …/lib/modules/RELEASE folder.
type Modules struct{ dir string }

// ModuleFile is one module in load order.
type ModuleFile struct {
	Name string // canonical: underscores
	Path string // on the host
}

// OpenModules: dir is …/lib/modules/RELEASE or any parent of it.
func OpenModules(dir, release string) (*Modules, error)                  { return nil, errSkeleton }
func (m *Modules) Resolve(names ...string) ([]ModuleFile, error)         { return nil, errSkeleton }
func (m *Modules) ResolveOptional(names ...string) ([]ModuleFile, error) { return nil, errSkeleton }

// Load returns the module's unpacked contents (.ko, from .ko, .ko.gz, .ko.xz or .ko.zst).
func (f ModuleFile) Load() ([]byte, error) { return nil, errSkeleton }

// Initramfs builds an archive.
type Initramfs struct {
	InitPath string       // host path of the static program that becomes /init
	Config   *InitConfig  // written to ConfigPath; Modules is filled in from Modules below
	Modules  []ModuleFile // copied to /moovm/modules, in load order
	Files    []File       // anything else
}

// File is an extra file of the initramfs: Data, or the contents of HostPath.
type File struct {
	Name     string // absolute path in the archive; parents are made
	Mode     uint32 // with type bits as in stat(2); no type bits = regular file
	Data     []byte
	HostPath string
	Rdev     uint32 // for device nodes
}

func (a *Initramfs) WriteTo(w io.Writer) (int64, error) { return 0, errSkeleton }
func (a *Initramfs) Bytes() ([]byte, error)             { return nil, errSkeleton }

func IsInit() bool { return false }
func InitMain()    {}
