// Command fork clones a running machine a hundred times and lets every clone
// say who it is.
//
// The guest is a few instructions: it reads the machine's generation, waits
// until it is another one, which is when it has become a clone, prints the new
// one and switches itself off. Real guests learn it by the ACPI device
// VM_Gen_Counter; Linux mixes it into its random numbers.
//
//	go run ./examples/fork [-n 100]
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/moovm/moovm/vmm"
)

func main() {
	n := flag.Int("n", 100, "how many clones")
	flag.Parse()
	if err := run(os.Stdout, *n); err != nil {
		fmt.Fprintln(os.Stderr, "fork:", err)
		os.Exit(1)
	}
}

// run makes the machine and n clones of it, and writes what they say to w.
func run(w io.Writer, n int) (err error) {
	ready := &console{want: "ready", seen: make(chan struct{})}
	parent, err := vmm.New(vmm.Config{Memory: 16 << 20, Kernel: program(), Console: vmm.Serial{Out: ready}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, parent.Close()) }()
	if err := parent.Start(); err != nil {
		return err
	}
	select {
	case <-ready.seen:
	case <-time.After(time.Minute):
		return errors.New("the guest does not start")
	}

	snapshot, err := parent.Snapshot(context.Background(), vmm.SnapshotOptions{})
	if err != nil {
		return err
	}
	defer snapshot.Close()
	pool := vmm.NewPool(snapshot, 4, "")
	defer func() { err = errors.Join(err, pool.Close()) }()

	clones := make([]*vmm.Machine, n)
	said := make([]*console, n)
	for i := range clones {
		said[i] = &console{}
		if clones[i], err = pool.Fork(vmm.ForkConfig{Console: vmm.Serial{Out: said[i]}}); err != nil {
			return fmt.Errorf("clone %d: %w", i, err)
		}
		defer pool.Discard(clones[i])
		if err := clones[i].Start(); err != nil {
			return fmt.Errorf("clone %d: %w", i, err)
		}
	}
	for i, c := range clones {
		if reason, err := c.Wait(); err != nil || reason != vmm.PowerOff {
			return fmt.Errorf("clone %d: %v, %v", i, reason, err)
		}
		fmt.Fprintf(w, "clone %d is %s\n", i, said[i])
	}
	fmt.Fprintf(w, "and their parent is still %s\n", parent.Stats().State)
	return nil
}

// program is the guest: an ELF file with its instructions (x86-64, entered as
// a kernel is).
func program() vmm.Kernel {
	code := []byte{
		0xbb, 0, 0, 0, 0, // mov ebx, GenerationAddress
		0x4c, 0x8b, 0x03, // mov r8, [rbx]
		0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8: the first serial port
	}
	binary.LittleEndian.PutUint32(code[1:], vmm.GenerationAddress)
	for _, c := range []byte("ready") {
		code = append(code, 0xb0, c, 0xee) // mov al, c; out dx, al
	}
	code = append(code,
		0x48, 0x8b, 0x03, // wait: mov rax, [rbx]
		0x4c, 0x39, 0xc0, // cmp rax, r8
		0x74, 0xf8, // je wait
		0xb9, 16, 0, 0, 0, // mov ecx, 16
		0x48, 0x89, 0xc6, // mov rsi, rax
		0x89, 0xf0, // letter: mov eax, esi
		0x24, 0x0f, // and al, 15
		0x04, 'a', // add al, 'a'
		0xee,                   // out dx, al
		0x48, 0xc1, 0xee, 0x04, // shr rsi, 4
		0xff, 0xc9, // dec ecx
		0x75, 0xf1, // jnz letter
		0x66, 0xba, 0x00, 0x06, // mov dx, 0x600: the ACPI sleep register
		0xb0, 0x34, 0xee, // mov al, S5 and go; out dx, al
		0xf4, 0xeb, 0xfd, // hlt
	)
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

// console keeps what a guest says, and closes seen once it has said want.
type console struct {
	want string
	seen chan struct{}

	mu sync.Mutex
	b  strings.Builder
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.b.Write(p)
	if c.want != "" && strings.Contains(c.b.String(), c.want) {
		c.want = ""
		close(c.seen)
	}
	return len(p), nil
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.String()
}
