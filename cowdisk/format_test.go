package cowdisk

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// forged makes dir/guest.img: a raw disk into whose first sectors a guest wrote the header of an image on a neighbour of the file.
func forged(t *testing.T, dir string, f fixture) (path string, disk []byte) {
	t.Helper()
	writeFile(t, filepath.Join(dir, "secret"), bytes.Repeat([]byte("secret! "), 8192))
	f.size = 65536
	disk = make([]byte, 1<<20)
	copy(disk, f.image(make([]byte, f.size), func(int) bool { return false }))
	path = filepath.Join(dir, "guest.img")
	writeFile(t, path, disk)
	return path, disk
}

// Nothing that a guest wrote into its raw disk makes a tool follow it to another file, unless the user says that it is an image.
func TestForgedHeader(t *testing.T) {
	for _, mark := range []string{"", "\x00moovmRAW", "\x00moovmCOW"} {
		dir := t.TempDir()
		guest, disk := forged(t, dir, fixture{variant: QEMUV2, backing: "secret" + mark})
		over := filepath.Join(dir, "over.cow")
		refused := func(what string, err error) {
			t.Helper()
			if !errors.Is(err, ErrFormat) || err != nil && !strings.Contains(err.Error(), "format=cow") {
				t.Errorf("%s: %v", what, err)
			}
		}
		refused("create", Create(over, CreateOptions{Backing: "guest.img"}))
		refused("create v3", Create(over, CreateOptions{Backing: guest, Variant: UMLV3}))
		_, err := OpenAny(guest, Options{})
		refused("open", err)
		refused("flatten", Flatten(t.Context(), guest, filepath.Join(dir, "out"), VariantUnknown, ToolOptions{}))
		_, err = Compare(t.Context(), guest, guest, ToolOptions{})
		refused("compare", err)
		_, err = Compare(t.Context(), filepath.Join(dir, "secret"), guest, ToolOptions{})
		refused("compare's second", err)
		plain := filepath.Join(dir, "plain.cow")
		mustCreate(t, plain, CreateOptions{Size: 4096})
		refused("rebase", Rebase(t.Context(), plain, "guest.img", ToolOptions{}))
		refused("rebase -u", RebaseHeader(plain, "guest.img", ToolOptions{}))
		_, err = Open(plain, Options{Backing: guest})
		refused("a backing file named by option", err)
		// Nothing was made.
		for _, name := range []string{"over.cow", "out"} {
			if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
				t.Errorf("%s was made", name)
			}
		}
		// Named, it is what it is: as a raw disk it shows its own bytes, for good.
		mustCreate(t, over, CreateOptions{Backing: "guest.img", BackingFormat: FormatRaw})
		d := mustOpen(t, over, Options{})
		wantSame(t, "raw", contents(t, d), disk)
		d.Close()
		top := filepath.Join(dir, "top.cow")
		mustCreate(t, top, CreateOptions{Backing: "over.cow", BackingFormat: FormatCOW})
		d = mustOpen(t, top, Options{})
		wantSame(t, "raw below two", contents(t, d), disk)
		d.Close()
		if err := Rebase(t.Context(), plain, "guest.img", ToolOptions{OtherFormat: FormatRaw}); err != nil {
			t.Fatal(err)
		}
		if err := RebaseHeader(plain, "guest.img", ToolOptions{OtherFormat: FormatRaw}); err != nil {
			t.Fatal(err)
		}
		if h := headerOf(t, plain); h.BackingFormat != FormatRaw {
			t.Errorf("recorded %v", h.BackingFormat)
		}
		// What a guest writes later into an image's overlay and a tool puts at the start of a raw disk is no header either.
		flat := filepath.Join(dir, "flat.img")
		if err := Flatten(t.Context(), over, flat, VariantUnknown, ToolOptions{Options: Options{Format: FormatCOW}}); err != nil {
			t.Fatal(err)
		}
		_, err = OpenAny(flat, Options{})
		refused("flattened", err)
		w := mustOpen(t, over, Options{})
		if err := w.Snapshot(filepath.Join(dir, "snap.cow")); err != nil {
			t.Fatal(err)
		}
		w.Close()
		if h := headerOf(t, filepath.Join(dir, "snap.cow")); h.BackingFormat != FormatCOW {
			t.Errorf("snapshot recorded %v", h.BackingFormat)
		}
	}
}

// A header that names no other file is not believed either: a guest would choose its disk's size by it, and hide what is on it.
func TestForgedStandalone(t *testing.T) {
	dir := t.TempDir()
	img, raw := filepath.Join(dir, "alone"), filepath.Join(dir, "raw.img")
	mustCreate(t, img, CreateOptions{Size: 65536, Variant: UMLV3})
	writeFile(t, raw, make([]byte, 65536))
	unnamed := ToolOptions{Options: Options{Format: FormatRaw}}
	_, open := OpenAny(img, Options{})
	_, first := Compare(t.Context(), img, raw, ToolOptions{OtherFormat: FormatRaw})
	_, second := Compare(t.Context(), raw, img, unnamed)
	over := filepath.Join(dir, "over.cow")
	for what, err := range map[string]error{
		"open": open, "compare": first, "compare with": second,
		"create":  Create(over, CreateOptions{Backing: "alone"}),
		"flatten": Flatten(t.Context(), img, filepath.Join(dir, "flat"), VariantUnknown, ToolOptions{}),
		"rebase":  openBackingOf(t, img, raw),
	} {
		if !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for f, size := range map[Format]int64{FormatCOW: 65536, FormatRaw: fileSize(t, img)} {
		mustCreate(t, over+f.String(), CreateOptions{Backing: "alone", BackingFormat: f})
		if h := headerOf(t, over+f.String()); h.BackingFormat != f {
			t.Errorf("recorded %v", h.BackingFormat)
		}
		d, err := OpenAny(img, Options{Format: f, ReadOnly: true})
		if err != nil || d.Size() != roundUp(size, sectorSize) || d.Info().Format != f.String() {
			t.Errorf("%v: %v", f, err)
		}
		d.Close()
	}
}

// openBackingOf gives an image a backing file that the caller says no format of.
func openBackingOf(t *testing.T, backing, raw string) error {
	over := filepath.Join(t.TempDir(), "o.cow")
	mustCreate(t, over, CreateOptions{Backing: raw, BackingFormat: FormatRaw})
	return RebaseHeader(over, backing, ToolOptions{})
}

func fileSize(t *testing.T, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}

// An image that says nothing about its base, as other programs make them: the base is raw, and if it looks like an image it is not opened.
func TestUnmarkedBase(t *testing.T) {
	for _, f := range allFixtures {
		dir := t.TempDir()
		_, disk := forged(t, dir, fixture{variant: QEMUV2, backing: "secret"})
		f.backing, f.size = "guest.img", 1<<20
		img := filepath.Join(dir, "old.cow")
		none := func(int) bool { return false }
		writeFile(t, img, f.image(disk, none))
		if _, err := Open(img, Options{ReadOnly: true}); !errors.Is(err, ErrFormat) {
			t.Errorf("%v: %v", f.variant, err)
		}
		d, err := Open(img, Options{ReadOnly: true, BackingFormat: FormatRaw})
		if err != nil {
			t.Fatalf("%v: %v", f.variant, err)
		}
		wantSame(t, f.variant.String(), contents(t, d), disk)
		d.Close()
		// An ordinary base needs no word.
		writeFile(t, filepath.Join(dir, "guest.img"), bytes.Repeat([]byte{7}, 1<<20))
		if d, err = Open(img, Options{ReadOnly: true}); err != nil {
			t.Fatalf("%v: %v", f.variant, err)
		}
		d.Close()
		if layouts[f.variant].readOnly {
			continue
		}
		// Recording it once is enough, and it stays through the tools.
		writeFile(t, filepath.Join(dir, "guest.img"), disk)
		if err := RebaseHeader(img, "guest.img", ToolOptions{OtherFormat: FormatRaw}); err != nil {
			t.Fatalf("%v: %v", f.variant, err)
		}
		if err := Resize(t.Context(), img, 2<<20, false, ToolOptions{}); err != nil {
			t.Fatalf("%v: %v", f.variant, err)
		}
		if d, err = Open(img, Options{}); err != nil {
			t.Fatalf("%v: %v", f.variant, err)
		}
		wantSame(t, f.variant.String(), contents(t, d)[:1<<20], disk)
		d.Close()
	}
}

// The mark lies where other programs do not look, and does not outlive the path it belongs to.
func TestFormatMark(t *testing.T) {
	for _, v := range []Variant{QEMUV2, QEMUV2i386, UMLV1, UMLV2, UMLV3, UMLV3Broken} {
		h := Header{Variant: v, Size: 1 << 20, SectorSize: 512, Backing: "a/long/path/of.img", BackingFormat: FormatCOW}
		if layouts[v].alignOff != noField {
			h.Alignment = 4096
		}
		b := make([]byte, layouts[v].header)
		h.encode(b)
		at := layouts[v].pathOff
		for _, step := range []struct {
			backing string
			format  Format
		}{{"a/long/path/of.img", FormatRaw}, {"b", FormatCOW}, {"b", FormatUnknown}, {strings.Repeat("x", h.maxPath()), FormatCOW}, {"c", FormatUnknown}} {
			h.Backing, h.BackingFormat = step.backing, step.format
			h.encode(b)
			got, ok := decode(b, v, false)
			if !ok || got.Backing != step.backing || got.BackingFormat != step.format {
				t.Errorf("%v: %+v, want %+v", v, got, step)
			}
		}
		if rest := b[at+1 : at+layouts[v].pathLen]; !isZero(rest) {
			t.Errorf("%v: something is left behind the path: %q", v, bytes.Trim(rest, "\x00"))
		}
		// Another program writes a path of its own over ours.
		h.Backing, h.BackingFormat = "ours.img", FormatCOW
		h.encode(b)
		copy(b[at:], "theirs\x00")
		if got, ok := decode(b, v, false); !ok || got.Backing != "theirs" || got.BackingFormat != FormatUnknown {
			t.Errorf("%v: %+v", v, got)
		}
		h.Backing = strings.Repeat("x", h.maxPath()+1)
		if err := h.setBacking("i", "/i", h.Backing, backingInfo{format: FormatRaw}); v != UMLV3 && v != UMLV3Broken && !errors.Is(err, ErrPathTooLong) {
			t.Errorf("%v: %v", v, err)
		}
	}
}

// Files that are not disks as they are.
func TestForeignFormats(t *testing.T) {
	at := func(off int, magic string, size int) []byte {
		b := make([]byte, size)
		copy(b[off:], magic)
		return b
	}
	for name, b := range map[string][]byte{
		"qcow2":      at(0, "QFI\xfb\x00\x00\x00\x03", 4096),
		"VMDK":       at(0, "KDMV\x01", 4096),
		"of a VMDK":  at(0, "# Disk DescriptorFile\nversion=1\n", 300),
		"VDI":        at(64, "\x7f\x10\xda\xbe", 4096),
		"a VHD":      at(0, "conectix", 4096),
		"fixed size": at(8192-512, "conectix", 8192),
		"VHDX":       at(0, "vhdxfile", 4096),
		"gunzip":     at(0, "\x1f\x8b\x08\x00", 100),
		"unxz":       at(0, "\xfd7zXZ\x00", 100),
		"unzstd":     at(0, "\x28\xb5\x2f\xfd", 100),
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "x")
		writeFile(t, path, b)
		over, out := filepath.Join(dir, "over"), filepath.Join(dir, "out")
		_, open := OpenAny(path, Options{})
		for what, err := range map[string]error{
			"create":  Create(over, CreateOptions{Backing: "x", Size: 1 << 20}),
			"flatten": Flatten(t.Context(), path, out, VariantUnknown, ToolOptions{}),
			"open":    open,
		} {
			if !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "format=raw") {
				t.Errorf("%s, %s: %v", name, what, err)
			}
		}
		if _, err := os.Lstat(over); err == nil {
			t.Errorf("%s: an overlay was made", name)
		}
		mustCreate(t, over, CreateOptions{Backing: "x", Size: 1 << 20, BackingFormat: FormatRaw})
	}
}

// A base that the new image could not open is found before anything is made.
func TestCreateLooksAtTheWholeChain(t *testing.T) {
	dir := t.TempDir()
	baseFile(t, dir, 8192)
	mid, top := filepath.Join(dir, "mid"), filepath.Join(dir, "top")
	mustCreate(t, mid, CreateOptions{Backing: "base.img"})
	create := func() error { return Create(top, CreateOptions{Backing: "mid", BackingFormat: FormatCOW}) }
	check := func(what string, want error) {
		t.Helper()
		if err := create(); !errors.Is(err, want) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := os.Lstat(top); err == nil {
			t.Errorf("%s: the image was made", what)
			os.Remove(top)
		}
	}
	writeFile(t, filepath.Join(dir, "base.img"), make([]byte, 4096))
	check("stale", ErrStaleBacking)
	os.Remove(filepath.Join(dir, "base.img"))
	check("missing below", ErrBackingMissing)
	os.Remove(mid)
	check("missing", ErrBackingMissing)
	mustCreate(t, filepath.Join(dir, "l0"), CreateOptions{Size: 4096})
	for i := 1; i < maxChain; i++ {
		o := CreateOptions{Backing: "l" + strconv.Itoa(i-1), BackingFormat: FormatCOW}
		mustCreate(t, filepath.Join(dir, "l"+strconv.Itoa(i)), o)
	}
	if d, err := Open(filepath.Join(dir, "l"+strconv.Itoa(maxChain-1)), Options{}); err != nil {
		t.Fatal(err)
	} else {
		d.Close()
	}
	err := Create(filepath.Join(dir, "l"+strconv.Itoa(maxChain)), CreateOptions{Backing: "l" + strconv.Itoa(maxChain-1), BackingFormat: FormatCOW})
	if !errors.Is(err, ErrChainTooLong) {
		t.Errorf("layer %d: %v", maxChain+1, err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "l"+strconv.Itoa(maxChain))); err == nil {
		t.Error("one layer too many was made")
	}
}

func headerOf(t *testing.T, path string) Header {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	h, err := Probe(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	return h
}
