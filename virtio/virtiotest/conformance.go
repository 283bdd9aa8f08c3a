package virtiotest

import (
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/moovm/moovm/virtio"
)

// Opener makes a device with a transport for one test, with g as the guest's
// memory; it registers the clean-up with t.
type Opener func(t *testing.T, g *Guest) Transport

// RingFeatures are the features of ring and transport a Driver of this package
// can work with.
const RingFeatures = virtio.FeatureVersion1 | virtio.FeatureIndirectDesc |
	virtio.FeatureEventIdx | virtio.FeatureRingReset | virtio.FeatureAccessPlatform

// Conformance runs what the specification (virtio 1.2) says about every
// device: each subtest is named by the section it comes from. The device must
// have a queue 0 that answers chains, with used length 0 if they are broken.
func Conformance(t *testing.T, open Opener) {
	type env struct {
		Transport
		g *Guest
	}
	run := func(name string, f func(t *testing.T, e env)) {
		t.Run(name, func(t *testing.T) {
			g := NewGuest(4 << 20)
			f(t, env{open(t, g), g})
		})
	}
	features := func(e env, f uint64) {
		e.SetDriverFeatures(0, uint32(f))
		e.SetDriverFeatures(1, uint32(f>>32))
	}
	toDriver := func(e env) {
		e.SetStatus(virtio.StatusAcknowledge)
		e.SetStatus(statusInit)
	}
	needsReset := func(t *testing.T, d *Driver, before uint64) {
		t.Helper()
		Eventually(t, "NEEDS_RESET", func() bool { return d.Status()&virtio.StatusNeedsReset != 0 })
		Eventually(t, "a configuration interrupt", func() bool { return d.ConfigInterrupts() > before })
	}

	run("2.1 status is 0 at first and keeps what the driver sets", func(t *testing.T, e env) {
		if s := e.Status(); s != 0 {
			t.Fatalf("status %#x", s)
		}
		e.SetStatus(virtio.StatusAcknowledge)
		if s := e.Status(); s != virtio.StatusAcknowledge {
			t.Errorf("status %#x after ACKNOWLEDGE", s)
		}
		e.SetStatus(statusInit)
		if s := e.Status(); s != statusInit {
			t.Errorf("status %#x after DRIVER", s)
		}
		e.SetStatus(statusInit | virtio.StatusFailed)
		if s := e.Status(); s != statusInit|virtio.StatusFailed {
			t.Errorf("status %#x after FAILED", s)
		}
	})
	run("2.1.1 the driver cannot clear a bit or set NEEDS_RESET", func(t *testing.T, e env) {
		toDriver(e)
		e.SetStatus(virtio.StatusDriver)
		e.SetStatus(statusInit | virtio.StatusNeedsReset)
		if s := e.Status(); s != statusInit {
			t.Errorf("status %#x, want %#x", s, statusInit)
		}
	})
	run("2.2.1 FEATURES_OK is refused for a bit not offered", func(t *testing.T, e env) {
		for bit := range 64 {
			f := uint64(1) << bit
			if Offered(e)&f != 0 {
				continue
			}
			e.SetStatus(0)
			toDriver(e)
			features(e, virtio.FeatureVersion1|f)
			e.SetStatus(statusFeat)
			if e.Status()&virtio.StatusFeaturesOK != 0 {
				t.Errorf("bit %d was not offered but accepted", bit)
			}
		}
	})
	run("2.2.1 FEATURES_OK is refused for a bit beyond 64", func(t *testing.T, e env) {
		toDriver(e)
		features(e, virtio.FeatureVersion1|Offered(e)&virtio.FeatureAccessPlatform)
		e.SetDriverFeatures(2, 1)
		e.SetStatus(statusFeat)
		if e.Status()&virtio.StatusFeaturesOK != 0 {
			t.Error("accepted")
		}
	})
	run("2.2.1 every offered bit can be accepted", func(t *testing.T, e env) {
		if got, want := Negotiate(t, e, ^uint64(0)), Offered(e); got != want {
			t.Errorf("%#x of %#x", got, want)
		}
	})
	run("6.1 VERSION_1 is offered and required", func(t *testing.T, e env) {
		f := Offered(e)
		if f&virtio.FeatureVersion1 == 0 {
			t.Error("not offered")
		}
		toDriver(e)
		features(e, f&^virtio.FeatureVersion1)
		e.SetStatus(statusFeat)
		if e.Status()&virtio.StatusFeaturesOK != 0 {
			t.Error("not required")
		}
		features(e, f) // a refused driver may try again
		e.SetStatus(statusFeat)
		if e.Status()&virtio.StatusFeaturesOK == 0 {
			t.Error("a second, valid choice is refused")
		}
	})
	run("6.1 features are fixed by FEATURES_OK", func(t *testing.T, e env) {
		f := Negotiate(t, e, RingFeatures)
		features(e, 0)
		if got := uint64(e.DriverFeatures(0)) | uint64(e.DriverFeatures(1))<<32; got != f {
			t.Errorf("driver features %#x, negotiated %#x", got, f)
		}
	})
	run("4.1.4.3.1 feature windows from 2 on read 0", func(t *testing.T, e env) {
		for _, sel := range []uint32{2, 3, 31, 32, 0x80000000, 0xffffffff} {
			if v := e.DeviceFeatures(sel); v != 0 {
				t.Errorf("window %d reads %#x", sel, v)
			}
		}
	})
	run("3.1.1 DRIVER_OK needs FEATURES_OK", func(t *testing.T, e env) {
		toDriver(e)
		e.SetStatus(statusInit | virtio.StatusDriverOK)
		if e.Status()&virtio.StatusDriverOK != 0 {
			t.Error("DRIVER_OK without FEATURES_OK")
		}
	})
	run("2.5.1 configuration space is readable before FEATURES_OK, by 8, 16 and 32 bits", func(t *testing.T, e env) {
		var whole [16]byte
		for i := range whole {
			e.ReadConfig(uint32(i), whole[i:i+1])
		}
		for _, width := range []int{2, 4} {
			for off := 0; off+width <= len(whole); off += width {
				p := make([]byte, width)
				e.ReadConfig(uint32(off), p)
				if string(p) != string(whole[off:off+width]) {
					t.Errorf("%d bytes at %d read %x, byte by byte %x", width, off, p, whole[off:off+width])
				}
			}
		}
		Negotiate(t, e, RingFeatures)
		for i, b := range whole[:8] {
			p := []byte{0}
			if e.ReadConfig(uint32(i), p); p[0] != b {
				t.Errorf("byte %d changed from %#x to %#x", i, b, p[0])
			}
		}
	})
	run("2.5.1 configuration space beyond its end reads zeros", func(t *testing.T, e env) {
		p := []byte{1, 2, 3, 4}
		e.ReadConfig(0x400, p)
		if string(p) != "\x00\x00\x00\x00" {
			t.Errorf("%x", p)
		}
		e.WriteConfig(0x400, p)
	})
	run("2.5.1 the generation is stable while nothing changes", func(t *testing.T, e env) {
		g := e.Generation()
		p := make([]byte, 8)
		e.ReadConfig(0, p)
		if e.Generation() != g {
			t.Error("it changed")
		}
	})
	run("4.1.5.1.3 an absent queue has size 0", func(t *testing.T, e env) {
		n := 0
		for e.QueueMax(n) != 0 {
			n++
		}
		for _, i := range []int{n, n + 1, 0x7fff, 0xffff} {
			if v := e.QueueMax(i); v != 0 {
				t.Errorf("queue %d of %d has size %d", i, n, v)
			}
			e.SetQueue(i, 8, GuestBase, GuestBase, GuestBase)
			e.EnableQueue(i)
			if e.QueueEnabled(i) {
				t.Errorf("queue %d of %d can be enabled", i, n)
			}
			e.Notify(i)
		}
	})
	run("2.7 the maximum queue size is a power of two", func(t *testing.T, e env) {
		for i := 0; e.QueueMax(i) != 0; i++ {
			if v := e.QueueMax(i); v&(v-1) != 0 || v > virtio.MaxQueueSize {
				t.Errorf("queue %d: %d", i, v)
			}
		}
	})
	run("3.1.1 queues are configured between FEATURES_OK and DRIVER_OK", func(t *testing.T, e env) {
		r := NewRing(e.g, 8, 0)
		e.SetQueue(0, r.Size, r.Desc, r.Driver, r.Device)
		e.EnableQueue(0)
		if e.QueueEnabled(0) {
			t.Error("enabled before FEATURES_OK")
		}
		Negotiate(t, e, RingFeatures&^virtio.FeatureRingReset)
		e.SetStatus(statusRun)
		e.SetQueue(0, r.Size, r.Desc, r.Driver, r.Device)
		e.EnableQueue(0)
		if e.QueueEnabled(0) {
			t.Error("enabled after DRIVER_OK")
		}
		if s := e.Status(); s != statusRun {
			t.Errorf("status %#x", s)
		}
	})
	run("2.7 an enabled queue cannot be reconfigured", func(t *testing.T, e env) {
		f := Negotiate(t, e, RingFeatures)
		r := NewRing(e.g, 8, f)
		e.SetQueue(0, r.Size, r.Desc, r.Driver, r.Device)
		e.EnableQueue(0)
		e.SetQueue(0, 3, 1, 1, 1) // would make DRIVER_OK fail
		e.SetStatus(statusRun)
		if s := e.Status(); s != statusRun {
			t.Errorf("status %#x", s)
		}
	})
	for name, change := range map[string]func(r *Ring) (size uint16, desc, driver, device uint64){
		"size 0":             func(r *Ring) (uint16, uint64, uint64, uint64) { return 0, r.Desc, r.Driver, r.Device },
		"size 6":             func(r *Ring) (uint16, uint64, uint64, uint64) { return 6, r.Desc, r.Driver, r.Device },
		"size above maximum": func(r *Ring) (uint16, uint64, uint64, uint64) { return 0x8000, r.Desc, r.Driver, r.Device },
		"unaligned":          func(r *Ring) (uint16, uint64, uint64, uint64) { return 8, r.Desc + 1, r.Driver, r.Device },
		"outside memory":     func(r *Ring) (uint16, uint64, uint64, uint64) { return 8, r.Desc, 1 << 50, r.Device },
		"wrapping":           func(r *Ring) (uint16, uint64, uint64, uint64) { return 8, ^uint64(15), r.Driver, r.Device },
	} {
		run("2.1.2 an invalid queue means NEEDS_RESET: "+name, func(t *testing.T, e env) {
			f := Negotiate(t, e, RingFeatures)
			before := e.ConfigInterrupts()
			size, desc, driver, device := change(NewRing(e.g, 8, f))
			e.SetQueue(0, size, desc, driver, device)
			e.EnableQueue(0)
			e.SetStatus(statusRun)
			needsReset(t, &Driver{Transport: e, t: t}, before)
			e.SetStatus(0)
			Eventually(t, "status 0", func() bool { return e.Status() == 0 })
			Start(t, e, e.g, RingFeatures, 8) // and it works again
		})
	}
	run("3.1.1 nothing is consumed before DRIVER_OK", func(t *testing.T, e env) {
		f := Negotiate(t, e, RingFeatures)
		r := NewRing(e.g, 8, f)
		e.SetQueue(0, r.Size, r.Desc, r.Driver, r.Device)
		e.EnableQueue(0)
		r.SetDesc(0, 0, 1, 0, 0) // broken: it will come back with length 0
		r.Offer(0)
		r.Publish()
		e.Notify(0)
		time.Sleep(10 * time.Millisecond)
		if r.UsedIdx() != 0 {
			t.Error("consumed")
		}
		e.SetStatus(statusRun)
		e.Notify(0)
		Eventually(t, "the chain", func() bool { return r.UsedIdx() == 1 })
	})
	run("2.7.13 spurious notifications are harmless", func(t *testing.T, e env) {
		e.Notify(0)
		d := Start(t, e, e.g, RingFeatures, 8)
		for range 100 {
			d.Notify(0)
		}
		if s := d.Status(); s != statusRun || d.Rings[0].UsedIdx() != 0 {
			t.Errorf("status %#x, used.idx %d", s, d.Rings[0].UsedIdx())
		}
	})
	for name, breakIt := range map[string]func(r *Ring){
		"avail.idx too far ahead": func(r *Ring) { r.SetAvailIdx(r.Size + 1) },
		"avail.idx behind":        func(r *Ring) { r.SetAvailIdx(0xffff) },
		"head outside the table":  func(r *Ring) { r.Offer(r.Size); r.Publish() },
	} {
		run("2.1.2 a broken ring means NEEDS_RESET and a configuration interrupt: "+name, func(t *testing.T, e env) {
			d := Start(t, e, e.g, RingFeatures, 8)
			before := d.ConfigInterrupts()
			breakIt(d.Rings[0])
			d.Notify(0)
			needsReset(t, d, before)
			d.SetStatus(0)
			Eventually(t, "status 0", func() bool { return d.Status() == 0 })
			d = Start(t, e, e.g, RingFeatures, 8)
			brokenChain(t, d)
		})
	}
	run("2.7.5 broken chains come back, the device works on", func(t *testing.T, e env) {
		d := Start(t, e, e.g, RingFeatures, 8)
		r := d.Rings[0]
		for _, c := range [][4]uint64{ // address, length, flags, next of descriptor 0
			{GuestBase, 8, Next, 0}, {GuestBase, 8, Next, 8}, {GuestBase, 0, 0, 0}, {1 << 52, 8, 0, 0},
			{^uint64(0), 8, Write, 0}, {GuestBase, 0xffffffff, Write, 0}, {GuestBase, 24, Indirect, 0},
			{GuestBase, 0, Indirect, 0}, {GuestBase, 16, Indirect | Next, 0}, {1 << 52, 16, Indirect, 0},
		} {
			r.SetDesc(0, c[0], uint32(c[1]), uint16(c[2]), uint16(c[3]))
			r.Offer(0)
			d.Kick(0)
			if head, n := d.Wait(0); head != 0 || n != 0 {
				t.Errorf("descriptor %x: head %d, length %d", c, head, n)
			}
		}
		if s := d.Status(); s != statusRun {
			t.Errorf("status %#x", s)
		}
	})
	for _, f := range []uint64{RingFeatures, RingFeatures &^ virtio.FeatureEventIdx} {
		run(fmt.Sprintf("2.7.7 used buffers interrupt: EVENT_IDX %v", f&virtio.FeatureEventIdx != 0), func(t *testing.T, e env) {
			d := Start(t, e, e.g, f, 8)
			for range 20 { // more than the ring holds: it wraps
				before := d.QueueInterrupts(0)
				d.Rings[0].WantInterrupt()
				brokenChain(t, d)
				Eventually(t, "an interrupt", func() bool { return d.QueueInterrupts(0) > before })
			}
		})
	}
	run("2.7.7 no interrupt without being asked for", func(t *testing.T, e env) {
		d := Start(t, e, e.g, RingFeatures&^virtio.FeatureEventIdx, 8)
		d.Rings[0].NoInterrupt()
		before := d.QueueInterrupts(0)
		for range 20 {
			brokenChain(t, d)
		}
		d.SetStatus(0) // drains: nothing comes later
		Eventually(t, "status 0", func() bool { return d.Status() == 0 })
		if n := d.QueueInterrupts(0) - before; n != 0 {
			t.Errorf("%d interrupts", n)
		}
	})
	run("2.4.1 reset returns everything to its initial state", func(t *testing.T, e env) {
		d := Start(t, e, e.g, RingFeatures, 8)
		brokenChain(t, d)
		d.SetStatus(0)
		Eventually(t, "status 0", func() bool { return d.Status() == 0 })
		if d.QueueEnabled(0) {
			t.Error("queue 0 is still enabled")
		}
		if v := d.DriverFeatures(0) | d.DriverFeatures(1); v != 0 {
			t.Errorf("driver features %#x", v)
		}
		// No ring access and no interrupt any more.
		irqs, used := d.QueueInterrupts(0), d.Rings[0].UsedIdx()
		d.Rings[0].SetDesc(0, 0, 1, 0, 0)
		d.Rings[0].Offer(0)
		d.Rings[0].Publish()
		d.Notify(0)
		time.Sleep(10 * time.Millisecond)
		if d.Rings[0].UsedIdx() != used || d.QueueInterrupts(0) != irqs {
			t.Error("the device goes on after a reset")
		}
		d = Start(t, e, e.g, RingFeatures, 8)
		brokenChain(t, d)
	})
	run("2.6.1 a queue is reset on its own", func(t *testing.T, e env) {
		if Offered(e)&virtio.FeatureRingReset == 0 {
			t.Skip("the device does not offer RING_RESET")
		}
		d := Start(t, e, e.g, RingFeatures, 8)
		for size := uint16(8); size >= 4; size /= 2 {
			brokenChain(t, d)
			d.ResetQueue(0)
			Eventually(t, "the end of the queue reset", func() bool { return !d.QueueResetting(0) })
			if d.QueueEnabled(0) {
				t.Error("the queue is still enabled")
			}
			r := NewRing(e.g, size/2, d.Features)
			d.SetQueue(0, r.Size, r.Desc, r.Driver, r.Device)
			d.EnableQueue(0)
			if !d.QueueEnabled(0) || d.Status() != statusRun {
				t.Fatalf("enabled %v, status %#x", d.QueueEnabled(0), d.Status())
			}
			d.Rings[0] = r
			before := d.QueueInterrupts(0)
			r.WantInterrupt()
			brokenChain(t, d)
			Eventually(t, "an interrupt", func() bool { return d.QueueInterrupts(0) > before })
		}
	})
	run("2.6.1 no queue reset without RING_RESET", func(t *testing.T, e env) {
		d := Start(t, e, e.g, RingFeatures&^virtio.FeatureRingReset, 8)
		d.ResetQueue(0)
		if !d.QueueEnabled(0) {
			t.Error("the queue is gone")
		}
		brokenChain(t, d)
	})
	run("2.7.6 indices wrap at 65536", func(t *testing.T, e env) {
		if testing.Short() {
			t.Skip("runs 70000 chains; leave out -short")
		}
		d := Start(t, e, e.g, RingFeatures, 64)
		r := d.Rings[0]
		for i := range uint16(64) {
			r.SetDesc(i, 0, 1, 0, 0)
		}
		for done := 0; done < 70000; done += 64 {
			for i := range uint16(64) {
				r.Offer(i)
			}
			d.Kick(0)
			for range 64 {
				d.Wait(0)
			}
		}
		if d.Status() != statusRun {
			t.Errorf("status %#x", d.Status())
		}
	})
}

// brokenChain sends a chain outside guest memory and wants it back.
func brokenChain(t *testing.T, d *Driver) {
	t.Helper()
	r := d.Rings[0]
	r.SetDesc(0, 1<<52, 8, 0, 0)
	r.Offer(0)
	d.Kick(0)
	if head, n := d.Wait(0); head != 0 || n != 0 {
		t.Fatalf("head %d, length %d", head, n)
	}
}

// configUint reads n bytes of the configuration space.
func configUint(tr Transport, off uint32, n int) uint64 {
	var b [8]byte
	for i := 0; i < n; i += 4 {
		tr.ReadConfig(off+uint32(i), b[i:min(n, i+4)])
	}
	return binary.LittleEndian.Uint64(b[:])
}
