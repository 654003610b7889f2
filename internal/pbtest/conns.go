package pbtest

import (
	"net"
	"net/http/httptest"
	"testing"

	"github.com/pocketbase/pocketbase/core"
)

// ServeConns is [Serve] with connections that wrap makes of the listener's.
func ServeConns(t testing.TB, app core.App, wrap func(net.Conn) net.Conn) *Server {
	t.Helper()
	return serve(t, app, func(server *httptest.Server) {
		server.Listener = listener{server.Listener, wrap}
		server.Start()
	})
}

type listener struct {
	net.Listener
	wrap func(net.Conn) net.Conn
}

func (l listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.wrap(conn), nil
}
