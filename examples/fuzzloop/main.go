// Command fuzzloop fuzzes a guest by rewinding it: it boots a machine, freezes
// it where it waits for an input, and then sends an input, looks at the result,
// and puts the machine back, some thousand times a second. Whatever an input has
// done to the machine is gone before the next one.
//
// The guest is a few instructions: it reads four bytes from the serial port and
// says how many of them are those that it has a fault for. An input that gets
// further than the one before is kept and changed again, as a fuzzer does that
// looks at coverage.
//
//	go run ./examples/fuzzloop [-seed 1]
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"time"

	"github.com/moovm/moovm/vmm"
)

func main() {
	seed := flag.Uint64("seed", uint64(time.Now().UnixNano()), "what the inputs are made from")
	flag.Parse()
	if err := run(context.Background(), os.Stdout, *seed); err != nil {
		fmt.Fprintln(os.Stderr, "fuzzloop:", err)
		os.Exit(1)
	}
}

// secret is the input that the guest has a fault for.
const secret = "BUG!"

// run fuzzes until the fault is found, and says how long that took.
func run(ctx context.Context, w io.Writer, seed uint64) (err error) {
	input, keys := io.Pipe()
	said := results{c: make(chan byte, 16)}
	m, err := vmm.New(vmm.Config{Memory: 16 << 20, Kernel: program(), Console: vmm.Serial{In: input, Out: said}})
	if err != nil {
		return err
	}
	defer func() {
		keys.Close()
		err = errors.Join(err, m.Close())
	}()
	if err := m.Start(); err != nil {
		return err
	}
	if _, err := said.next(); err != nil { // that it is ready
		return err
	}
	ready, err := m.Snapshot(ctx, vmm.SnapshotOptions{})
	if err != nil {
		return err
	}
	defer ready.Close()

	r := rand.New(rand.NewPCG(seed, 0))
	best, reached := []byte("SEED"), 0
	start := time.Now()
	for n := 1; ; n++ {
		try := bytes.Clone(best)
		try[r.IntN(len(try))] = byte(' ' + r.IntN(64)) // capitals, digits and signs
		if _, err := keys.Write(try); err != nil {
			return err
		}
		result, err := said.next()
		if err != nil {
			return fmt.Errorf("input %q: %w", try, err)
		}
		if got := int(result - '0'); got > reached {
			best, reached = try, got
			fmt.Fprintf(w, "%q gets to step %d, input %d\n", try, got, n)
		}
		if err := m.Rewind(ctx, ready, vmm.SnapshotOptions{}); err != nil {
			return err
		}
		if reached == len(secret) {
			took := time.Since(start)
			fmt.Fprintf(w, "found after %d inputs in %v: %.0f rewinds a second\n", n, took.Round(time.Millisecond), float64(n)/took.Seconds())
			return nil
		}
	}
}

// results is what the guest says, a byte each.
type results struct{ c chan byte }

// Write takes what the guest says. It is for the machine.
func (r results) Write(p []byte) (int, error) {
	for _, b := range p {
		select {
		case r.c <- b:
		default: // more than anybody asked for
		}
	}
	return len(p), nil
}

// patience is how long a guest may take to a result.
const patience = time.Minute

func (r results) next() (byte, error) {
	select {
	case b := <-r.c:
		return b, nil
	case <-time.After(patience):
		return 0, errors.New("the guest does not answer")
	}
}

// program is the guest: an ELF file with its instructions (x86-64, entered as
// a kernel is).
func program() vmm.Kernel {
	code := []byte{
		0x66, 0xba, 0xfc, 0x03, // mov dx, 0x3fc: the first serial port's modem control
		0xb0, 0x02, 0xee, // mov al, RTS: it takes input; out dx, al
		0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8: its data
		0xb0, 'r', 0xee, // mov al, 'r'; out dx, al
		0x31, 0xff, // xor edi, edi
		0xb9, 4, 0, 0, 0, // mov ecx, 4
		0x66, 0xba, 0xfd, 0x03, // read: mov dx, 0x3fd: its line status
		0xec, 0xa8, 0x01, // wait: in al, dx; test al, 1
		0x74, 0xfb, // jz wait
		0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xec,             // in al, dx
		0xc1, 0xe7, 0x08, // shl edi, 8
		0x0f, 0xb6, 0xc0, // movzx eax, al
		0x09, 0xc7, // or edi, eax
		0xff, 0xc9, // dec ecx
		0x75, 0xe6, // jnz read
		0x31, 0xdb, // xor ebx, ebx
		0xbe, 0, 0, 0, 0, // mov esi, secret
		0xb9, 4, 0, 0, 0, // mov ecx, 4
		0xc1, 0xc7, 0x08, // compare: rol edi, 8
		0xc1, 0xc6, 0x08, // rol esi, 8
		0x89, 0xf8, // mov eax, edi
		0x31, 0xf0, // xor eax, esi
		0x84, 0xc0, // test al, al
		0x75, 0x06, // jnz say
		0xff, 0xc3, // inc ebx
		0xff, 0xc9, // dec ecx
		0x75, 0xec, // jnz compare
		0x8d, 0x43, '0', // say: lea eax, [rbx+'0']
		0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xee,             // out dx, al
		0xf4, 0xeb, 0xfd, // hlt
	}
	at := bytes.Index(code, []byte{0xbe, 0, 0, 0, 0})
	binary.LittleEndian.PutUint32(code[at+1:], binary.BigEndian.Uint32([]byte(secret)))
	const base, header = 1 << 20, 64 + 56
	le := binary.LittleEndian
	b := make([]byte, header, header+len(code))
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2)      // ET_EXEC
	le.PutUint16(b[18:], 0x3e)   // EM_X86_64
	le.PutUint32(b[20:], 1)      // EV_CURRENT
	le.PutUint64(b[24:], base)   // entry
	le.PutUint64(b[32:], 64)     // program headers
	le.PutUint16(b[52:], 64)     // size of this header
	le.PutUint16(b[54:], 56)     // size of one of those
	le.PutUint16(b[56:], 1)      // how many
	le.PutUint32(b[64:], 1)      // PT_LOAD
	le.PutUint32(b[68:], 7)      // readable, writable, executable
	le.PutUint64(b[72:], header) // offset in the file
	le.PutUint64(b[80:], base)   // virtual address
	le.PutUint64(b[88:], base)   // physical address
	le.PutUint64(b[96:], uint64(len(code)))
	le.PutUint64(b[104:], uint64(len(code)))
	b = append(b, code...)
	return vmm.Kernel{Name: "guest", Image: bytes.NewReader(b), Size: int64(len(b))}
}
