package api

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
	"strings"
	"time"
)

// MaxBody bounds a request; answers may be larger.
const (
	MaxBody   = 64 << 10
	maxAnswer = 8 << 20
)

// Error is what a server answered in place of the result.
type Error struct {
	Status  int    `json:"-"`
	Message string `json:"error"`
	Hint    string `json:"hint,omitempty"`
	// Owner is the controller of a shelf to ask instead; "" where the one that answered is the right one.
	Owner string `json:"owner,omitempty"`
}

func (e *Error) Error() string { return e.Message }

// ErrNoServer: nobody answers at the address.
var ErrNoServer = errors.New("nobody answers")

// Client speaks to one server.
type Client struct {
	name, base, token string
	http              *http.Client
}

// New returns a client of the server at address: http://host:port, https://…, or unix:/path.
// token may be empty.
func New(address, token string) (*Client, error) {
	if err := CheckAddress(address); err != nil {
		return nil, err
	}
	t := &http.Transport{DialContext: (&net.Dialer{Timeout: 3 * time.Second}).DialContext, ResponseHeaderTimeout: 160 * time.Second, ExpectContinueTimeout: 5 * time.Second, MaxIdleConns: 2, IdleConnTimeout: 10 * time.Second}
	c := &Client{name: address, base: strings.TrimSuffix(address, "/"), token: token, http: &http.Client{Transport: t}}
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		c.base = "http://unix"
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: 3 * time.Second}).DialContext(ctx, "unix", strings.TrimPrefix(path, "//"))
		}
	}
	return c, nil
}

// CheckAddress tells what is wrong with a server's address.
func CheckAddress(address string) error {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		if strings.TrimPrefix(path, "//") == "" {
			return fmt.Errorf("%q has no path; want unix:/path/to/socket", address)
		}
		return nil
	}
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.User != nil {
		return fmt.Errorf("%q is no address of a server; want http://host:port, https://host:port or unix:/path", address)
	}
	return nil
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Do sends in (nil: no body) and decodes the answer into out (nil: ignored). Errors are *Error where the
// server refused, and wrap ErrNoServer where there is none.
func (c *Client) Do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return c.answer(req, out)
}

// Headers of an exported image.
const (
	ImageType       = "application/x-qcow2"
	DiskBytesHeader = "Ledge-Disk-Bytes"
)

// Get returns the answer itself, for its body, which the caller closes.
func (c *Client) Get(ctx context.Context, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.send(req)
	if err != nil || resp.StatusCode/100 == 2 {
		return resp, err
	}
	defer resp.Body.Close()
	return nil, c.read(req, resp, nil)
}

// Send posts what body gives, of so many bytes, and decodes the answer into out.
func (c *Client) Send(ctx context.Context, path string, body io.Reader, bytes int64, out any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", ImageType)
	req.Header.Set("Expect", "100-continue") // what is refused at once is not sent
	req.ContentLength = bytes
	return c.answer(req, out)
}

func (c *Client) send(req *http.Request) (*http.Response, error) {
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // without the made-up host of a unix socket
		}
		return nil, fmt.Errorf("%w at %s: %w", ErrNoServer, c.name, err)
	}
	return resp, nil
}

func (c *Client) answer(req *http.Request, out any) error {
	resp, err := c.send(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return c.read(req, resp, out)
}

// read decodes an answer.
func (c *Client) read(req *http.Request, resp *http.Response, out any) error {
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return fmt.Errorf("%s: answer: %w", c.name, err)
	}
	if len(answer) > maxAnswer {
		return fmt.Errorf("%s: answer of more than %d bytes", c.name, maxAnswer)
	}
	if resp.StatusCode/100 != 2 {
		e := &Error{Status: resp.StatusCode}
		if json.Unmarshal(answer, e) != nil || e.Message == "" {
			e.Message = fmt.Sprintf("%s answered %s; is it a Ledge API?", c.name, resp.Status)
		}
		return e
	}
	if out == nil || resp.StatusCode == http.StatusNoContent {
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("%s: answer of %s %s: %w", c.name, req.Method, req.URL.Path, err)
	}
	return nil
}
