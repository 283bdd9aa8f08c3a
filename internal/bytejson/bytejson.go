// Package bytejson is encoding/json for strings that are bytes: paths,
// arguments and environment values of Unix, in which any byte but zero may
// stand. encoding/json makes U+FFFD of what is no UTF-8, and two names become
// one. Here every string of a value, keys of maps too, arrives as it was:
//
//	valid UTF-8       as encoding/json writes it, so that others can read it
//	everything else   "\u0000base64:" and the bytes in base64 (RFC 4648, section 4)
//
// A valid string that happens to begin with that mark is written the second
// way too. What encoding/json reads and writes through methods of the type is
// left to the methods.
package bytejson

import (
	"encoding"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"unicode/utf8"
)

const mark = "\x00base64:"

// maxDepth is how deep values may be nested. Those of our messages are flat;
// one that contains itself ends here.
const maxDepth = 1000

var errDepth = errors.New("bytejson: the value is nested too deeply, or contains itself")

// Marshal returns v as JSON. v itself is not changed.
func Marshal(v any) ([]byte, error) {
	in := reflect.ValueOf(v)
	if !in.IsValid() {
		return json.Marshal(v)
	}
	out := reflect.New(in.Type()).Elem()
	out.Set(in)
	if err := walk(out, encode, 0); err != nil {
		return nil, err
	}
	return json.Marshal(out.Interface())
}

// Unmarshal reads what Marshal wrote, or plain JSON, into what v points to. It
// trusts nothing: what is no JSON, or no base64 behind the mark, is an error.
func Unmarshal(b []byte, v any) error {
	if err := json.Unmarshal(b, v); err != nil {
		return err
	}
	return walk(reflect.ValueOf(v).Elem(), decode, 0) // a pointer: or json would have said so
}

// Encode is the valid UTF-8 that Marshal writes for s: s itself, or its bytes in
// base64 behind the mark. It is for those who write JSON themselves.
func Encode(s string) string {
	if utf8.ValidString(s) && !strings.HasPrefix(s, mark) {
		return s
	}
	return mark + base64.StdEncoding.EncodeToString([]byte(s))
}

func encode(s string) (string, error) { return Encode(s), nil }

func decode(s string) (string, error) {
	text, ok := strings.CutPrefix(s, mark)
	if !ok {
		return s, nil
	}
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return "", fmt.Errorf("bytejson: a string that is marked as base64 is not: %w", err)
	}
	return string(b), nil
}

// walk replaces every string in v, which can be set, by what f makes of it.
// What v refers to is copied first.
func walk(v reflect.Value, f func(string) (string, error), depth int) error {
	if depth > maxDepth {
		return errDepth
	}
	if ownMethods(v.Type()) {
		return nil
	}
	switch v.Kind() {
	case reflect.String:
		if !v.CanSet() {
			return nil // unexported: nor does encoding/json look at it
		}
		s, err := f(v.String())
		if err == nil {
			v.SetString(s)
		}
		return err
	case reflect.Struct:
		for i := range v.NumField() {
			if err := walk(v.Field(i), f, depth+1); err != nil {
				return err
			}
		}
	case reflect.Array:
		return elements(v, f, depth)
	case reflect.Slice:
		if v.IsNil() || !v.CanSet() || v.Type().Elem().Kind() == reflect.Uint8 {
			return nil
		}
		c := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
		reflect.Copy(c, v)
		v.Set(c)
		return elements(v, f, depth)
	case reflect.Pointer, reflect.Interface:
		if v.IsNil() || !v.CanSet() {
			return nil
		}
		c := reflect.New(v.Elem().Type())
		c.Elem().Set(v.Elem())
		if err := walk(c.Elem(), f, depth+1); err != nil {
			return err
		}
		if v.Kind() == reflect.Interface {
			c = c.Elem()
		}
		v.Set(c)
	case reflect.Map:
		if v.IsNil() || !v.CanSet() {
			return nil
		}
		return entries(v, f, depth)
	}
	return nil
}

func elements(v reflect.Value, f func(string) (string, error), depth int) error {
	for i := range v.Len() {
		if err := walk(v.Index(i), f, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func entries(v reflect.Value, f func(string) (string, error), depth int) error {
	c := reflect.MakeMapWithSize(v.Type(), v.Len())
	for it := v.MapRange(); it.Next(); {
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		key.Set(it.Key())
		value.Set(it.Value())
		if err := walk(key, f, depth+1); err != nil {
			return err
		}
		if err := walk(value, f, depth+1); err != nil {
			return err
		}
		c.SetMapIndex(key, value)
	}
	v.Set(c)
	return nil
}

// ownMethods says whether encoding/json uses methods of the type.
func ownMethods(t reflect.Type) bool {
	if t.PkgPath() == "" && t.Kind() != reflect.Pointer && t.Kind() != reflect.Struct && t.Kind() != reflect.Interface {
		return false // no type of anybody's
	}
	for _, i := range []reflect.Type{
		reflect.TypeFor[json.Marshaler](), reflect.TypeFor[json.Unmarshaler](),
		reflect.TypeFor[encoding.TextMarshaler](), reflect.TypeFor[encoding.TextUnmarshaler](),
	} {
		if t.Implements(i) || t.Kind() != reflect.Pointer && t.Kind() != reflect.Interface && reflect.PointerTo(t).Implements(i) {
			return true
		}
	}
	return false
}
