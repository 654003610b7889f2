// Requests that came over the link, and their responses, as the application's handlers see them.

package origin

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"time"

	"herald/internal/link"
)

// newRequest returns the request as net/http would have read it.
func newRequest(ctx context.Context, r *link.HTTPRequest) *http.Request {
	request, err := http.NewRequestWithContext(ctx, r.Method, "http://localhost/", bytes.NewReader(r.Body))
	if err != nil { // of a method that the edge does not accept
		request, _ = http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost/", nil)
	}
	if parsed, err := request.URL.Parse(r.URI); err == nil && strings.HasPrefix(r.URI, "/") {
		request.URL = parsed
		request.URL.Scheme, request.URL.Host = "", ""
	}
	request.RequestURI, request.Host, request.RemoteAddr = r.URI, r.Host, r.Remote
	if r.Header != nil {
		request.Header = r.Header
	}
	request.ContentLength = int64(len(r.Body))
	if len(r.Body) == 0 {
		request.Body = http.NoBody
	} else {
		request.Body = io.NopCloser(bytes.NewReader(r.Body))
	}
	return request
}

// response is the response to a request that came over the link. A stream of events goes back piece by piece, anything
// else when it is complete.
type response struct {
	exchange *Exchange // nil unless the request opens a connection
	header   http.Header
	status   int
	body     bytes.Buffer
	streams  bool
}

var _ http.Flusher = (*response)(nil)

func (r *response) Header() http.Header { return r.header }

func (r *response) WriteHeader(status int) {
	if r.status != 0 || status < 200 {
		return
	}
	r.status = status
	if x := r.exchange; x != nil && status == http.StatusOK && strings.HasPrefix(r.header.Get("Content-Type"), "text/event-stream") {
		r.streams = true
		x.control(link.KindAccepted, link.Accepted{Number: x.number, Status: status, Header: r.header.Clone()})
	}
}

func (r *response) Write(p []byte) (int, error) {
	r.WriteHeader(http.StatusOK)
	if !r.streams {
		return r.body.Write(p)
	}
	if err := r.exchange.line.Write(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush implements [http.Flusher].
func (r *response) Flush() { r.WriteHeader(http.StatusOK) }

// SetWriteDeadline makes writes fail, if at is in the past: see [http.ResponseController].
func (r *response) SetWriteDeadline(at time.Time) error {
	if r.exchange != nil && !at.IsZero() && at.Before(time.Now()) {
		r.exchange.cutWrites()
	}
	return nil
}

// SetReadDeadline does nothing: the request has been read.
func (r *response) SetReadDeadline(time.Time) error { return nil }

// answer returns what was written.
func (r *response) answer(number uint64) link.Answer {
	status := r.status
	if status == 0 {
		status = http.StatusOK
	}
	return link.Answer{Number: number, Status: status, Header: r.header, Body: r.body.Bytes()}
}
