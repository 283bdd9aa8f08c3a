package bytejson

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"testing/quick"
	"time"
	"unicode/utf8"
)

// everyByte has all of them, alone and in a run.
func everyByte() (out []string) {
	all := ""
	for b := range 256 {
		out = append(out, string([]byte{byte(b)}))
		all += string([]byte{byte(b)})
	}
	return append(out, all)
}

type inner struct{ Name string }

type message struct {
	inner           // embedded, of a type that is not exported
	Args   []string `json:"args"`
	Env    map[string]string
	Any    any
	Dir    *string
	Deep   [][]map[string][1]inner
	Raw    []byte
	When   time.Time
	JSON   json.RawMessage
	Skip   string `json:"-"`
	Number int
	hidden string
	Func   func() `json:"-"`
}

func TestEveryByteArrives(t *testing.T) {
	for _, s := range append(everyByte(), "", "ü\ufffd", "\xed\xa0\x80", mark, mark+"AA==", mark+"\xff", "\x00", "<&>\u2028") {
		in := message{
			inner: inner{s}, Args: []string{s, "plain", s}, Env: map[string]string{s: s, s + "x": "y"}, Any: []any{s, map[string]any{s: s}},
			Dir: &s, Deep: [][]map[string][1]inner{nil, {{s: {{s}}}}}, Raw: []byte(s), When: time.Unix(1, 2).UTC(), JSON: json.RawMessage(`1`), Number: 3,
		}
		b, err := Marshal(in)
		if err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		if !utf8.Valid(b) {
			t.Errorf("%q: the JSON is no UTF-8", s)
		}
		var out message
		if err := Unmarshal(b, &out); err != nil {
			t.Fatalf("%q: %v in %s", s, err, b)
		}
		if !reflect.DeepEqual(in, out) {
			t.Errorf("%q became %+v", s, out)
		}
	}
}

// Marshal changes nothing of what it is given.
func TestMarshalCopies(t *testing.T) {
	bad := "\xff"
	in := message{Args: []string{bad}, Env: map[string]string{bad: bad}, Any: []any{bad}, Dir: &bad, Skip: bad, hidden: bad}
	if _, err := Marshal(&in); err != nil {
		t.Fatal(err)
	}
	want := "\xff"
	if !reflect.DeepEqual(in, message{Args: []string{want}, Env: map[string]string{want: want}, Any: []any{want}, Dir: &want, Skip: want, hidden: want}) {
		t.Errorf("%+v", in)
	}
}

// What has nothing to hide is written as encoding/json writes it.
func TestPlain(t *testing.T) {
	for _, v := range []any{nil, "ü", 1, []string{"a", "<"}, message{Args: []string{"a"}, When: time.Unix(0, 0).UTC(), JSON: json.RawMessage(`{}`)}, (*message)(nil), errors.New("x")} {
		want, err1 := json.Marshal(v)
		got, err2 := Marshal(v)
		if err1 != nil || err2 != nil || string(got) != string(want) {
			t.Errorf("%s, %v; want %s, %v", got, err2, want, err1)
		}
	}
	var got []string
	if err := Unmarshal([]byte(`["a","\u0000b","\ufffd"]`), &got); err != nil || !reflect.DeepEqual(got, []string{"a", "\x00b", "\ufffd"}) {
		t.Errorf("%q, %v", got, err)
	}
}

func TestRefused(t *testing.T) {
	type loop struct{ Next *loop }
	l := &loop{}
	l.Next = l
	if _, err := Marshal(l); !errors.Is(err, errDepth) {
		t.Errorf("a value that contains itself: %v", err)
	}
	if _, err := Marshal(make(chan int)); err == nil {
		t.Error("a channel was taken")
	}
	var s []string
	for _, bad := range []string{``, `[`, `["\u0000base64:?"]`, `["\u0000base64:AA"]`, `{"a":1}`} {
		if err := Unmarshal([]byte(bad), &s); err == nil {
			t.Errorf("%s was taken", bad)
		}
	}
	if err := Unmarshal([]byte(`[]`), nil); err == nil {
		t.Error("nil was taken")
	}
	if err := Unmarshal([]byte(`[]`), s); err == nil {
		t.Error("no pointer was taken")
	}
	// Deep input, as a hostile peer may send it.
	var v any
	if err := Unmarshal([]byte(strings.Repeat("[", 5000)+strings.Repeat("]", 5000)), &v); !errors.Is(err, errDepth) {
		t.Errorf("deep input: %v", err)
	}
}

// Two strings are two in JSON as well.
func TestDistinct(t *testing.T) {
	f := func(a, b []byte) bool {
		x, err1 := Marshal(string(a))
		y, err2 := Marshal(string(b))
		return err1 == nil && err2 == nil && (string(a) == string(b)) == (string(x) == string(y))
	}
	if err := quick.Check(f, nil); err != nil {
		t.Error(err)
	}
	seen := map[string]string{}
	for _, s := range everyByte() {
		b, _ := Marshal(s)
		if other, ok := seen[string(b)]; ok {
			t.Errorf("%q and %q are both %s", s, other, b)
		}
		seen[string(b)] = s
	}
}

func FuzzRoundTrip(f *testing.F) {
	for _, s := range []string{"", "a", "\xff", mark, mark + "AA=="} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, k, v string) {
		in := map[string][]string{k: {v, k}}
		b, err := Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		var out map[string][]string
		if err := Unmarshal(b, &out); err != nil || !reflect.DeepEqual(in, out) {
			t.Fatalf("%q became %q (%v)", in, out, err)
		}
	})
}

// FuzzUnmarshal reads anything; what it takes, Marshal can write again.
func FuzzUnmarshal(f *testing.F) {
	for _, s := range []string{`{}`, `{"args":["\u0000base64:/w=="],"Env":{"\u0000base64:/w==":"x"},"Any":[{}]}`, `[[[`, `{"Any":"\u0000base64:"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m message
		if Unmarshal(b, &m) != nil {
			return
		}
		again, err := Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var n message
		if err := Unmarshal(again, &n); err != nil {
			t.Fatal(err)
		}
	})
}
