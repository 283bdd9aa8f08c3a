package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// openRegistry finds an image in a registry, or in one of its mirrors.
func openRegistry(ctx context.Context, ref string, o Options) (*Image, error) {
	r, err := name.ParseReference(ref)
	if err != nil {
		return nil, fmt.Errorf("%w: %w; there is no file or folder of that name either", ErrReference, err)
	}
	var failed []error
	for _, at := range mirrors(r, o) {
		m, err := pullFrom(ctx, at, o)
		if err == nil {
			return m, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		failed = append(failed, explain(at, err))
	}
	return nil, errors.Join(failed...)
}

// mirrors are the places where an image is looked for: its own registry last.
func mirrors(r name.Reference, o Options) (all []name.Reference) {
	host := r.Context().RegistryStr()
	keys := []string{host}
	if host == name.DefaultRegistry {
		keys = append(keys, "docker.io")
	}
	for _, key := range keys {
		for _, mirror := range o.Mirrors[key] {
			var opts []name.Option
			if rest, ok := strings.CutPrefix(mirror, "http://"); ok {
				mirror = rest
				opts = append(opts, name.Insecure)
			}
			mirror = strings.TrimPrefix(mirror, "https://")
			separator := ":"
			if _, ok := r.(name.Digest); ok {
				separator = "@"
			}
			if at, err := name.ParseReference(mirror+"/"+r.Context().RepositoryStr()+separator+r.Identifier(), opts...); err == nil {
				all = append(all, at)
			}
		}
	}
	return append(all, r)
}

// pullFrom reads manifest and configuration.
func pullFrom(ctx context.Context, r name.Reference, o Options) (*Image, error) {
	platform, err := o.platform()
	if err != nil {
		return nil, err
	}
	puller, err := remote.NewPuller(remote.WithAuthFromKeychain(authn.DefaultKeychain), remote.WithPlatform(*platform), remote.WithUserAgent("moovm"))
	if err != nil {
		return nil, err
	}
	// What is read here is small: the time that a registry may say nothing is enough for it.
	short, cancel := context.WithTimeoutCause(ctx, o.Stall, fmt.Errorf("%w for %v", ErrStalled, o.Stall))
	defer cancel()
	m, err := describe(short, puller, r, platform)
	if err != nil && short.Err() != nil {
		err = context.Cause(short)
	}
	return m, err
}

func describe(ctx context.Context, puller *remote.Puller, r name.Reference, platform *v1.Platform) (*Image, error) {
	d, err := puller.Get(ctx, r)
	if err != nil {
		return nil, err
	}
	img, err := d.Image()
	if err != nil {
		if strings.Contains(err.Error(), "no child with platform") {
			return nil, fmt.Errorf("%w %s", ErrPlatform, platform)
		}
		return nil, err
	}
	raw, err := img.RawManifest()
	if err != nil {
		return nil, err
	}
	manifest, err := parseManifest(raw)
	if err != nil {
		return nil, err
	}
	digest, err := img.Digest()
	if err != nil {
		return nil, err
	}
	m := &Image{Digest: digest.String()}
	if raw, err = img.RawConfigFile(); err != nil {
		return nil, err
	}
	c, err := m.setConfig(raw, len(manifest.Layers))
	if err != nil {
		return nil, err
	}
	if err := checkPlatform(c, platform); err != nil {
		return nil, err
	}
	repo := r.Context()
	for _, l := range manifest.Layers {
		m.layers = append(m.layers, layer{digest: l.Digest.String(), size: l.Size, remote: true, open: func(ctx context.Context) (io.ReadCloser, error) {
			blob, err := puller.Layer(ctx, repo.Digest(l.Digest.String()))
			if err != nil {
				return nil, err
			}
			body, err := blob.Compressed() // whose digest is checked there
			if err != nil {
				return nil, explain(repo.Digest(l.Digest.String()), err)
			}
			return readCloser{&sized{r: body, left: l.Size}, body}, nil
		}})
	}
	return m, nil
}

// sized ends with an error where more comes than should.
type sized struct {
	r    io.Reader
	left int64
}

func (s *sized) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if s.left -= int64(n); s.left < 0 {
		return 0, fmt.Errorf("%w: more bytes than its manifest says", ErrDigest)
	}
	if err != nil && err != io.EOF && strings.Contains(err.Error(), "error verifying") {
		err = fmt.Errorf("%w: %w", ErrDigest, err)
	}
	return n, err
}

// explain says what can be done about what a registry answered.
func explain(r name.Reference, err error) error {
	var e *transport.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("%s will not give it to us: log in with `docker login %s`, or there is no such image: %w", r.Context().RegistryStr(), r.Context().RegistryStr(), err)
	case http.StatusNotFound:
		return fmt.Errorf("%s has no such image: %w", r.Context().RegistryStr(), err)
	}
	return err
}
