package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"syscall"
	"time"
)

// ErrVersion says that client and server have no version of the interface in
// common.
var ErrVersion = errors.New("the machine's program and this one do not understand each other")

// Client asks a Server. Its methods may be called from any goroutine.
type Client struct {
	path string
	http *http.Client
}

// Dial returns a client of the server at the socket's path. It fails if nobody
// answers there, or only with other versions of the interface (ErrVersion).
func Dial(ctx context.Context, path string) (*Client, error) {
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
		DisableCompression: true,
	}
	c := &Client{path, &http.Client{Transport: t}}
	var v Versions
	if err := c.get(ctx, "/version", &v); err != nil {
		c.Close()
		return nil, err
	}
	if !slices.Contains(v.API, Version) {
		c.Close()
		return nil, fmt.Errorf("%w: it has version %s and speaks %v, this one speaks %d; use the moovm that started it", ErrVersion, strconv.Quote(v.Version), v.API, Version)
	}
	return c, nil
}

// Close gives the connections back.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status asks how the machine is.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.get(ctx, "/v1/status", &s)
}

// Pause stops the machine's processors.
func (c *Client) Pause(ctx context.Context) error { return c.post(ctx, "/v1/pause", nil) }

// Resume lets them go on.
func (c *Client) Resume(ctx context.Context) error { return c.post(ctx, "/v1/resume", nil) }

// PowerButton asks the guest to switch off.
func (c *Client) PowerButton(ctx context.Context) error { return c.post(ctx, "/v1/power-button", nil) }

// Reset restarts the machine.
func (c *Client) Reset(ctx context.Context) error { return c.post(ctx, "/v1/reset", nil) }

// Stop ends the machine as if its power failed.
func (c *Client) Stop(ctx context.Context) error { return c.post(ctx, "/v1/stop", nil) }

// SnapshotDisks freezes disks, by their name in the guest, all at one instant;
// each goes on in a new overlay at the path it is given. After an error, an
// *Error's Done says which ones do all the same.
func (c *Client) SnapshotDisks(ctx context.Context, overlays map[string]string) error {
	return c.post(ctx, "/v1/disk-snapshot", snapshotRequest{overlays})
}

// Metrics copies the machine's counters, in Prometheus's text format, to w.
func (c *Client) Metrics(ctx context.Context, w io.Writer) error {
	return c.copy(ctx, "/v1/metrics", w)
}

// Console copies the last bytes of the console's output to w and, with follow,
// what comes until ctx or the machine ends.
func (c *Client) Console(ctx context.Context, last int, follow bool, w io.Writer) error {
	q := url.Values{"last": {strconv.Itoa(last)}}
	if follow {
		q.Set("follow", "1")
	}
	return c.copy(ctx, "/v1/console?"+q.Encode(), w)
}

// Type types what r says on the console, as it comes, until r ends.
func (c *Client) Type(ctx context.Context, r io.Reader) error {
	resp, err := c.do(ctx, http.MethodPost, "/v1/console", r)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Watch calls f with each event, and every interval with statistics, until the
// machine or ctx ends, or f returns an error, which it returns.
func (c *Client) Watch(ctx context.Context, interval time.Duration, f func(Event) error) error {
	q := url.Values{"interval": {strconv.FormatFloat(interval.Seconds(), 'f', -1, 64)}}
	resp, err := c.do(ctx, http.MethodGet, "/v1/events?"+q.Encode(), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	d := json.NewDecoder(resp.Body)
	for {
		var e Event
		if err := d.Decode(&e); err != nil {
			return c.cut(ctx, err)
		}
		if err := f(e); err != nil {
			return err
		}
		if e.Kind == "stopped" {
			return nil
		}
	}
}

// cut is the error of an answer that has ended early.
func (c *Client) cut(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("socket %s: the machine's program has gone: %w", c.path, err)
}

func (c *Client) get(ctx context.Context, path string, v any) error {
	resp, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return c.cut(ctx, err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("socket %s: what answers is no moovm: %w", c.path, err)
	}
	return nil
}

func (c *Client) copy(ctx context.Context, path string, w io.Writer) error {
	resp, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err = io.Copy(w, resp.Body); err != nil {
		return c.cut(ctx, err)
	}
	return nil
}

func (c *Client) post(ctx context.Context, path string, v any) error {
	var body io.Reader
	if v != nil {
		b, err := json.Marshal(v)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	resp, err := c.do(ctx, http.MethodPost, path, body)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// do makes a request. Its answer is a good one, and the caller's to close.
func (c *Client) do(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://moovm"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	switch {
	case ctx.Err() != nil:
		if err == nil {
			resp.Body.Close()
		}
		return nil, context.Cause(ctx)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		return nil, fmt.Errorf("socket %s: no machine listens there: %w; `moovm run --control unix:PATH` makes one", c.path, errors.Unwrap(err))
	case err != nil:
		return nil, fmt.Errorf("socket %s: %w", c.path, errors.Unwrap(err))
	case resp.StatusCode < 300:
		return resp, nil
	}
	defer resp.Body.Close()
	var p problem
	if b, err := io.ReadAll(io.LimitReader(resp.Body, maxBody)); err != nil || json.Unmarshal(b, &p) != nil || p.Error == "" {
		p.Error = fmt.Sprintf("socket %s: what answers is no moovm (%s)", c.path, resp.Status)
	}
	return nil, &Error{Message: p.Error, Status: resp.StatusCode, Done: p.Done, kind: p.Kind}
}
