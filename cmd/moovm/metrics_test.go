package main

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moovm/moovm/virtio9p"
	"github.com/moovm/moovm/virtioblk"
	"github.com/moovm/moovm/vmm"
)

// scrape reads and checks what Prometheus would: every sample belongs to a
// family that was announced, no sample comes twice, values are numbers.
func scrape(t *testing.T, socket string) map[string]float64 {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	r, err := client.Get("http://machine/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK || !strings.HasPrefix(r.Header.Get("Content-Type"), "text/plain; version=0.0.4") {
		t.Errorf("%s, %s", r.Status, r.Header.Get("Content-Type"))
	}
	return parseMetrics(t, r.Body)
}

func parseMetrics(t *testing.T, in io.Reader) map[string]float64 {
	t.Helper()
	var (
		line   = regexp.MustCompile(`^([a-z_]+)(\{[a-z_]+="[^"]*"(?:,[a-z_]+="[^"]*")*\})? (\S+)$`)
		kind   = regexp.MustCompile(`^# TYPE ([a-z_]+) (counter|gauge)$`)
		values = map[string]float64{}
		family string
	)
	s := bufio.NewScanner(in)
	for s.Scan() {
		if m := kind.FindStringSubmatch(s.Text()); m != nil {
			family = m[1]
			if strings.HasSuffix(family, "_total") != (m[2] == "counter") {
				t.Errorf("%s is a %s", family, m[2])
			}
			continue
		}
		if strings.HasPrefix(s.Text(), "# HELP ") {
			continue
		}
		m := line.FindStringSubmatch(s.Text())
		if m == nil || m[1] != family {
			t.Errorf("line %q in family %s", s.Text(), family)
			continue
		}
		v, err := strconv.ParseFloat(m[3], 64)
		if err != nil {
			t.Error(err)
		}
		if _, twice := values[m[1]+m[2]]; twice {
			t.Errorf("%s%s comes twice", m[1], m[2])
		}
		values[m[1]+m[2]] = v
	}
	if s.Err() != nil {
		t.Error(s.Err())
	}
	return values
}

func TestMetrics(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	socket := filepath.Join(t.TempDir(), "m")
	s, err := listenMetrics(socket)
	if err != nil {
		t.Fatal(err)
	}
	stats := vmm.Stats{
		State: "running", RAM: 512 << 20, RAMUsed: 100 << 20,
		VCPUs: []vmm.VCPUStats{
			{Exits: map[string]uint64{"io": 7, "mmio": 8}, Time: 1500 * time.Millisecond},
			{Exits: map[string]uint64{"io": 9}},
		},
		Devices: []any{
			virtioblk.Stats{Reads: 1, WriteBytes: 512}, virtioblk.Stats{InFlight: 3, Errors: 2},
			virtio9p.Stats{Tag: "src", Requests: 4, ReplyBytes: 99}, nil,
		},
		Serial: [2]vmm.SerialStats{{Out: 1000}, {In: 5, Lost: 6}},
	}
	s.Serve(func() vmm.Stats { return stats })
	got := scrape(t, socket)
	for name, want := range map[string]float64{
		`moovm_state{state="running"}`:                                  1,
		`moovm_memory_bytes`:                                            512 << 20,
		`moovm_memory_used_bytes`:                                       100 << 20,
		`moovm_vcpu_seconds_total{vcpu="0"}`:                            1.5,
		`moovm_exits_total{vcpu="0",kind="mmio"}`:                       8,
		`moovm_exits_total{vcpu="1",kind="io"}`:                         9,
		`moovm_disk_requests_total{disk="vda",op="read"}`:               1,
		`moovm_disk_bytes_total{disk="vda",op="write"}`:                 512,
		`moovm_disk_in_flight{disk="vdb"}`:                              3,
		`moovm_disk_errors_total{disk="vdb"}`:                           2,
		`moovm_share_requests_total{tag="src"}`:                         4,
		`moovm_share_bytes_total{tag="src",direction="to_guest"}`:       99,
		`moovm_serial_bytes_total{port="ttyS0",direction="from_guest"}`: 1000,
		`moovm_serial_bytes_total{port="ttyS1",direction="to_guest"}`:   5,
		`moovm_serial_lost_bytes_total{port="ttyS1"}`:                   6,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v, want %v", name, v, want)
		}
	}
	stats.State = "paused"
	if v := scrape(t, socket)[`moovm_state{state="paused"}`]; v != 1 {
		t.Error("the second scrape shows the first one's values")
	}
	s.Close()
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestMetricsBeforeTheMachine(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "m")
	s, err := listenMetrics(socket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listenMetrics(socket); err == nil {
		t.Error("a socket that is served was taken")
	}
	s.Close()
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestDiskLabel(t *testing.T) {
	for i, want := range map[int]string{0: `disk="vda"`, 25: `disk="vdz"`, 26: `disk="vdaa"`, 53: `disk="vdbb"`} {
		if got := diskLabel(i); got != want {
			t.Errorf("%d: %s, want %s", i, got, want)
		}
	}
}

func TestLabelsAreEscapedAsTheFormatWants(t *testing.T) {
	if got, want := label("tag", "a\\b\"c\nd\x01é\xff"), "tag=\"a\\\\b\\\"c\\nd\x01é\uFFFD\""; got != want {
		t.Errorf("label: %q, want %q", got, want)
	}
}
