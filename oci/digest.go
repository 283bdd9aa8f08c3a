package oci

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"strings"
)

// newHash is the hash of a digest, as "sha256:…".
func newHash(digest string) (hash.Hash, error) {
	name, sum, _ := strings.Cut(digest, ":")
	var h hash.Hash
	switch name {
	case "sha256":
		h = sha256.New()
	case "sha512":
		h = sha512.New()
	default:
		return nil, fmt.Errorf("%w: %.100q is of a kind that is not known", ErrDigest, digest)
	}
	if b, err := hex.DecodeString(sum); err != nil || len(b) != h.Size() || strings.ToLower(sum) != sum {
		return nil, fmt.Errorf("%w: %.200q is none", ErrDigest, digest)
	}
	return h, nil
}

// verified is r, whose end is an error if what it gave has not the digest, or
// not the size unless that is negative.
func verified(r io.Reader, digest string, size int64) (io.Reader, error) {
	h, err := newHash(digest)
	if err != nil {
		return nil, err
	}
	return &verifier{r: r, h: h, digest: digest, size: size}, nil
}

type verifier struct {
	r       io.Reader
	h       hash.Hash
	digest  string
	size, n int64
}

func (v *verifier) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	v.h.Write(p[:n])
	v.n += int64(n)
	if v.size >= 0 && v.n > v.size {
		return n, fmt.Errorf("%w: more than its %d bytes", ErrDigest, v.size)
	}
	if err == io.EOF {
		_, want, _ := strings.Cut(v.digest, ":")
		if v.size >= 0 && v.n != v.size {
			return n, fmt.Errorf("%w: it ends after %d of %d bytes", ErrDigest, v.n, v.size)
		}
		if got := hex.EncodeToString(v.h.Sum(nil)); got != want {
			return n, fmt.Errorf("%w: it is %s", ErrDigest, got)
		}
	}
	return n, err
}

// checkBytes is verified for what is in memory.
func checkBytes(b []byte, digest string, size int64) error {
	r, err := verified(strings.NewReader(string(b)), digest, size)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	return err
}
