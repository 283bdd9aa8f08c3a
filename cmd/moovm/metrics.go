package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/internal/unixsock"
	"github.com/moovm/moovm/virtio9p"
	"github.com/moovm/moovm/virtioblk"
	"github.com/moovm/moovm/vmm"
)

// metricsServer shows a machine's counters on a UNIX socket, in Prometheus's
// text format.
type metricsServer struct {
	listener net.Listener
	server   *http.Server
	serving  sync.WaitGroup
}

// listenMetrics makes the socket. Who connects waits until Serve.
func listenMetrics(socket string) (*metricsServer, error) {
	l, err := unixsock.Listen(socket)
	if err != nil {
		return nil, err
	}
	return &metricsServer{listener: l}, nil
}

// Serve shows the counters until Close.
func (s *metricsServer) Serve(stats func() vmm.Stats) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		writeMetrics(w, stats())
	})
	s.server = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		ErrorLog:          log.New(io.Discard, "", 0),
	}
	s.serving.Go(func() { s.server.Serve(s.listener) }) // ends with ErrServerClosed
}

// Close ends it; an answer that is being given has a second.
func (s *metricsServer) Close() {
	if s.server == nil {
		s.listener.Close()
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if s.server.Shutdown(ctx) != nil {
		s.server.Close()
	}
	s.serving.Wait()
}

// metric writes one family of samples in the text format.
type metric struct{ w io.Writer }

func (m metric) family(name, kind, help string) {
	fmt.Fprintf(m.w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// sample writes one value; labels are NAME="VALUE" pairs, already quoted.
func (m metric) sample(name, labels string, v any) {
	if labels != "" {
		labels = "{" + labels + "}"
	}
	fmt.Fprintf(m.w, "%s%s %v\n", name, labels, v)
}

// label quotes a value as the format wants it.
// Only these three are escaped there, and all is UTF-8 (exposition formats,
// "Text format details").
func label(name, value string) string {
	return name + `="` + labelEscapes.Replace(strings.ToValidUTF8(value, "\uFFFD")) + `"`
}

var labelEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// writeMetrics writes s in Prometheus's text format, version 0.0.4.
func writeMetrics(w io.Writer, s vmm.Stats) {
	m := metric{w}
	m.family("moovm_info", "gauge", "The program's version.")
	m.sample("moovm_info", label("version", version), 1)
	m.family("moovm_state", "gauge", "1 for the state the machine is in.")
	m.sample("moovm_state", label("state", s.State), 1)
	m.family("moovm_memory_bytes", "gauge", "Memory of the guest.")
	m.sample("moovm_memory_bytes", "", s.RAM)
	m.family("moovm_memory_used_bytes", "gauge", "Memory the guest has touched.")
	m.sample("moovm_memory_used_bytes", "", s.RAMUsed)

	m.family("moovm_vcpu_seconds_total", "counter", "Processor time of a vCPU's thread.")
	for i, v := range s.VCPUs {
		m.sample("moovm_vcpu_seconds_total", label("vcpu", fmt.Sprint(i)), v.Time.Seconds())
	}
	m.family("moovm_exits_total", "counter", "Exits of a vCPU to user space, by kind.")
	for i, v := range s.VCPUs {
		for _, kind := range sortedKeys(v.Exits) {
			m.sample("moovm_exits_total", label("vcpu", fmt.Sprint(i))+","+label("kind", kind), v.Exits[kind])
		}
	}
	var disks []virtioblk.Stats
	var shares []virtio9p.Stats
	for _, d := range s.Devices {
		switch d := d.(type) {
		case virtioblk.Stats:
			disks = append(disks, d)
		case virtio9p.Stats:
			shares = append(shares, d)
		}
	}
	m.disks(disks)
	m.shares(shares)

	m.family("moovm_serial_bytes_total", "counter", "Bytes over a serial port.")
	for i, p := range s.Serial {
		port := label("port", fmt.Sprintf("ttyS%d", i))
		m.sample("moovm_serial_bytes_total", port+","+label("direction", "to_guest"), p.In)
		m.sample("moovm_serial_bytes_total", port+","+label("direction", "from_guest"), p.Out)
	}
	m.family("moovm_serial_lost_bytes_total", "counter", "Bytes of a guest that nobody took.")
	for i, p := range s.Serial {
		m.sample("moovm_serial_lost_bytes_total", label("port", fmt.Sprintf("ttyS%d", i)), p.Lost)
	}
}

func (m metric) disks(disks []virtioblk.Stats) {
	m.family("moovm_disk_requests_total", "counter", "Requests to a disk.")
	for i, d := range disks {
		for _, v := range []struct {
			op string
			n  uint64
		}{{"read", d.Reads}, {"write", d.Writes}, {"flush", d.Flushes}, {"discard", d.Discards}, {"write_zeroes", d.WriteZeroes}} {
			m.sample("moovm_disk_requests_total", diskLabel(i)+","+label("op", v.op), v.n)
		}
	}
	m.family("moovm_disk_bytes_total", "counter", "Bytes of requests to a disk.")
	for i, d := range disks {
		for _, v := range []struct {
			op string
			n  uint64
		}{{"read", d.ReadBytes}, {"write", d.WriteBytes}, {"discard", d.DiscardBytes}, {"write_zeroes", d.WriteZeroesBytes}} {
			m.sample("moovm_disk_bytes_total", diskLabel(i)+","+label("op", v.op), v.n)
		}
	}
	m.family("moovm_disk_errors_total", "counter", "Requests that failed.")
	for i, d := range disks {
		m.sample("moovm_disk_errors_total", diskLabel(i), d.Errors)
	}
	m.family("moovm_disk_in_flight", "gauge", "Requests being handled.")
	for i, d := range disks {
		m.sample("moovm_disk_in_flight", diskLabel(i), d.InFlight)
	}
}

func (m metric) shares(shares []virtio9p.Stats) {
	m.family("moovm_share_requests_total", "counter", "9P requests answered.")
	for _, d := range shares {
		m.sample("moovm_share_requests_total", label("tag", d.Tag), d.Requests)
	}
	m.family("moovm_share_bytes_total", "counter", "Bytes of 9P messages.")
	for _, d := range shares {
		tag := label("tag", d.Tag)
		m.sample("moovm_share_bytes_total", tag+","+label("direction", "from_guest"), d.RequestBytes)
		m.sample("moovm_share_bytes_total", tag+","+label("direction", "to_guest"), d.ReplyBytes)
	}
}

// diskLabel names disk i as the guest does.
func diskLabel(i int) string { return label("disk", guest.DiskName(i)) }

func sortedKeys(m map[string]uint64) []string { return slices.Sorted(maps.Keys(m)) }
