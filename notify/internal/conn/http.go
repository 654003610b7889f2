// What a connection needs of net/http, at the server and at an edge alike.

package conn

import (
	"bytes"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// ResponseHead returns the status line and headers as net/http would write them for a body that
// ends with the connection (RFC 9112, 6.3). It completes header.
func ResponseHead(minor int, header http.Header) []byte {
	head := new(bytes.Buffer)
	fmt.Fprintf(head, "HTTP/1.%d 200 OK\r\n", min(minor, 1))
	header.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	header.Set("Connection", "close")
	_ = header.Write(head) // into memory, so it cannot fail
	head.WriteString("\r\n")
	return head.Bytes()
}

// Cutter makes writes to the response of a request fail. Its methods may be called concurrently.
type Cutter struct {
	mu      sync.Mutex
	control *http.ResponseController // nil once released
}

// NewCutter returns the Cutter of w.
func NewCutter(w http.ResponseWriter) *Cutter { return &Cutter{control: http.NewResponseController(w)} }

// Cut makes a write fail that is stuck because the other side does not read.
func (c *Cutter) Cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.control != nil {
		// not supported by e.g. a httptest.ResponseRecorder, which never blocks
		_ = c.control.SetWriteDeadline(time.Unix(1, 0))
	}
}

// Release must be called before the handler returns, because net/http forbids using a
// ResponseWriter after that (with HTTP/2 it panics).
func (c *Cutter) Release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.control = nil
}
