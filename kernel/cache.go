package kernel

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/moovm/moovm/internal/host"
)

const (
	// kernelCacheKeep is how many unpacked kernels stay in the cache.
	kernelCacheKeep = 6
	// kernelCacheRest is how long an entry is safe from removal after its last
	// use: another process may be about to open it.
	kernelCacheRest = time.Hour
	// kernelCacheFormat changes when the meaning of an entry does.
	kernelCacheFormat = "1"
)

// DefaultKernelCache is the folder of unpacked kernels in the user's cache
// ($MOOVM_CACHE, or moovm in the cache folder); empty when the user has none.
func DefaultKernelCache() string {
	dir, err := host.CacheDir()
	if err != nil {
		return ""
	}
	return filepath.Join(dir, "kernels")
}

// kernelCacheKey names the unpacked image of a kernel file. The head holds the
// build's version string and the start of the packed image; with size and
// modification time it identifies a file without reading all of it.
func kernelCacheKey(head []byte, st fs.FileInfo) string {
	h := sha256.New()
	h.Write([]byte("moovm kernel " + kernelCacheFormat))
	var n [16]byte
	binary.LittleEndian.PutUint64(n[:], uint64(st.Size()))
	binary.LittleEndian.PutUint64(n[8:], uint64(st.ModTime().UnixNano()))
	h.Write(n[:])
	h.Write(head)
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// The cached image keeps what the bzImage header said in its file name, so
// that an entry is one file and appears at once.
func (l KernelLoader) entries(key string) []string {
	m, _ := filepath.Glob(filepath.Join(l.CacheDir, key+"_*.vmlinux"))
	return m
}

// cached opens the image from the cache, or returns nil.
func (l KernelLoader) cached(key, path string) *Kernel {
	if l.CacheDir == "" {
		return nil
	}
	for _, name := range l.entries(key) {
		release, format, ok := parseCacheName(filepath.Base(name), key)
		if !ok {
			continue
		}
		k, err := openCached(name)
		if err != nil {
			os.Remove(name) // damaged, or gone already
			continue
		}
		k.Path, k.Release, k.Format = path, release, format
		markUsed(name)
		return k
	}
	return nil
}

// markUsed keeps the entry from being the oldest. Once a day is enough: on an
// overlay file system, each time copies the whole file.
func markUsed(name string) {
	now := time.Now()
	if st, err := os.Stat(name); err == nil && now.Sub(st.ModTime()) > 24*time.Hour {
		_ = os.Chtimes(name, now, now)
	}
}

func openCached(name string) (*Kernel, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("not a file")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	k := &Kernel{Path: name, r: f, size: st.Size(), file: f, elf: name, cached: true}
	if err := k.check(); err != nil {
		f.Close()
		return nil, err
	}
	return k, nil
}

func cacheName(key string, k *Kernel) string {
	return key + "_" + hex.EncodeToString([]byte(k.Release)) + "_" + hex.EncodeToString([]byte(k.Format)) + ".vmlinux"
}

func parseCacheName(name, key string) (release, format string, ok bool) {
	name = name[len(key)+1 : len(name)-len(".vmlinux")]
	i := slices.Index([]byte(name), '_')
	if i < 0 {
		return "", "", false
	}
	r, err1 := hex.DecodeString(name[:i])
	f, err2 := hex.DecodeString(name[i+1:])
	return string(r), string(f), err1 == nil && err2 == nil
}

// store puts k's image into the cache and returns the kernel to use: the
// cached one, which needs no memory, or k itself when the cache cannot take it.
func (l KernelLoader) store(key string, k *Kernel) *Kernel {
	if l.CacheDir == "" || len(k.Release) > 64 {
		return k
	}
	if err := os.MkdirAll(l.CacheDir, 0o700); err != nil {
		return k
	}
	name := filepath.Join(l.CacheDir, cacheName(key, k))
	t, err := os.CreateTemp(l.CacheDir, "unpacking-*")
	if err != nil {
		return k
	}
	_, err = k.WriteTo(t)
	if err2 := t.Close(); err == nil {
		err = err2
	}
	if err == nil {
		err = os.Rename(t.Name(), name)
	}
	if err != nil {
		os.Remove(t.Name())
		return k
	}
	l.prune()
	c, err := openCached(name)
	if err != nil || c.size != k.size {
		if err == nil {
			c.Close()
		}
		return k
	}
	c.Path, c.Release, c.Format = k.Path, k.Release, k.Format
	return c
}

// prune removes the entries that were not used for longest, and what
// interrupted runs left behind.
func (l KernelLoader) prune() {
	type entry struct {
		name string
		used time.Time
	}
	var old []entry
	names, _ := filepath.Glob(filepath.Join(l.CacheDir, "*"))
	for _, n := range names {
		st, err := os.Stat(n)
		if err != nil || !st.Mode().IsRegular() {
			continue
		}
		if m, _ := filepath.Match("unpacking-*", filepath.Base(n)); m {
			if time.Since(st.ModTime()) > kernelCacheRest {
				os.Remove(n)
			}
			continue
		}
		if filepath.Ext(n) == ".vmlinux" {
			old = append(old, entry{n, st.ModTime()})
		}
	}
	slices.SortFunc(old, func(a, b entry) int { return b.used.Compare(a.used) })
	for i, e := range old {
		if i >= kernelCacheKeep && time.Since(e.used) > kernelCacheRest {
			os.Remove(e.name)
		}
	}
}
