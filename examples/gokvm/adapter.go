//go:build linux && amd64

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"reflect"

	"github.com/bobuhiro11/gokvm/kvm"
	"github.com/bobuhiro11/gokvm/machine"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/mmio"
)

// Where the devices are. The interrupts are those gokvm can raise from outside.
const mmioBase = 0xd0000000

var errPowerOff = errors.New("the guest powered off")

// adapter is all that stands between gokvm's machine and our devices.
type adapter struct {
	m       *machine.Machine
	devices []*mmio.Device
}

// line is a device's interrupt: gokvm's methods make an edge, which is why the
// ACPI tables say that it is one.
type line func() error

// SetInterrupt implements mmio.Host.
func (l line) SetInterrupt(level bool) {
	if level {
		if err := l(); err != nil {
			fmt.Fprintln(os.Stderr, "gokvm: interrupt:", err)
		}
	}
}

func newAdapter(m *machine.Machine, devices []virtio.Device) (*adapter, error) {
	// Memory. gokvm shows it only by copying (ReadAt, WriteAt); the devices
	// want the bytes themselves. Reflection reads the field without unsafe.
	ram := reflect.ValueOf(m).Elem().FieldByName("mem")
	if !ram.IsValid() || ram.Kind() != reflect.Slice || ram.Len() == 0 {
		return nil, errors.New("this gokvm keeps its memory elsewhere")
	}
	mem, err := virtio.NewMemory(virtio.Region{Addr: 0, Bytes: ram.Bytes()})
	if err != nil {
		return nil, err
	}
	a := &adapter{m: m}
	lines := []line{m.InjectVirtioBlkIRQ, m.InjectVirtioNetIRQ}
	irqs := []uint32{10, 9}
	for i, d := range devices {
		w, err := mmio.New(d, mem, lines[i], mmio.Options{})
		if err != nil {
			return nil, errors.Join(err, a.close())
		}
		a.devices = append(a.devices, w)
	}
	// How the guest finds them: ACPI tables in the BIOS area, and the power
	// management registers those name.
	m.AddDevice(pm{})
	if _, err := m.WriteAt(acpiTables(acpiBase, irqs[:len(devices)]), acpiBase); err != nil {
		return nil, errors.Join(err, a.close())
	}
	return a, nil
}

func (a *adapter) close() error {
	var errs []error
	for _, d := range a.devices {
		errs = append(errs, d.Close())
	}
	return errors.Join(errs...)
}

// run runs the only vCPU. Notifications arrive here: a guest's write to a
// register ends RunOnce with an error that means nothing more than that.
func (a *adapter) run() error {
	for {
		more, err := a.m.RunOnce(0)
		run := a.m.RunData()[0]
		switch {
		case kvm.ExitType(run.ExitReason) == kvm.EXITMMIO:
			a.access(run)
		case errors.Is(err, errPowerOff):
			return nil
		case !more && err != nil:
			return err
		case !more:
			return errors.New("the guest halted")
		}
	}
}

// access serves one memory access: kvm_run's mmio structure is address, up to 8
// bytes of data, their number and whether they are written.
func (a *adapter) access(run *kvm.RunData) {
	addr, n, write := run.Data[0], int(run.Data[2]&0xf), run.Data[2]>>32&1 != 0
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], run.Data[1])
	i := (addr - mmioBase) / mmio.Size
	if addr < mmioBase || i >= uint64(len(a.devices)) || n > len(b) {
		if !write {
			run.Data[1] = ^uint64(0)
		}
		return
	}
	if off := (addr - mmioBase) % mmio.Size; write {
		a.devices[i].Write(off, b[:n])
	} else {
		a.devices[i].Read(off, b[:n])
		run.Data[1] = binary.LittleEndian.Uint64(b[:])
	}
}

// pm are the ACPI power management registers (gokvm's iodev.Device): events
// that never happen, and a control register whose sleep bit ends the machine.
type pm struct{}

func (pm) IOPort() uint64 { return pmBase }
func (pm) Size() uint64   { return 8 }

func (pm) Read(_ uint64, p []byte) error {
	clear(p)
	return nil
}

func (pm) Write(port uint64, p []byte) error {
	if port == pmBase+4 && len(p) == 2 && p[1]&0x20 != 0 {
		return errPowerOff
	}
	return nil
}
