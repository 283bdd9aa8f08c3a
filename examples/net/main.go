// Command net asks a web server that runs in a guest, by Go's HTTP client and
// without a port of this machine's: the network between them is in this process.
//
// The guest is this same program, three times: its init, the web server, and on
// this side the client.
//
//	go run ./examples/net -kernel /boot/vmlinuz-…
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/guest/guestinit"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
	"github.com/moovm/moovm/usernet"
)

func main() {
	if guestinit.IsInit() {
		guestinit.Main() // never returns
	}
	path := flag.String("kernel", "", "kernel `FILE`: a vmlinuz")
	modules := flag.String("modules", "", "its modules `DIR`; empty looks beside it")
	serve := flag.Bool("serve", false, "be the web server, in the guest")
	flag.Parse()
	err := func() error {
		if *serve {
			return server()
		}
		return run(os.Stdout, *path, *modules)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "net:", err)
		os.Exit(1)
	}
}

// server runs in the guest.
func server() error {
	name, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return err
	}
	return http.ListenAndServe(":80", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "Linux %s in a guest answers %s", name[:len(name)-1], r.RemoteAddr)
	}))
}

// run boots the guest and writes what its server says to w.
func run(w io.Writer, path, dir string) error {
	k, err := kernel.LoadKernel(path)
	if err != nil {
		return err
	}
	defer k.Close()
	var m *kmod.Modules
	if dir != "" {
		m, err = kmod.OpenModules(dir, k.Release)
	} else {
		m, err = kmod.FindModules(k)
	}
	if err != nil {
		return err
	}
	network, err := usernet.New(usernet.Config{}) // which leads nowhere but into the guest
	if err != nil {
		return err
	}
	defer network.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	g, err := guest.Start(ctx, guest.Config{
		Kernel: k, Modules: m, NoTree: true,
		Command: &control.Command{Args: []string{"/proc/self/exe", "-serve"}},
		Networks: []guest.Network{{
			Link: network, MAC: guest.MACAddress("example"), Gateway: usernet.RouterAddr(),
			Address: netip.PrefixFrom(usernet.GuestAddr(), usernet.Subnet().Bits()),
		}},
		Stdout: os.Stderr, Stderr: os.Stderr,
	})
	if err != nil {
		return err
	}
	defer g.Close()
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return network.Dial(ctx, "tcp", ":80") },
	}}
	for {
		r, err := client.Get("http://guest/")
		if err == nil {
			_, err = io.Copy(w, r.Body)
			r.Body.Close()
			fmt.Fprintln(w)
			return err
		}
		if ctx.Err() != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond) // it boots
	}
}
