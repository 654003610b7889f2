package pbtest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http/httptest"
	"testing"

	"github.com/pocketbase/pocketbase/core"

	"herald/notify"
	"herald/notify/edge"
	"herald/notify/origin"
)

// ServeEdge is [Serve] through an edge.
func ServeEdge(t testing.TB, app core.App) *Server {
	t.Helper()
	server := Serve(t, app)
	return NewOrigin(t, app, server).Edge(t, "edge")
}

// Origin is a [Server] with edges.
type Origin struct {
	*Server
	NATS string // the address of its NATS server
	*origin.Origin
}

// NewOrigin makes the application of server the origin of edges, over a NATS server of its own.
func NewOrigin(t testing.TB, app core.App, server *Server) *Origin {
	t.Helper()
	address := FreeAddress(t)
	made, err := origin.New(app, notify.Of(app), origin.Config{NATS: "embedded://" + address})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { made.Close(0) })
	if err := made.Serve(server.Config.Handler); err != nil {
		t.Fatal(err)
	}
	return &Origin{server, "nats://" + address, made}
}

// FreeAddress returns an address of this machine on which nothing listens.
func FreeAddress(t testing.TB) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// Edge starts an edge, and returns the server of its clients.
func (o *Origin) Edge(t testing.TB, name string) *Server {
	t.Helper()
	server := StartEdge(t, o.App, edge.Config{NATS: o.NATS, Name: name, Origin: o.URL})
	server.origin = o.Origin
	return server
}

// StartEdge starts an edge of app and waits until it has joined its origin.
func StartEdge(t testing.TB, app core.App, config edge.Config) *Server {
	t.Helper()
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	made, err := edge.New(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- made.Run(ctx) }()
	server := httptest.NewServer(made)
	t.Cleanup(func() {
		server.CloseClientConnections()
		stop()
		if err := <-ran; err != nil {
			t.Error(fmt.Errorf("the edge ended: %w", err))
		}
		server.Close()
	})
	WaitFor(t, "the edge joins the origin", func() bool { return made.Stats().Joined })
	return &Server{Server: server, App: app, edge: made}
}
