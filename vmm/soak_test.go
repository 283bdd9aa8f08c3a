package vmm

import (
	"context"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/moovm/moovm/virtio"
)

// TestSoak boots, resets, pauses and stops machines, several at a time, and
// has them do I/O, for ten minutes. At the end nothing is left of them.
func TestSoak(t *testing.T) {
	if os.Getenv("MOOVM_SOAK") == "" {
		t.Skip("takes ten minutes: run with MOOVM_SOAK=1, as make soak does")
	}
	needKVM(t)
	length := 10 * time.Minute
	if s := os.Getenv("MOOVM_SOAK_TIME"); s != "" {
		var err error
		if length, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	soakRound(t, 0)
	before := holdings(t)
	rounds := uint64(0)
	for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); rounds++ {
		soakRound(t, rounds)
	}
	after := holdings(t)
	t.Logf("%d rounds; before %+v, after %+v", rounds, before, after)
	if after.files > before.files || after.mappings > before.mappings || after.threads > before.threads+10 || after.goroutines > before.goroutines {
		t.Errorf("something was left behind")
	}
}

func soakRound(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 2))
	var wg sync.WaitGroup
	for range 3 {
		stop, pauses, cpus := rng.IntN(5), rng.IntN(8), 1+rng.IntN(4)
		wg.Go(func() { soakMachine(t, stop, pauses, cpus) })
	}
	wg.Wait()
	t.Run("I/O", TestVirtioBareMetal)
}

// soakMachine is the life of one machine.
func soakMachine(t *testing.T, stop, pauses, cpus int) {
	ends := [...]struct {
		code asm
		want ExitReason
	}{
		{asm{}.print("x").powerOff(), PowerOff},
		{asm{}.print("x").out(portReset, resetValue).hang(), Reset},
		{asm{}.print("x").out(portPanic, panicked).hang(), Panic},
		{asm{}.print("x").bytes(0xe6, 0x80, 0xeb, 0xfc), Stopped}, // out 0x80, al; jmp
		{asm{}.print("x").hang(), Stopped},
	}
	end := ends[stop]
	m, err := New(Config{Memory: 8 << 20, CPUs: cpus, Kernel: end.code.kernel(),
		Devices: []virtio.Device{newDisk(t, zeroDisk(1<<20), 1), newShare(t)}})
	if err != nil {
		t.Error(err)
		return
	}
	defer func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := m.Start(); err != nil {
		t.Error(err)
		return
	}
	for range pauses {
		if m.Pause() == nil {
			m.PowerButton()
		}
		m.Resume()
	}
	if end.want == Stopped {
		m.Stop()
	}
	defer context.AfterFunc(ctx, m.Stop)()
	if r, err := m.Wait(); r != end.want || err != nil {
		t.Errorf("%v, %v; want %v", r, err, end.want)
	}
}
