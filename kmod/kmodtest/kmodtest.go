// Package kmodtest makes kernel modules and folders of them, for tests.
package kmodtest

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moovm/moovm/internal/unpack/unpacktest"
	"github.com/moovm/moovm/kernel/kerneltest"
)

// Module is an ELF object with a .modinfo section, as little as a module can be.
func Module(info ...string) []byte {
	modinfo := []byte(strings.Join(info, "\x00") + "\x00")
	names := []byte("\x00.modinfo\x00.shstrtab\x00")
	var b bytes.Buffer
	off := uint64(64)
	h := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1},
		Type:  uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64,
		Shoff: off + uint64(len(modinfo)+len(names)), Shentsize: 64, Shnum: 3, Shstrndx: 2,
	}
	_ = binary.Write(&b, binary.LittleEndian, h)
	b.Write(modinfo)
	b.Write(names)
	for _, s := range []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: off, Size: uint64(len(modinfo))},
		{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: off + uint64(len(modinfo)), Size: uint64(len(names))},
	} {
		_ = binary.Write(&b, binary.LittleEndian, s)
	}
	return b.Bytes()
}

// Tree writes lib/modules/RELEASE below a new folder. It has modules
// packed in every way, a circle, soft dependencies and something built in.
func Tree(t testing.TB, depmod bool) (root, dir string) {
	t.Helper()
	root = t.TempDir()
	dir = filepath.Join(root, "lib/modules", kerneltest.Release)
	magic := "vermagic=" + kerneltest.Release + " SMP mod_unload"
	packed := func(name string, info ...string) []byte {
		return unpacktest.Pack(t, Module(append(info, magic)...))[name]
	}
	for name, data := range map[string][]byte{
		"kernel/drivers/virtio/virtio.ko":         Module("depends=virtio_ring", magic),
		"kernel/drivers/virtio/virtio_ring.ko.xz": packed("xz", "depends="),
		"kernel/drivers/virtio/virtio_pci.ko.zst": packed("zstd", "depends=virtio,virtio_ring"),
		"kernel/drivers/block/virtio-blk.ko.gz":   packed("gzip", "depends=virtio", "alias=virtio:d00000002v*"),
		"kernel/fs/ext4/ext4.ko":                  Module("depends=jbd2,mbcache", "softdep=pre: crypto-crc32c", "alias=fs-ext4", magic),
		"kernel/fs/jbd2/jbd2.ko":                  Module("softdep=pre: crypto-crc32c post: after", "depends=", magic),
		"kernel/fs/mbcache.ko":                    Module("depends=built_in", magic),
		"kernel/fs/after.ko":                      Module("depends=", magic),
		"kernel/crypto/crc32c_generic.ko":         Module("alias=crypto-crc32c-generic", "alias=crypto-crc32c", magic),
		"kernel/arch/x86/crypto/crc32c-intel.ko":  Module("alias=crypto-crc32c", "alias=cpu:type:x86,ven*fam*mod*:feature:*0094*", magic),
		"kernel/misc/round.ko":                    Module("depends=about", magic),
		"kernel/misc/about.ko":                    Module("depends=round", magic),
		"kernel/misc/broken.ko":                   Module("depends=nowhere", magic),
		"kernel/misc/not.ko":                      []byte("not a module"),
		"modules.builtin":                         []byte("kernel/lib/built-in.ko\n"),
		"modules.builtin.modinfo":                 []byte("built_in.alias=fs-proc\x00built_in.license=GPL\x00"),
		"modules.order":                           []byte("kernel/fs/ext4/ext4.ko\n"),
		"build/extra.ko":                          Module(magic),
	} {
		write(t, filepath.Join(dir, name), data)
	}
	if depmod {
		write(t, filepath.Join(dir, "modules.dep"), []byte(`kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko.xz
kernel/drivers/virtio/virtio_ring.ko.xz:
kernel/drivers/virtio/virtio_pci.ko.zst: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko.xz
kernel/drivers/block/virtio-blk.ko.gz: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko.xz
kernel/fs/ext4/ext4.ko: kernel/fs/mbcache.ko kernel/fs/jbd2/jbd2.ko
kernel/fs/jbd2/jbd2.ko:
kernel/fs/mbcache.ko:
kernel/fs/after.ko:
kernel/crypto/crc32c_generic.ko:
kernel/arch/x86/crypto/crc32c-intel.ko:
kernel/misc/round.ko: kernel/misc/about.ko
kernel/misc/about.ko: kernel/misc/round.ko
kernel/misc/broken.ko: kernel/misc/nowhere.ko
`))
		write(t, filepath.Join(dir, "modules.softdep"), []byte("# comment\nsoftdep ext4 pre: crypto-crc32c\nsoftdep jbd2 pre: crypto-crc32c\nsoftdep jbd2 post: after\nsoftdep mbcache ignored\n"))
		write(t, filepath.Join(dir, "modules.alias"), []byte(`# Aliases extracted from modules themselves.
alias fs-ext4 ext4
alias virtio:d00000002v* virtio_blk
alias crypto-crc32c crc32c_generic
alias crypto-crc32c-generic crc32c_generic
alias crypto-crc32c crc32c_intel
`))
	}
	return root, dir
}

func write(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}
