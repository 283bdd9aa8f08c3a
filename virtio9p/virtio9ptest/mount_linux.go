package virtio9ptest

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"testing"

	"github.com/hugelgupf/p9/p9"
	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio9p/fence"
)

// Mount serves a on a socket, has this machine's kernel mount it, and returns
// where. The test is skipped where that is not possible; its end unmounts.
func Mount(t testing.TB, a p9.Attacher) string {
	t.Helper()
	mnt := t.TempDir()
	sock := filepath.Join(t.TempDir(), "9p")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- fence.Serve(ctx, l, fence.Config{Attacher: a}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	err = unix.Mount(sock, mnt, "9p", 0, "trans=unix,version=9p2000.L,msize=512000,cache=none,access=any,noxattr")
	switch {
	case err == nil:
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		t.Skipf("mounting needs root and CAP_SYS_ADMIN (%v); run the test in `moovm sandbox`", err)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.EINVAL):
		t.Skipf("the kernel modules 9p and 9pnet_fd are missing (%v); modprobe them, or run the test in `moovm sandbox`", err)
	default:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Errorf("umount: %v", err)
			unix.Unmount(mnt, unix.MNT_DETACH)
		}
	})
	return mnt
}
