package fence_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"

	"github.com/hugelgupf/p9/fsimpl/staticfs"
	"github.com/hugelgupf/p9/p9"

	"github.com/moovm/moovm/virtio9p/fence"
)

// Serve a file tree on a socket, to anybody who connects.
func ExampleServe() {
	dir, err := os.MkdirTemp("", "fence")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	tree, err := staticfs.New(staticfs.WithFile("hello", "Hello.\n"))
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "9p"))
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- fence.Serve(ctx, l, fence.Config{Attacher: tree}) }()

	// A client: mount -t 9p -o trans=unix,version=9p2000.L SOCKET DIR, or this.
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	client, err := p9.NewClient(conn)
	if err != nil {
		log.Fatal(err)
	}
	root, err := client.Attach("")
	if err != nil {
		log.Fatal(err)
	}
	_, f, err := root.Walk([]string{"hello"})
	if err != nil {
		log.Fatal(err)
	}
	if _, _, err := f.Open(p9.ReadOnly); err != nil {
		log.Fatal(err)
	}
	b := make([]byte, 100)
	n, err := f.ReadAt(b, 0)
	fmt.Printf("%q %v\n", b[:n], err)

	cancel()
	fmt.Println(<-done)
	// Output:
	// "Hello.\n" <nil>
	// <nil>
}
