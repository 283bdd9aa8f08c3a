package unpack

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/moovm/moovm/internal/unpack/unpacktest"
)

// What unpacks to more than is allowed is refused, and is not held in memory.
func TestUnpackLimit(t *testing.T) {
	data := make([]byte, 1<<20)
	for name, packed := range unpacktest.Pack(t, data) {
		c, ok := Find(packed)
		if !ok || c.Name != name {
			t.Errorf("%s is taken for %q", name, c.Name)
			continue
		}
		if _, err := c.Unpack(packed, int64(len(data))-1); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: %v, want ErrTooLarge", name, err)
		}
		if b, err := c.Unpack(packed, int64(len(data))); err != nil || len(b) != len(data) {
			t.Errorf("%s: %d bytes, %v", name, len(b), err)
		}
	}
}

func TestBzip2(t *testing.T) {
	// printf 'Linux\n' | bzip2, and the size that the kernel's build appends
	const packed = "\x42\x5a\x68\x39\x31\x41\x59\x26\x53\x59\x2d\x2c\x75\x21\x00\x00\x00\xc5\x80\x00\x10\x00\x04\x00\x21\x02\x40\x20\x00\x21\x80\x0c\x03\x27\x2e\xe2\xee\x48\xa7\x0a\x12\x05\xa5\x8e\xa4\x20\x06\x00\x00\x00"
	if b, err := unpackBzip2([]byte(packed), 100); err != nil || string(b) != "Linux\n" {
		t.Errorf("got %q, %v", b, err)
	}
}

// branchCode is bytes full of what the x86 branch filter acts on.
func branchCode() []byte {
	r := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, 64<<10)
	for i := range b {
		switch r.IntN(8) {
		case 0, 1:
			b[i] = 0xe8 + byte(r.IntN(2))
		case 2, 3:
			b[i] = 0
		case 4:
			b[i] = 0xff
		default:
			b[i] = byte(r.Uint32())
		}
	}
	return b
}

// testdata/branches.xz was made of branchCode by xz --x86 --lzma2=preset=9.
func TestXZBranchFilter(t *testing.T) {
	packed, err := os.ReadFile("testdata/branches.xz")
	if err != nil {
		t.Fatal(err)
	}
	got, err := unpackXZ(packed, 1<<20)
	if err != nil || !bytes.Equal(got, branchCode()) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	packed[len(packed)/2] ^= 1
	if _, err := unpackXZ(packed, 1<<20); err == nil {
		t.Error("damage was not noticed")
	}
}
