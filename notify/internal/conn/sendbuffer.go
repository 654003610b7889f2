// How much the kernel holds of what is written to a connection.
//
// On a fast way, as to a proxy on the same machine, Linux lets a socket's send buffer grow to 4 MiB, and tells a waiting
// writer that there is room only when a third of it is free (sk_stream_is_writeable in its include/net/sock.h). So
// somebody who reads 50 KB a second looks for half a minute like somebody who reads nothing.

package conn

import (
	"context"
	"net"
	"net/http"
)

// sendBuffer is the size of the send buffer, in bytes, where such a writer's patience would end a connection. It is a
// tenth of a second of 5 Mbit/s.
const sendBuffer = 64 << 10

type connKey struct{}

// ConnContext keeps peer in ctx, for [BoundSendBuffer]. It is for [http.Server]'s ConnContext.
func ConnContext(ctx context.Context, peer net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, peer)
}

// BoundSendBuffer makes the kernel hold little of the response to r, which goes on until its connection ends. It does
// nothing with HTTP/2, where a response shares its connection and the client itself says how much may be on the way,
// nor if the server of r does not use [ConnContext].
func BoundSendBuffer(r *http.Request, header http.Header) {
	peer, ok := r.Context().Value(connKey{}).(net.Conn)
	if !ok || r.ProtoMajor != 1 {
		return
	}
	boundSendBuffer(peer)
	header.Set("Connection", "close") // what comes after it may be a download
}

func boundSendBuffer(peer net.Conn) {
	if over, ok := peer.(interface{ NetConn() net.Conn }); ok { // TLS
		peer = over.NetConn()
	}
	if peer, ok := peer.(interface{ SetWriteBuffer(bytes int) error }); ok {
		_ = peer.SetWriteBuffer(sendBuffer) // best effort: the buffer is as it was
	}
}
