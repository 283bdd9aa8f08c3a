package usernet

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// flowIdle is how long a flow of datagrams lasts after the last one.
const flowIdle = time.Minute

// connectUDP is called with the first datagram of a flow, which waits in the
// endpoint until it is known where it may go.
func (n *Network) connectUDP(r *udp.ForwarderRequest) {
	to := target(r.ID())
	if to.Addr() == RouterAddr() || !n.begin() {
		return
	}
	release, ok := take(n.flows)
	if !ok {
		n.wg.Done()
		return
	}
	var wq waiter.Queue
	ep, err := r.CreateEndpoint(&wq)
	if err != nil {
		release()
		n.wg.Done()
		return
	}
	guest := gonet.NewUDPConn(&wq, ep)
	go func() {
		defer n.wg.Done()
		defer release()
		defer guest.Close()
		host, err := n.dial("udp", to)
		if err != nil {
			return
		}
		defer host.Close()
		for _, c := range []net.Conn{guest, host} {
			forget, err := n.track(c)
			if err != nil {
				return
			}
			defer forget()
		}
		flow(guest, host)
	}()
}

// flow passes datagrams between two ends until there has been none for
// flowIdle, or one end is closed.
func flow(a, b net.Conn) {
	var last atomic.Int64 // when the last datagram came
	last.Store(time.Now().UnixNano())
	one := func(to, from net.Conn) {
		defer to.Close()
		defer from.Close()
		p := make([]byte, 65536)
		for {
			quiet := time.Since(time.Unix(0, last.Load()))
			if quiet >= flowIdle {
				return
			}
			from.SetReadDeadline(time.Now().Add(flowIdle - quiet))
			n, err := from.Read(p)
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded) || isTimeout(err):
				continue // the other direction may have had some
			case errors.Is(err, net.ErrClosed):
				return
			case err != nil && !isRefused(err):
				return
			case err != nil:
				continue // nobody listens there now
			}
			last.Store(time.Now().UnixNano())
			_, _ = to.Write(p[:n]) // one that is lost is lost
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { one(a, b) })
	one(b, a)
	wg.Wait()
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

// isRefused says that a datagram before was answered by ICMP: nobody listens.
func isRefused(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }
