package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	broken := errors.New("the probe itself failed")
	probe := func(usable bool, err error) Probe {
		return func(context.Context) (bool, string, error) { return usable, "KVM is not enough", err }
	}
	for _, c := range []struct {
		name, accel string
		inside      bool
		usable      bool
		probeErr    error
		want        Place
		err         string
	}{
		{"auto with KVM", "auto", false, true, nil, Place{}, ""},
		{"nothing said, with KVM", "", false, true, nil, Place{}, ""},
		{"auto without", "auto", false, false, nil, Place{true, "KVM is not enough"}, ""},
		{"kvm without", "kvm", false, false, nil, Place{}, "KVM is not enough; see moovm doctor"},
		{"sandbox although KVM works", "sandbox", false, true, nil, Place{Sandbox: true}, ""},
		{"sandbox in the sandbox", "sandbox", true, true, nil, Place{}, ""},
		{"a sandbox without KVM", "auto", true, false, nil, Place{}, "KVM is not enough"},
		{"a broken probe", "auto", false, false, broken, Place{}, broken.Error()},
		{"nonsense", "xen", false, true, nil, Place{}, `accel "xen": use auto, kvm or sandbox`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv(SandboxEnv, "")
			if c.inside {
				t.Setenv(SandboxEnv, "1")
			}
			got, err := Choose(t.Context(), c.accel, probe(c.usable, c.probeErr))
			if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("%+v, %v; want %+v, %q", got, err, c.want, c.err)
			}
			var none *NoKVMError
			if strings.HasPrefix(c.err, "KVM is not") && !errors.As(err, &none) {
				t.Errorf("%T is no NoKVMError", err)
			}
		})
	}
}

// A sandbox that was asked for needs no probe: it may take seconds.
func TestChooseWithoutProbe(t *testing.T) {
	t.Setenv(SandboxEnv, "")
	p, err := Choose(t.Context(), AccelSandbox, func(context.Context) (bool, string, error) {
		t.Error("probed")
		return true, "", nil
	})
	if !p.Sandbox || err != nil {
		t.Error(p, err)
	}
}

func TestKernels(t *testing.T) {
	t.Setenv("MOOVM_KERNEL", "a:b")
	cache := t.TempDir()
	t.Setenv("MOOVM_CACHE", cache)
	if k, err := Kernels(); err != nil || len(k) != 2 || k[1] != "b" {
		t.Errorf("%q, %v", k, err)
	}
	if k, err := Kernel(); err != nil || k != "a" {
		t.Errorf("%q, %v", k, err)
	}
	if k, err := SandboxKernel(""); err != nil || k != "a" {
		t.Errorf("%q, %v", k, err)
	}
	if k, err := SandboxKernel("guests"); err != nil || k != "guests" {
		t.Errorf("%q, %v", k, err)
	}
	t.Setenv("MOOVM_KERNEL", "")
	if _, err := Kernels(); !errors.Is(err, ErrNoKernel) {
		t.Error(err)
	}
	if _, err := SandboxKernel(""); !errors.Is(err, ErrNoKernel) {
		t.Error(err)
	}
	cached := filepath.Join(cache, "kernel", "current", "boot", "vmlinuz-1")
	if err := os.MkdirAll(filepath.Dir(cached), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cached, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if k, err := Kernels(); err != nil || len(k) != 1 || k[0] != cached {
		t.Errorf("%q, %v", k, err)
	}
	if k, err := SandboxKernel("guests"); err != nil || k != cached {
		t.Errorf("%q, %v", k, err)
	}
}

func TestCacheDir(t *testing.T) {
	t.Setenv("MOOVM_CACHE", "/there")
	if dir, err := CacheDir(); dir != "/there" || err != nil {
		t.Error(dir, err)
	}
	t.Setenv("MOOVM_CACHE", "")
	t.Setenv("XDG_CACHE_HOME", "/xdg")
	if dir, err := CacheDir(); dir != "/xdg/moovm" || err != nil {
		t.Error(dir, err)
	}
	t.Setenv("XDG_CACHE_HOME", "")
	t.Setenv("HOME", "/home/me")
	if dir, err := CacheDir(); dir != "/home/me/.cache/moovm" || err != nil {
		t.Error(dir, err)
	}
	// Without $HOME the user database knows, or it is said what to set.
	os.Unsetenv("HOME")
	if dir, err := CacheDir(); err == nil && !strings.HasSuffix(dir, "/.cache/moovm") || err != nil && !strings.Contains(err.Error(), "$MOOVM_CACHE") {
		t.Error(dir, err)
	}
}
