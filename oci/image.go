package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Config is what an image says about the program that it is for.
type Config struct {
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	Env        []string `json:"env,omitempty"`
	User       string   `json:"user,omitempty"` // NAME, UID, and either with :GROUP
	WorkingDir string   `json:"working-dir,omitempty"`
}

// Command is what is run for the arguments: behind the entrypoint, and instead
// of Cmd if there are any. It may be empty.
func (c Config) Command(args []string) []string {
	if len(args) == 0 {
		args = c.Cmd
	}
	return append(append([]string(nil), c.Entrypoint...), args...)
}

// Options say which image is opened, and how.
type Options struct {
	// Platform as "linux/arm64" or "linux/arm/v7"; "" = linux/amd64.
	Platform string
	// Mirrors are asked before the registry whose name is the key, as
	// "docker.io": names with their port, "http://" in front of those without TLS.
	Mirrors map[string][]string
	// Stdin is what the reference "-" means.
	Stdin io.Reader
	// TempDir is where what comes from Stdin is kept, and layers without a cache; "" = os.TempDir.
	TempDir string
	// Stall is how long a registry may say nothing; 0 = a minute.
	Stall time.Duration
}

func (o *Options) setDefaults() error {
	if o.Platform == "" {
		o.Platform = "linux/amd64"
	}
	if o.Stall == 0 {
		o.Stall = time.Minute
	}
	if _, err := o.platform(); err != nil {
		return err
	}
	return nil
}

func (o *Options) platform() (*v1.Platform, error) {
	p, err := v1.ParsePlatform(o.Platform)
	if err != nil || p.OS == "" || p.Architecture == "" {
		return nil, fmt.Errorf("%w: the platform %q; write linux/amd64", ErrReference, o.Platform)
	}
	return p, nil
}

// Image is an image that was found; its layers are not read yet.
type Image struct {
	// Digest names the image: its manifest's, or its configuration's where
	// docker save left no manifest.
	Digest string
	// Name is what it was found by.
	Name    string
	Config  Config
	Created time.Time // zero if it does not say

	layers []layer
	stall  time.Duration
	temp   string
	close  func() error
}

// layer is one of an image.
type layer struct {
	digest string
	size   int64 // bytes as they come; -1 = not known
	remote bool  // over the network: kept in the cache, and waited for
	open   func(context.Context) (io.ReadCloser, error)
}

// Close frees what the image holds open.
func (m *Image) Close() error {
	if m.close == nil {
		return nil
	}
	return m.close()
}

// Size is the number of bytes of all layers as they come, packed or not.
func (m *Image) Size() (n int64) {
	for _, l := range m.layers {
		n += max(l.size, 0)
	}
	return n
}

// Layers is their number.
func (m *Image) Layers() int { return len(m.layers) }

// Open finds an image. ref is a file or folder if there is one of that name
// (FILE, or FILE#NAME where several images are in it), "-" is
// Options.Stdin; anything else is a name in a registry, as docker pull takes
// it. A name that begins with docker:// is one in any case.
//
// Errors: those of this package, of the file system and of the network.
func Open(ctx context.Context, ref string, o Options) (*Image, error) {
	err := o.setDefaults()
	var m *Image
	if err == nil {
		m, err = open(ctx, ref, o)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", ref, err)
	}
	m.Name, m.stall, m.temp = ref, o.Stall, o.TempDir
	return m, nil
}

func open(ctx context.Context, ref string, o Options) (*Image, error) {
	if name, ok := strings.CutPrefix(ref, "docker://"); ok {
		return openRegistry(ctx, name, o)
	}
	if ref == "-" {
		return openStream(ctx, o)
	}
	if path, name, ok := Local(ref); ok {
		return openLocal(path, name, o)
	}
	return openRegistry(ctx, ref, o)
}

// Local says whether a reference is a file or folder of this machine, and
// which image in it is meant.
func Local(ref string) (path, name string, ok bool) {
	if _, err := os.Stat(ref); err == nil {
		return ref, "", true
	}
	if i := strings.LastIndexByte(ref, '#'); i > 0 {
		if _, err := os.Stat(ref[:i]); err == nil {
			return ref[:i], ref[i+1:], true
		}
	}
	// What begins like a path is never a name in a registry.
	return ref, "", strings.HasPrefix(ref, "/") || strings.HasPrefix(ref, "./") || strings.HasPrefix(ref, "../")
}

// maxLayers is more than any builder makes.
const maxLayers = 1000

// setConfig reads an image's configuration, whose layers number n.
func (m *Image) setConfig(raw []byte, n int) (*v1.ConfigFile, error) {
	var c v1.ConfigFile
	if err := json.Unmarshal(raw, &c); err != nil {
		return nil, fmt.Errorf("%w: its configuration: %w", ErrNotImage, err)
	}
	if c.RootFS.Type != "" && c.RootFS.Type != "layers" || len(c.RootFS.DiffIDs) != n || n == 0 {
		return nil, fmt.Errorf("%w: its configuration has %d layers, its manifest %d", ErrNotImage, len(c.RootFS.DiffIDs), n)
	}
	if n > maxLayers {
		return nil, fmt.Errorf("%w: %d layers, of %d", ErrTooLarge, n, maxLayers)
	}
	m.Config = Config{Entrypoint: c.Config.Entrypoint, Cmd: c.Config.Cmd, Env: c.Config.Env, User: c.Config.User, WorkingDir: c.Config.WorkingDir}
	m.Created = c.Created.UTC()
	if c.Created.IsZero() {
		m.Created = time.Time{}
	}
	return &c, nil
}

// checkPlatform compares what a configuration says with what was asked for.
func checkPlatform(c *v1.ConfigFile, want *v1.Platform) error {
	if c.OS != "" && c.OS != want.OS || c.Architecture != "" && c.Architecture != want.Architecture {
		return fmt.Errorf("%w %s: this one is for %s/%s", ErrPlatform, want, c.OS, c.Architecture)
	}
	return nil
}

// readSmall reads a document of at most 8 MiB.
func readSmall(r io.Reader) ([]byte, error) {
	const most = 8 << 20
	b, err := io.ReadAll(io.LimitReader(r, most+1))
	if err == nil && len(b) > most {
		err = fmt.Errorf("%w: a document of more than %d bytes", ErrTooLarge, most)
	}
	return b, err
}

var errStop = errors.New("no longer needed")
