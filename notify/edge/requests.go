// Requests of clients: those about realtime connections go over the link, all others to the origin's address.

package edge

import (
	"bytes"
	"context"
	"encoding/json/v2"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"time"

	"herald/internal/link"
	"herald/notify/internal/conn"
)

const (
	// maxBody is the size of the largest body that PocketBase accepts.
	maxBody = 32 << 20
	// answerPatience is how long the origin may take.
	answerPatience = 30 * time.Second
	// retrySpread is the range of seconds from which refused clients are told to come back.
	retrySpread = 5
)

// ServeHTTP implements [http.Handler].
func (e *Edge) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.URL.Path == "/api/realtime" && r.Method == http.MethodGet:
		e.connect(w, r)
	case r.URL.Path == "/api/realtime": // to subscribe, or a browser's preflight request
		e.forward(w, r)
	case r.URL.Path == "/api/health" && (r.Method == http.MethodGet || r.Method == http.MethodHead):
		e.health(w)
	default:
		e.proxy.ServeHTTP(w, r)
	}
}

// health tells load balancers whether new connections are welcome.
func (e *Edge) health(w http.ResponseWriter) {
	if e.up() == nil {
		unavailable(w, "The edge has no origin.")
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{"code": http.StatusOK, "message": "API is healthy.", "data": map[string]any{"edge": e.config.Name}})
}

// unavailable answers in PocketBase's form.
func unavailable(w http.ResponseWriter, message string) {
	w.Header().Set("Access-Control-Allow-Origin", "*") // so that pages can read it
	w.Header().Set("Retry-After", strconv.Itoa(1+rand.IntN(retrySpread)))
	refuse(w, http.StatusServiceUnavailable, message)
}

func refuse(w http.ResponseWriter, status int, message string) {
	writeJSON(w, status, map[string]any{"status": status, "message": message, "data": map[string]any{}})
}

func writeJSON(w http.ResponseWriter, status int, value any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.MarshalWrite(w, value) // an error means that the client is gone
}

// forwarded returns a client's request as the origin gets it: as from a reverse proxy that says where it comes from.
func (e *Edge) forwarded(r *http.Request, body []byte) link.HTTPRequest {
	header := r.Header.Clone()
	if !e.config.TrustProxy || header.Get("X-Forwarded-For") == "" {
		setForwarded(header, r)
	}
	return link.HTTPRequest{Method: r.Method, URI: r.URL.RequestURI(), Host: r.Host, Remote: r.RemoteAddr, Header: header, Body: body}
}

// setForwarded appends the client's address to X-Forwarded-For, as reverse proxies do.
func setForwarded(header http.Header, r *http.Request) {
	ip, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return
	}
	if before := header.Get("X-Forwarded-For"); before != "" {
		ip = before + ", " + ip
	}
	header.Set("X-Forwarded-For", ip)
}

// connect opens a connection.
func (e *Edge) connect(w http.ResponseWriter, r *http.Request) {
	s := e.up()
	if s == nil {
		unavailable(w, "The edge has no origin.")
		return
	}
	c := e.newConnection(s, e.forwarded(r, nil))
	if err := c.open(s, link.Open{Number: c.number, Request: c.request}); err != nil {
		c.conn.End(conn.Left)
	}
	patience := time.NewTimer(answerPatience)
	defer patience.Stop()
	select {
	case accepted := <-c.accept:
		e.serve(w, r, c, accepted)
		return
	case answer := <-c.answer:
		writeAnswer(w, answer)
	case <-c.over:
		unavailable(w, "The origin is lost.")
	case <-patience.C:
		unavailable(w, "The origin does not answer in time.")
	case <-r.Context().Done():
	}
	c.conn.End(conn.Left)
}

// serve writes the connection's messages.
func (e *Edge) serve(w http.ResponseWriter, r *http.Request, c *connection, accepted *link.Accepted) {
	header := w.Header()
	for name, values := range accepted.Header {
		header[name] = values
	}
	if _, ok := w.(http.Hijacker); ok && r.TLS == nil && r.ContentLength == 0 {
		peer, buffered, err := http.NewResponseController(w).Hijack()
		switch {
		case err != nil:
			c.conn.End(conn.Failed)
		case buffered.Reader.Buffered() > 0:
			peer.Close()
			c.conn.End(conn.Unexpected)
		default:
			c.conn.Take(peer, conn.NewEncodedFrame("", nil, conn.ResponseHead(r.ProtoMinor, header)))
		}
		return
	}
	_ = http.NewResponseController(w).SetWriteDeadline(time.Time{}) // some do not support it, and have none
	conn.BoundSendBuffer(r, header)
	response := &response{conn.NewCutter(w), w}
	defer response.Release()
	w.WriteHeader(accepted.Status)
	_ = c.conn.Serve(r.Context(), response, nil) // the connection has ended, and says why
	<-c.conn.Done()
}

func writeAnswer(w http.ResponseWriter, answer *link.Answer) {
	header := w.Header()
	for name, values := range answer.Header {
		header[name] = values
	}
	w.WriteHeader(answer.Status)
	_, _ = w.Write(answer.Body) // an error means that the client is gone
}

// forward lets the origin handle a request to subscribe.
func (e *Edge) forward(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		status := http.StatusBadRequest
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			status = http.StatusRequestEntityTooLarge
		}
		refuse(w, status, "Failed to read the submitted data.")
		return
	}
	// Clients cancel a request when they subscribe to more. One that was sent goes on: only its answer says as whom the client is known.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), answerPatience)
	defer cancel()
	c := e.named(r, body)
	sent := func() {}
	if c != nil {
		sent = c.awaitTurn(ctx.Done())
		defer sent()
		if r.Context().Err() != nil { // it has done nothing yet; a later one may have gone another way meanwhile
			unavailable(w, "The request was cancelled.")
			return
		}
	}
	s := e.up()
	if s == nil {
		unavailable(w, "The edge has no origin.")
		return
	}
	request := link.Request{Request: e.forwarded(r, body)}
	if c != nil {
		request.Connection = c.number
	}
	answer, err := s.request(ctx, request, sent)
	if err != nil {
		// It may have signed in or out, and the edge must not bring it back as somebody else.
		if c != nil {
			c.conn.End(disconnectDoubt)
		}
		unavailable(w, "The origin does not answer.")
		return
	}
	writeAnswer(w, answer)
}

// named returns the connection that a request to subscribe is about, if it is one of this edge.
func (e *Edge) named(r *http.Request, body []byte) *connection {
	var form struct {
		ClientID string `json:"clientId"`
	}
	kind, parameters, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	switch kind {
	case "application/x-www-form-urlencoded", "multipart/form-data":
		again := &http.Request{Method: http.MethodPost, Header: r.Header, Body: io.NopCloser(bytes.NewReader(body)), URL: &url.URL{}}
		if parameters["boundary"] != "" {
			_ = again.ParseMultipartForm(maxBody)
		}
		form.ClientID = again.PostFormValue("clientId")
	default:
		_ = json.Unmarshal(body, &form) // the origin says what is wrong with it
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.byID[form.ClientID]
}

// newProxy returns what sends requests to the origin's address.
func (e *Edge) newProxy(origin *url.URL) http.Handler {
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(origin)
			r.Out.Host = r.In.Host
			r.Out.Header["X-Forwarded-For"] = r.In.Header["X-Forwarded-For"]
			r.SetXForwarded()
			if before := r.In.Header["X-Forwarded-For"]; e.config.TrustProxy && len(before) > 0 {
				r.Out.Header["X-Forwarded-For"] = before
			}
			if proto := r.In.Header.Get("X-Forwarded-Proto"); proto != "" {
				r.Out.Header.Set("X-Forwarded-Proto", proto)
			}
		},
		FlushInterval: -1,
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if r.Context().Err() == nil {
				e.config.Logger.Warn("The origin does not answer", slog.String("url", fmt.Sprint(origin)), slog.String("error", err.Error()))
			}
			unavailable(w, "The origin does not answer.")
		},
		ErrorLog: slog.NewLogLogger(e.config.Logger.Handler(), slog.LevelDebug),
	}
}
