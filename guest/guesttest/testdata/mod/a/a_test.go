package a

import (
	"fmt"
	"os"
	"testing"
)

func TestGuest(t *testing.T) {
	if os.Getenv("MOOVM_GUEST") == "" || os.Getuid() != 0 {
		t.Error("not root in a guest")
	}
	b, err := os.ReadFile("testdata/file")
	if err != nil || string(b) != "from testdata\n" {
		t.Errorf("%q, %v", b, err)
	}
	b, err = os.ReadFile("../go.mod")
	if err != nil || len(b) == 0 {
		t.Errorf("the module: %v", err)
	}
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	fmt.Printf("boot %s", id)
}

func TestSign(t *testing.T) {
	for n, want := range map[int]string{-1: "-", 1: "+"} {
		t.Run(want, func(t *testing.T) {
			if got := Sign(n); got != want {
				t.Error(got)
			}
		})
	}
}

func TestSkip(t *testing.T)  { t.Skip("skipped on purpose") }
func TestShort(t *testing.T) { t.Log("short", testing.Short()) }

func FuzzSign(f *testing.F) {
	f.Add(7)
	f.Fuzz(func(t *testing.T, n int) { Sign(n) })
}

func BenchmarkSign(b *testing.B) {
	for b.Loop() {
		Sign(b.N)
	}
}
