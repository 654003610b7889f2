package pbtest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http/httptest"
	"syscall"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/pocketbase/pocketbase/core"

	"herald/notify"
	"herald/notify/edge"
	"herald/notify/origin"
)

// ServeEdge is [Serve] through an edge.
func ServeEdge(t testing.TB, app core.App) *Server {
	t.Helper()
	return NewOrigin(t, app, NATS(t, &server.Options{})).Edge(t, "edge")
}

// NATS starts a NATS server and returns its address.
func NATS(t testing.TB, options *server.Options) string {
	t.Helper()
	options.Host, options.Port, options.NoSigs, options.NoLog = "127.0.0.1", -1, true, true
	made, err := server.NewServer(options)
	if err != nil {
		t.Fatal(err)
	}
	made.Start()
	t.Cleanup(func() {
		made.Shutdown()
		made.WaitForShutdown()
	})
	if !made.ReadyForConnections(Timeout) {
		t.Fatal("the NATS server does not listen")
	}
	return made.ClientURL()
}

// Origin is a [Server] with edges.
type Origin struct {
	*Server
	NATS string // the address of the NATS server
	*origin.Origin
	config origin.Config
}

// NewOrigin serves app as the origin of edges.
func NewOrigin(t testing.TB, app core.App, nats string) *Origin {
	t.Helper()
	return NewOriginWith(t, app, origin.Config{NATS: nats})
}

// NewOriginWith is NewOrigin with a configuration.
func NewOriginWith(t testing.TB, app core.App, config origin.Config) *Origin {
	t.Helper()
	o := &Origin{Server: Serve(t, app), NATS: config.NATS, config: config}
	o.Begin(t)
	return o
}

// Begin makes the server the origin of edges, again after Close: to the edges it is another process.
func (o *Origin) Begin(t testing.TB) {
	t.Helper()
	made, err := origin.New(o.App, notify.Of(o.App), o.config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { made.Close(0) })
	if err := made.Serve(o.Config.Handler); err != nil {
		t.Fatal(err)
	}
	o.Origin = made
}

// AwaitEdges waits until edges, which are all, have joined since Begin. One that says that it has joined may not have
// noticed yet that another process is its origin now.
func (o *Origin) AwaitEdges(t testing.TB, edges ...*Server) {
	t.Helper()
	WaitFor(t, "the edges are back", func() bool { return len(o.Edges()) == len(edges) })
	for _, server := range edges {
		WaitFor(t, "an edge is back", func() bool { return server.EdgeStats().Joined })
	}
}

// FreeAddress returns an address of this machine on which nothing listens. The system gives none of these ports to
// outgoing connections: one could take it while its server restarts.
func FreeAddress(t testing.TB) string {
	t.Helper()
	for {
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 11_000+rand.IntN(20_000)))
		if err == nil {
			defer listener.Close()
			return listener.Addr().String()
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
	}
}

// Edge starts an edge, and returns the server of its clients.
func (o *Origin) Edge(t testing.TB, name string) *Server {
	t.Helper()
	return o.EdgeWith(t, edge.Config{NATS: o.NATS, Name: name})
}

// EdgeWith is Edge with a configuration.
func (o *Origin) EdgeWith(t testing.TB, config edge.Config) *Server {
	t.Helper()
	config.Origin = o.URL
	config.Logger = slog.New(slog.DiscardHandler)
	made, err := edge.New(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- made.Run(ctx) }()
	server := httptest.NewUnstartedServer(made)
	server.Config.ConnContext = notify.ConnContext
	server.Start()
	t.Cleanup(func() {
		server.CloseClientConnections()
		stop()
		if err := <-ran; err != nil {
			t.Error(fmt.Errorf("the edge ended: %w", err))
		}
		server.Close()
	})
	WaitFor(t, "the edge joins the origin", func() bool { return made.Stats().Joined })
	return &Server{Server: server, App: o.App, edge: made, origin: o}
}

// EdgeStats returns the numbers of the edge, zero if the server is none.
func (s *Server) EdgeStats() edge.Stats {
	if s.edge == nil {
		return edge.Stats{}
	}
	return s.edge.Stats()
}
