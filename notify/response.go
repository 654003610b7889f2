// What hooks and edges need of internal/conn for the response to a realtime request.

package notify

import (
	"context"
	"net"
	"net/http"

	"herald/notify/internal/conn"
)

// Response is the response of a realtime request as [Client.ServeStream] uses it.
type Response = conn.Response

// Line carries what handlers write to the client of an edge.
type Line = conn.Line

// Cutter makes writes to the response of a request fail.
type Cutter = conn.Cutter

// NewCutter returns the Cutter of w.
func NewCutter(w http.ResponseWriter) *Cutter { return conn.NewCutter(w) }

// ResponseHead returns the status line and headers of a response, to the HTTP version 1.minor, whose body ends with the
// connection. It completes header.
func ResponseHead(minor int, header http.Header) []byte { return conn.ResponseHead(minor, header) }

// ConnContext keeps a connection for [BoundSendBuffer]: set it as [http.Server]'s ConnContext.
func ConnContext(ctx context.Context, peer net.Conn) context.Context {
	return conn.ConnContext(ctx, peer)
}

// BoundSendBuffer makes the kernel hold little of the response to r, with header, which lasts as long as its
// connection: see [conn.BoundSendBuffer].
func BoundSendBuffer(r *http.Request, header http.Header) { conn.BoundSendBuffer(r, header) }
