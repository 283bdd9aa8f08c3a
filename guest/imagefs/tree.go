package imagefs

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hugelgupf/p9/p9"

	"github.com/moovm/moovm/internal/bytejson"
)

// Tree is the metadata tree of a machine. It is a p9.Attacher and may serve
// any number of sessions at a time.
type Tree struct {
	version string
	disks   []Disk
	links   []link // disks/by-serial
	now     func() time.Time
	born    time.Time
	seed    maphash.Seed

	maxWalk time.Duration
	held    atomic.Int64 // bytes of text that open files hold

	mu    sync.Mutex
	nodes map[string]*identity // by path; as many as the tree has files
}

type link struct{ name, target string }

// New returns the tree of a machine with these disks; version is what the
// file of that name says after "moovm ". An error is an ErrDisk.
func New(version string, disks ...Disk) (*Tree, error) {
	t := &Tree{
		version: version,
		disks:   slices.Clone(disks),
		now:     time.Now,
		born:    time.Now(),
		seed:    maphash.MakeSeed(),
		nodes:   make(map[string]*identity),
		maxWalk: maxWalk,
	}
	names := make(map[string]bool)
	serials := make(map[string]bool)
	for i := range t.disks {
		d := &t.disks[i]
		if err := d.validate(); err != nil {
			return nil, err
		}
		if names[d.Name] {
			return nil, fmt.Errorf("%w: there are two called %q", ErrDisk, d.Name)
		}
		names[d.Name] = true
		if d.Serial == "" {
			continue
		}
		name := fileName(d.Serial)
		for n := 2; serials[name]; n++ { // two disks, one serial: show both
			name = fmt.Sprintf("%s~%d", fileName(d.Serial), n)
		}
		serials[name] = true
		t.links = append(t.links, link{name, "../" + d.Name})
	}
	return t, nil
}

// Attach implements p9.Attacher.
func (t *Tree) Attach() (p9.File, error) {
	return &file{n: t.root()}, nil
}

// node is a file, a folder or a symbolic link of the tree.
type node struct {
	*Tree
	*identity
	name     string
	children func() []*node    // a folder's contents, in order
	content  func() content    // a file's contents now
	target   string            // of a link
	key      func() (k uint64) // cheap, and moves when contents may have; nil: ask content
}

// identity is what stays the same of a node while the tree is alive.
type identity struct {
	qid p9.QID

	mu    sync.Mutex
	seen  bool
	sum   uint64 // of the contents when last looked at
	size  int64
	key   uint64 // of the contents when they were last measured
	mtime time.Time
	text  *text // the latest of a map that is held
}

// identify returns the identity of the node at path.
func (t *Tree) identify(path string, typ p9.QIDType) *identity {
	t.mu.Lock()
	defer t.mu.Unlock()
	id := t.nodes[path]
	if id == nil {
		id = &identity{qid: p9.QID{Type: typ, Path: uint64(len(t.nodes) + 1)}, mtime: t.born}
		t.nodes[path] = id
	}
	return id
}

func (t *Tree) dir(path string, children func() []*node) *node {
	return &node{Tree: t, identity: t.identify(path, p9.TypeDir), name: base(path), children: children}
}

func (t *Tree) file(path string, c func() content) *node {
	return &node{Tree: t, identity: t.identify(path, p9.TypeRegular), name: base(path), content: c}
}

// text is a file whose contents are made when it is opened.
func (t *Tree) text(path string, f func() []byte) *node {
	return t.file(path, func() content { return t.bytes(f()) })
}

func (t *Tree) bytes(b []byte) content { return fixed{b, maphash.Bytes(t.seed, b)} }

func base(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

func (t *Tree) root() *node {
	return t.dir("", func() []*node {
		return []*node{
			t.dir("disks", t.diskNodes),
			t.text("version", func() []byte { return []byte("moovm " + t.version + "\n") }),
		}
	})
}

func (t *Tree) diskNodes() []*node {
	nodes := []*node{t.dir("disks/"+bySerial, t.linkNodes)}
	for i := range t.disks {
		d := &t.disks[i]
		path := "disks/" + d.Name
		nodes = append(nodes, t.dir(path, func() []*node {
			chain := t.dir(path+"/chain", func() []*node { return t.layerNodes(path+"/chain/", d) })
			return append(t.files(path, d, d.Image, 0), chain)
		}))
	}
	return nodes
}

func (t *Tree) linkNodes() []*node {
	var nodes []*node
	for _, l := range t.links {
		path := "disks/" + bySerial + "/" + l.name
		nodes = append(nodes, &node{Tree: t, identity: t.identify(path, p9.TypeSymlink), name: l.name, target: l.target})
	}
	return nodes
}

// layerNodes is what a chain folder holds now: the chain can grow.
func (t *Tree) layerNodes(path string, d *Disk) []*node {
	var nodes []*node
	for i, l := range d.Image.Chain() {
		path := path + strconv.Itoa(i)
		nodes = append(nodes, t.dir(path, func() []*node { return t.files(path, d, l, i) }))
	}
	return nodes
}

// files are the files of a disk or of one of its layers.
func (t *Tree) files(path string, d *Disk, l Layer, depth int) []*node {
	value := func(name string, f func() any) *node {
		return t.text(path+"/"+name, func() []byte { return fmt.Appendln(nil, f()) })
	}
	bitmap := t.file(path+"/bitmap", func() content { return liveBitmap{l} })
	extents := t.file(path+"/map", func() content { return newExtentMap(t, d, l) })
	// Measuring a map takes a walk over the whole disk: not without reason.
	extents.key = func() uint64 {
		var b []byte
		b = fmt.Append(b, l.Allocated(), l.Info().ActualSize)
		if depth == 0 {
			for _, c := range d.counters() {
				if c.Name != "in_flight" && !strings.Contains(c.Name, "read") {
					b = fmt.Append(b, c)
				}
			}
		}
		return maphash.Bytes(t.seed, b)
	}
	return []*node{
		value("allocated", func() any { return l.Allocated() }),
		value("backing_file", func() any { return l.Info().BackingFilename }),
		bitmap,
		value("format", func() any { return l.Info().Format }),
		t.text(path+"/header", l.HeaderBytes),
		t.text(path+"/info", func() []byte {
			b, err := bytejson.Marshal(d.info(l))
			if err != nil {
				return nil // an Info is plain data: this does not happen
			}
			var out bytes.Buffer
			_ = json.Indent(&out, b, "", "  ") // it is JSON
			return append(out.Bytes(), '\n')
		}),
		extents,
		value("mtime", func() any {
			if s := l.Info().FormatSpecific; s != nil {
				return s.MTime
			}
			return 0
		}),
		value("read_only", func() any {
			if d.ReadOnly || depth > 0 {
				return 1
			}
			return 0
		}),
		value("sector_size", func() any {
			if s := l.Info().FormatSpecific; s != nil && s.SectorSize > 0 {
				return s.SectorSize
			}
			return 512
		}),
		value("serial", func() any { return d.Serial }),
		value("size", func() any { return l.Size() }),
		t.text(path+"/stats", func() []byte {
			var b bytes.Buffer
			if depth == 0 { // the layers below count nothing
				for _, c := range d.counters() {
					fmt.Fprintln(&b, c.Name, c.Value)
				}
			}
			return b.Bytes()
		}),
		value("variant", func() any {
			if s := l.Info().FormatSpecific; s != nil {
				return s.Variant
			}
			return l.Info().Format
		}),
	}
}

// observe looks at the node's contents: how long they are, and when they were
// seen to have changed.
func (n *node) observe(c content) (size int64, mtime time.Time) {
	if c == nil && n.content == nil {
		return 0, n.mtime
	}
	n.identity.mu.Lock() // one at a time: measuring may be work
	defer n.identity.mu.Unlock()
	var key uint64
	if n.key != nil {
		key = n.key()
		if n.seen && key == n.identity.key {
			return n.size, n.mtime
		}
	}
	if c == nil {
		c = n.content()
	}
	size, sum := c.measure()
	if n.seen && (sum != n.sum || size != n.size) {
		now := n.now()
		if !now.After(n.mtime) {
			now = n.mtime.Add(1)
		}
		n.mtime = now
	}
	n.seen, n.sum, n.size, n.identity.key = true, sum, size, key
	return size, n.mtime
}
