package guest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"github.com/moovm/moovm/internal/pipe"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
)

// fromGuest is what a guest's init writes.
func fromGuest(frames ...frame) []byte {
	var b []byte
	for _, f := range frames {
		b = appendFrame(b, f.kind, f.payload)
	}
	return b
}

func exitFrame(status, signal uint32) frame {
	b := binary.LittleEndian.AppendUint32(nil, status)
	return frame{frameExit, binary.LittleEndian.AppendUint32(b, signal)}
}

func jsonFrame(t *testing.T, kind frameType, v any) frame {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return frame{kind, b}
}

func TestControl(t *testing.T) {
	var out, errs bytes.Buffer
	var started, warned []string
	in := fromGuest(
		jsonFrame(t, frameHello, helloFrame{1, "6.1\x1b[31m"}),
		frame{frameWarn, []byte("no\ntree")},
		frame{frameStart, []byte("/bin/sh")},
		frame{frameStdout, []byte("out1 ")},
		frame{frameStderr, []byte("err\x00\x1b")},
		frame{frameStdout, bytes.Repeat([]byte("x"), maxFrame)},
		frame{frameStdout, nil},
		frame{99, []byte("of a newer init")},
		exitFrame(7, 0),
		frame{frameBye, nil},
	)
	// Whatever the reads are cut into, and with noise in front.
	for _, size := range []int{1, 3, 1000, 1 << 20} {
		out.Reset()
		errs.Reset()
		started, warned = nil, nil
		c := NewControl(&chunkReader{data: append([]byte("SeaBIOS\xa6\xa6m\r\n"), in...), size: size}, io.Discard, ControlConfig{
			Stdout: &out, Stderr: &errs,
			OnStart:   func(s string) { started = append(started, s) },
			OnWarning: func(s string) { warned = append(warned, s) },
		})
		if err := c.Run(); err != nil {
			t.Fatal(err)
		}
		want := ControlState{Hello: true, Release: "6.1?[31m", Started: true, Exited: true, Status: 7, Bye: true, Garbage: 12}
		if got := c.State(); got != want {
			t.Errorf("chunks of %d: got %+v, want %+v", size, got, want)
		}
		if out.String() != "out1 "+strings.Repeat("x", maxFrame) || errs.String() != "err\x00\x1b" {
			t.Errorf("chunks of %d: %d bytes of stdout, stderr %q", size, out.Len(), errs.String())
		}
		if strings.Join(started, "|") != "/bin/sh" || strings.Join(warned, "|") != "no tree" {
			t.Errorf("started %q, warned %q", started, warned)
		}
	}
}

func TestControlStates(t *testing.T) {
	for name, c := range map[string]struct {
		frames []frame
		want   ControlState
	}{
		"nothing":       {nil, ControlState{}},
		"killed":        {[]frame{exitFrame(0, 9)}, ControlState{Exited: true, Status: 137, Signal: 9}},
		"status":        {[]frame{exitFrame(0x12345607, 0)}, ControlState{Exited: true, Status: 7}},
		"wild signal":   {[]frame{exitFrame(1, 0xffffff80)}, ControlState{Exited: true, Status: 1}},
		"short exit":    {[]frame{{frameExit, []byte{1}}}, ControlState{}},
		"hello is text": {[]frame{{frameHello, []byte("hi")}}, ControlState{Hello: true}},
	} {
		ctl := NewControl(bytes.NewReader(fromGuest(c.frames...)), io.Discard, ControlConfig{})
		if err := ctl.Run(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got := ctl.State(); got != c.want {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
		}
	}
	// The first failure counts; it is made printable whatever it is.
	ctl := NewControl(bytes.NewReader(fromGuest(
		frame{frameError, []byte(`{"kind":"root","message":"no \u001b disk\n","status":1000}`)},
		frame{frameError, []byte(`second`)},
	)), io.Discard, ControlConfig{})
	if err := ctl.Run(); err != nil {
		t.Error(err)
	}
	if f := ctl.State().Failure; f == nil || *f != (GuestError{Kind: "root", Message: "no ? disk ", Status: 1000 & 0xff}) {
		t.Errorf("got %+v", f)
	}
}

func TestControlGarbage(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	noise := make([]byte, maxGarbage+maxFrame)
	for i := range noise {
		noise[i] = byte(r.Uint32()) &^ 0x80 // no frame begins in it
	}
	c := NewControl(bytes.NewReader(append(noise[:maxGarbage:maxGarbage], fromGuest(exitFrame(3, 0))...)), io.Discard, ControlConfig{})
	if err := c.Run(); err != nil || c.State().Status != 3 || c.State().Garbage != maxGarbage {
		t.Errorf("tolerable: %v, %+v", err, c.State())
	}
	c = NewControl(bytes.NewReader(noise), io.Discard, ControlConfig{})
	if err := c.Run(); !errors.Is(err, ErrControl) {
		t.Errorf("too much: %v", err)
	}
	// A length beyond the limit is no frame; one that is cut short is the end.
	long := appendFrame(nil, frameStdout, nil)
	binary.LittleEndian.PutUint16(long[3:], maxFrame+1)
	long[5] = frameCheck(long)
	cut := fromGuest(frame{frameStdout, []byte("never complete")})
	c = NewControl(bytes.NewReader(append(long, cut[:len(cut)-1]...)), io.Discard, ControlConfig{})
	if err := c.Run(); err != nil || c.State().Garbage != frameHeaderLen {
		t.Errorf("%v, %+v", err, c.State())
	}
}

func TestControlOutputGone(t *testing.T) {
	gone := errors.New("gone")
	c := NewControl(bytes.NewReader(fromGuest(frame{frameStdout, []byte("x")}, exitFrame(4, 0))), io.Discard,
		ControlConfig{Stdout: &failingWriter{err: gone}})
	if err := c.Run(); !errors.Is(err, gone) || c.State().Status != 4 {
		t.Errorf("%v, %+v: the status must not be lost", err, c.State())
	}
	c = NewControl(&chunkReader{err: gone}, io.Discard, ControlConfig{})
	if err := c.Run(); !errors.Is(err, gone) {
		t.Error(err)
	}
}

// Stdin is sent as the guest allows, and never before.
func TestControlStdin(t *testing.T) {
	input := strings.Repeat("0123456789", 10000)
	fromG, toG := pipe.New(), pipe.New()
	c := NewControl(fromG, toG, ControlConfig{Stdin: strings.NewReader(input)})
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.Run(); err != nil {
			t.Error(err)
		}
	})
	credit := func(n uint32) {
		_, _ = fromG.Write(fromGuest(frame{frameCredit, binary.LittleEndian.AppendUint32(nil, n)}))
	}
	frames := newFrameReader(toG)
	var got strings.Builder
	credit(1 << 31) // a hostile amount is cut to what is reasonable
	outstanding := maxCredit
	for {
		f, err := frames.next()
		if err != nil {
			t.Fatal(err)
		}
		if f.kind == frameStdinEOF {
			break
		}
		if f.kind != frameStdin || len(f.payload) > outstanding {
			t.Fatalf("frame %d with %d bytes, %d are allowed", f.kind, len(f.payload), outstanding)
		}
		got.Write(f.payload)
		outstanding -= len(f.payload)
		if outstanding < 100 {
			credit(700)
			outstanding += 700
		}
	}
	if got.String() != input {
		t.Errorf("%d bytes arrived, want %d", got.Len(), len(input))
	}
	if err := c.Resize(24, 80); err != nil {
		t.Error(err)
	}
	if err := c.Signal(15); err != nil {
		t.Error(err)
	}
	if c.Signal(-1) == nil || c.Signal(65) == nil {
		t.Error("-1 and 65 are not signals")
	}
	if f, err := frames.next(); err != nil || f.kind != frameResize || !bytes.Equal(f.payload, []byte{24, 0, 80, 0}) {
		t.Errorf("%+v, %v", f, err)
	}
	if f, err := frames.next(); err != nil || f.kind != frameSignal || !bytes.Equal(f.payload, []byte{15}) {
		t.Errorf("%+v, %v", f, err)
	}
	fromG.Close()
	wg.Wait()
}

// Without a command there is nobody to read the host's stdin.
func TestControlStdinUntouched(t *testing.T) {
	in := strings.NewReader("precious")
	c := NewControl(bytes.NewReader(fromGuest(frame{frameHello, nil}, frame{frameBye, nil})), io.Discard, ControlConfig{Stdin: in})
	if err := c.Run(); err != nil || in.Len() != 8 {
		t.Errorf("%v, %d bytes left", err, in.Len())
	}
}

// No input makes the parser panic, hang or hold more than a frame, and a
// frame behind it is found.
func FuzzControl(f *testing.F) {
	f.Add([]byte("noise"), uint8(1))
	f.Add(fromGuest(frame{frameStdout, []byte("x")}, exitFrame(1, 2), frame{frameCredit, []byte{1, 0, 0, 0}}), uint8(3))
	f.Add([]byte{frameMagic0, frameMagic1, 2, 0xff, 0xff, 0}, uint8(7))
	f.Fuzz(func(t *testing.T, data []byte, size uint8) {
		var out bytes.Buffer
		c := NewControl(&chunkReader{data: data, size: int(size) + 1}, io.Discard, ControlConfig{Stdout: &out, Stderr: &out})
		if err := c.Run(); err != nil {
			t.Error(err)
		}
		if s := c.State(); s.Garbage > int64(len(data)) || out.Len() > len(data) || s.Status > 255 {
			t.Errorf("%+v of %d bytes", s, len(data))
		}
	})
}

// chunkReader reads data in pieces.
type chunkReader struct {
	data []byte
	size int
	err  error
}

func (c *chunkReader) Read(p []byte) (int, error) {
	if len(c.data) == 0 {
		if c.err != nil {
			return 0, c.err
		}
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), c.size)], c.data)
	c.data = c.data[n:]
	return n, nil
}
