package control

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"github.com/moovm/moovm/internal/pipe"
	"go.uber.org/goleak"

	"github.com/moovm/moovm/internal/bytejson"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fromGuest is what a guest's init writes.
func fromGuest(frames ...Frame) []byte {
	var b []byte
	for _, f := range frames {
		b = AppendFrame(b, f.Kind, f.Payload)
	}
	return b
}

func exitFrame(status, signal uint32) Frame {
	b := binary.LittleEndian.AppendUint32(nil, status)
	return Frame{FrameExit, binary.LittleEndian.AppendUint32(b, signal)}
}

func jsonFrame(t *testing.T, kind FrameKind, v any) Frame {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return Frame{kind, b}
}

func TestControl(t *testing.T) {
	var out, errs bytes.Buffer
	var started, warned []string
	in := fromGuest(
		jsonFrame(t, FrameHello, Hello{1, "6.1\x1b[31m"}),
		Frame{FrameWarn, []byte("no\ntree")},
		Frame{FrameStart, []byte("/bin/sh")},
		Frame{FrameStdout, []byte("out1 ")},
		Frame{FrameStderr, []byte("err\x00\x1b")},
		Frame{FrameStdout, bytes.Repeat([]byte("x"), MaxFrame)},
		Frame{FrameStdout, nil},
		Frame{99, []byte("of a newer init")},
		exitFrame(7, 0),
		Frame{FrameBye, nil},
	)
	// Whatever the reads are cut into, and with noise in front.
	for _, size := range []int{1, 3, 1000, 1 << 20} {
		out.Reset()
		errs.Reset()
		started, warned = nil, nil
		c := NewHost(&chunkReader{data: append([]byte("SeaBIOS\xa6\xa6m\r\n"), in...), size: size}, io.Discard, HostConfig{
			Stdout: &out, Stderr: &errs,
			OnStart:   func(s string) { started = append(started, s) },
			OnWarning: func(s string) { warned = append(warned, s) },
		})
		if err := c.Run(); err != nil {
			t.Fatal(err)
		}
		want := State{Hello: true, Release: `6.1\x1b[31m`, Started: true, Exited: true, Status: 7, Bye: true, Garbage: 12}
		if got := c.State(); got != want {
			t.Errorf("chunks of %d: got %+v, want %+v", size, got, want)
		}
		if out.String() != "out1 "+strings.Repeat("x", MaxFrame) || errs.String() != "err\x00\x1b" {
			t.Errorf("chunks of %d: %d bytes of stdout, stderr %q", size, out.Len(), errs.String())
		}
		if strings.Join(started, "|") != "/bin/sh" || strings.Join(warned, "|") != "no tree" {
			t.Errorf("started %q, warned %q", started, warned)
		}
	}
}

// What the guest says of its own accord is shown escaped, and names in it can be
// told apart.
func TestControlBytes(t *testing.T) {
	var warned, started string
	hello, err := bytejson.Marshal(Hello{1, "6.1-\xff"})
	if err != nil {
		t.Fatal(err)
	}
	failure, err := bytejson.Marshal(GuestError{Kind: FailCommand, Message: "/bin/\x80\u202e cannot be run", Status: 126})
	if err != nil {
		t.Fatal(err)
	}
	c := NewHost(bytes.NewReader(fromGuest(Frame{FrameHello, hello}, Frame{FrameWarn, []byte("\x1b]0;owned\x07\xff")},
		Frame{FrameStart, []byte("/bin/\xfe\n")}, Frame{FrameError, failure})), io.Discard, HostConfig{
		OnStart:   func(s string) { started = s },
		OnWarning: func(s string) { warned = s },
	})
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	s := c.State()
	if s.Release != `6.1-\xff` || warned != `\x1b]0;owned\x07\xff` || started != `/bin/\xfe ` {
		t.Errorf("release %q, warned %q, started %q", s.Release, warned, started)
	}
	if s.Failure == nil || s.Failure.Message != `/bin/\x80\u202e cannot be run` {
		t.Errorf("failure %+v", s.Failure)
	}
}

func TestControlStates(t *testing.T) {
	for name, c := range map[string]struct {
		frames []Frame
		want   State
	}{
		"nothing":       {nil, State{}},
		"killed":        {[]Frame{exitFrame(0, 9)}, State{Exited: true, Status: 137, Signal: 9}},
		"status":        {[]Frame{exitFrame(0x12345607, 0)}, State{Exited: true, Status: 7}},
		"wild signal":   {[]Frame{exitFrame(1, 0xffffff80)}, State{Exited: true, Status: 1}},
		"short exit":    {[]Frame{{FrameExit, []byte{1}}}, State{}},
		"hello is text": {[]Frame{{FrameHello, []byte("hi")}}, State{Hello: true}},
	} {
		ctl := NewHost(bytes.NewReader(fromGuest(c.frames...)), io.Discard, HostConfig{})
		if err := ctl.Run(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got := ctl.State(); got != c.want {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
		}
	}
	// The first failure counts; it is made printable whatever it is.
	ctl := NewHost(bytes.NewReader(fromGuest(
		Frame{FrameError, []byte(`{"kind":"root","message":"no \u001b disk\n","status":1000}`)},
		Frame{FrameError, []byte(`second`)},
	)), io.Discard, HostConfig{})
	if err := ctl.Run(); err != nil {
		t.Error(err)
	}
	if f := ctl.State().Failure; f == nil || *f != (GuestError{Kind: "root", Message: `no \x1b disk `, Status: 1000 & 0xff}) {
		t.Errorf("got %+v", f)
	}
}

func TestControlGarbage(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	noise := make([]byte, maxGarbage+MaxFrame)
	for i := range noise {
		noise[i] = byte(r.Uint32()) &^ 0x80 // no frame begins in it
	}
	c := NewHost(bytes.NewReader(append(noise[:maxGarbage:maxGarbage], fromGuest(exitFrame(3, 0))...)), io.Discard, HostConfig{})
	if err := c.Run(); err != nil || c.State().Status != 3 || c.State().Garbage != maxGarbage {
		t.Errorf("tolerable: %v, %+v", err, c.State())
	}
	c = NewHost(bytes.NewReader(noise), io.Discard, HostConfig{})
	if err := c.Run(); !errors.Is(err, ErrLine) {
		t.Errorf("too much: %v", err)
	}
	// A length beyond the limit is no frame; one that is cut short is the end.
	long := AppendFrame(nil, FrameStdout, nil)
	binary.LittleEndian.PutUint16(long[3:], MaxFrame+1)
	long[5] = frameCheck(long)
	cut := fromGuest(Frame{FrameStdout, []byte("never complete")})
	c = NewHost(bytes.NewReader(append(long, cut[:len(cut)-1]...)), io.Discard, HostConfig{})
	if err := c.Run(); err != nil || c.State().Garbage != frameHeaderLen {
		t.Errorf("%v, %+v", err, c.State())
	}
}

func TestControlOutputGone(t *testing.T) {
	gone := errors.New("gone")
	c := NewHost(bytes.NewReader(fromGuest(Frame{FrameStdout, []byte("x")}, exitFrame(4, 0))), io.Discard,
		HostConfig{Stdout: writerFunc(func([]byte) (int, error) { return 0, gone })})
	if err := c.Run(); !errors.Is(err, gone) || c.State().Status != 4 {
		t.Errorf("%v, %+v: the status must not be lost", err, c.State())
	}
	c = NewHost(&chunkReader{err: gone}, io.Discard, HostConfig{})
	if err := c.Run(); !errors.Is(err, gone) {
		t.Error(err)
	}
}

// Stdin is sent as the guest allows, and never before.
func TestControlStdin(t *testing.T) {
	input := strings.Repeat("0123456789", 10000)
	fromG, toG := pipe.New(), pipe.New()
	c := NewHost(fromG, toG, HostConfig{Stdin: strings.NewReader(input)})
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.Run(); err != nil {
			t.Error(err)
		}
	})
	credit := func(n uint32) {
		_, _ = fromG.Write(fromGuest(Frame{FrameCredit, binary.LittleEndian.AppendUint32(nil, n)}))
	}
	frames := NewFrameReader(toG)
	var got strings.Builder
	credit(1 << 31) // a hostile amount is cut to what is reasonable
	outstanding := MaxCredit
	for {
		f, err := frames.Next()
		if err != nil {
			t.Fatal(err)
		}
		if f.Kind == FrameStdinEOF {
			break
		}
		if f.Kind != FrameStdin || len(f.Payload) > outstanding {
			t.Fatalf("frame %d with %d bytes, %d are allowed", f.Kind, len(f.Payload), outstanding)
		}
		got.Write(f.Payload)
		outstanding -= len(f.Payload)
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
	if f, err := frames.Next(); err != nil || f.Kind != FrameResize || !bytes.Equal(f.Payload, []byte{24, 0, 80, 0}) {
		t.Errorf("%+v, %v", f, err)
	}
	if f, err := frames.Next(); err != nil || f.Kind != FrameSignal || !bytes.Equal(f.Payload, []byte{15}) {
		t.Errorf("%+v, %v", f, err)
	}
	fromG.Close()
	wg.Wait()
}

// Without a command there is nobody to read the host's stdin.
func TestControlStdinUntouched(t *testing.T) {
	in := strings.NewReader("precious")
	c := NewHost(bytes.NewReader(fromGuest(Frame{FrameHello, nil}, Frame{FrameBye, nil})), io.Discard, HostConfig{Stdin: in})
	if err := c.Run(); err != nil || in.Len() != 8 {
		t.Errorf("%v, %d bytes left", err, in.Len())
	}
}

// No input makes the parser panic, hang or hold more than a frame, and a
// frame behind it is found.
func FuzzControl(f *testing.F) {
	f.Add([]byte("noise"), uint8(1))
	f.Add(fromGuest(Frame{FrameStdout, []byte("x")}, exitFrame(1, 2), Frame{FrameCredit, []byte{1, 0, 0, 0}}), uint8(3))
	f.Add([]byte{frameMagic0, frameMagic1, 2, 0xff, 0xff, 0}, uint8(7))
	f.Fuzz(func(t *testing.T, data []byte, size uint8) {
		var out bytes.Buffer
		c := NewHost(&chunkReader{data: data, size: int(size) + 1}, io.Discard, HostConfig{Stdout: &out, Stderr: &out})
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

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A line at rest is saved and continued: the host of the copy sends its own
// stdin within the credit that the guest has given, on the line in use.
func TestContinue(t *testing.T) {
	guestIn, hostOut := io.Pipe()
	hostIn, guestOut := io.Pipe()
	first := NewHost(strings.NewReader(""), io.Discard, HostConfig{Stdin: strings.NewReader("sent")})
	first.AddLine(hostIn, hostOut)
	ran := make(chan error, 1)
	go func() { ran <- first.Run() }()
	credit := func(n uint32) []byte {
		return AppendFrame(nil, FrameCredit, binary.LittleEndian.AppendUint32(nil, n))
	}
	if _, err := guestOut.Write(append(fromGuest(jsonFrame(t, FrameHello, Hello{1, "6.1"}), Frame{FrameStart, []byte("agent")}), credit(100)...)); err != nil {
		t.Fatal(err)
	}
	frames := NewFrameReader(guestIn)
	if f, err := frames.Next(); err != nil || string(f.Payload) != "sent" {
		t.Fatalf("%q, %v", f.Payload, err)
	}
	// It is not at rest before the credit has come back.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := first.Idle(gone); !errors.Is(err, context.Canceled) {
		t.Errorf("at rest: %v", err)
	}
	if _, err := guestOut.Write(credit(4)); err != nil {
		t.Fatal(err)
	}
	saved, err := first.Idle(t.Context())
	if err != nil || saved.Line != 1 || saved.Credit != 100 || !saved.State.Started || saved.State.Release != "6.1" {
		t.Errorf("%+v, %v", saved, err)
	}
	if f, err := frames.Next(); err != nil || f.Kind != FrameStdinEOF {
		t.Errorf("%+v, %v", f, err)
	}
	guestOut.Close()
	if err := <-ran; err != nil {
		t.Error(err)
	}
	if _, err := NewHost(nil, nil, HostConfig{}).Idle(gone); !errors.Is(err, context.Canceled) {
		t.Errorf("without a guest: %v", err)
	}

	guestIn, hostOut = io.Pipe()
	hostIn, guestOut = io.Pipe()
	second := NewHost(strings.NewReader(""), io.Discard, HostConfig{Stdin: strings.NewReader(strings.Repeat("x", 150))})
	second.AddLine(hostIn, hostOut)
	for _, bad := range []Saved{{Line: 2}, {Line: -1}, {Credit: MaxCredit + 1}, {Credit: -1}} {
		if err := second.Continue(bad); !errors.Is(err, ErrLine) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if err := second.Continue(saved); err != nil {
		t.Fatal(err)
	}
	go func() { ran <- second.Run() }()
	frames = NewFrameReader(guestIn)
	if f, err := frames.Next(); err != nil || len(f.Payload) != 100 {
		t.Fatalf("%d bytes, %v", len(f.Payload), err)
	}
	if _, err := guestOut.Write(credit(100)); err != nil {
		t.Fatal(err)
	}
	if f, err := frames.Next(); err != nil || len(f.Payload) != 50 {
		t.Fatalf("%d bytes, %v", len(f.Payload), err)
	}
	if f, err := frames.Next(); err != nil || f.Kind != FrameStdinEOF {
		t.Errorf("%+v, %v", f, err)
	}
	guestOut.Close()
	if err := <-ran; err != nil || !second.State().Started {
		t.Error(err)
	}
}
