package vmm

import (
	"context"
	"testing"
)

func takeSnapshot(t testing.TB, m *Machine) *Snapshot {
	t.Helper()
	s, err := m.Snapshot(context.Background(), SnapshotOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func forkOf(t testing.TB, s *Snapshot) (*Machine, *syncBuffer) {
	t.Helper()
	out := new(syncBuffer)
	m, err := s.Fork(ForkConfig{Console: Serial{Out: out}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m, out
}

// hashingGuest runs a generator over 64 KiB of memory for a while, then prints
// a hash of it all in sixteen letters and powers off: a run that was forked or
// rewound anywhere ends with the same letters as one that was not.
func hashingGuest(rounds uint32) asm {
	a := asm{}.print("!")
	// mov ebx, 0x200000; mov rax, 88172645463325252; mov ebp, rounds
	a = a.bytes(0xbb, 0, 0, 0x20, 0, 0x48, 0xb8, 0x84, 0x95, 0x0c, 0xe9, 0x8b, 0x41, 0x39, 0x01, 0xbd, byte(rounds), byte(rounds>>8), byte(rounds>>16), byte(rounds>>24))
	top := len(a)
	a = a.bytes(
		0x48, 0x89, 0xc2, // mov rdx, rax
		0x48, 0xc1, 0xe2, 0x0d, // shl rdx, 13
		0x48, 0x31, 0xd0, // xor rax, rdx
		0x48, 0x89, 0xc2, // mov rdx, rax
		0x48, 0xc1, 0xea, 0x07, // shr rdx, 7
		0x48, 0x31, 0xd0, // xor rax, rdx
		0x48, 0x89, 0xc2, // mov rdx, rax
		0x48, 0xc1, 0xe2, 0x11, // shl rdx, 17
		0x48, 0x31, 0xd0, // xor rax, rdx
		0x89, 0xc1, // mov ecx, eax
		0x81, 0xe1, 0xf8, 0xff, 0, 0, // and ecx, 0xfff8
		0x48, 0x31, 0x04, 0x0b, // xor [rbx+rcx], rax
		0x48, 0x03, 0x04, 0x0b, // add rax, [rbx+rcx]
		0xff, 0xcd, // dec ebp
	)
	a = a.bytes(0x0f, 0x85) // jnz top
	rel := int32(top - (len(a) + 4))
	a = a.bytes(byte(rel), byte(rel>>8), byte(rel>>16), byte(rel>>24))
	// Sixteen letters of rax.
	a = a.bytes(
		0xb9, 16, 0, 0, 0, // mov ecx, 16
		0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0x48, 0x89, 0xc6, // mov rsi, rax
		0x89, 0xf0, // letter: mov eax, esi
		0x24, 0x0f, // and al, 15
		0x04, 'a', // add al, 'a'
		0xee,                   // out dx, al
		0x48, 0xc1, 0xee, 0x04, // shr rsi, 4
		0xff, 0xc9, // dec ecx
		0x75, 0xf1, // jnz letter
	)
	return a.powerOff()
}

func TestForkEndsAsItsParent(t *testing.T) {
	m, out := newMachine(t, hashingGuest(30_000))
	if r, err := runToEnd(t, m); r != PowerOff || err != nil {
		t.Fatal(r, err)
	}
	want := out.String()
	if len(want) != 17 {
		t.Fatalf("the guest printed %q", want)
	}
	for range 20 {
		m, out := newMachine(t, hashingGuest(30_000))
		if err := m.Start(); err != nil {
			t.Fatal(err)
		}
		out.waitFor(t, "!")
		s := takeSnapshot(t, m)
		child, childOut := forkOf(t, s)
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		for _, x := range []*Machine{m, child} {
			if r, err := x.Wait(); r != PowerOff || err != nil {
				t.Fatal(r, err)
			}
		}
		if out.String() != want || "!"+childOut.String() != want {
			t.Fatalf("parent %q, child %q, want %q", out, childOut, want)
		}
	}
}
