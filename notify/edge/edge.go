// Package edge is a process that holds realtime connections for an application, its origin, and has no database. It
// joins the origin over NATS; see herald/notify/origin for the other side.
//
// A request to connect or to subscribe is handled by the origin (requests.go). The connection itself lives here, with
// its own bounded queue (connection.go). When the origin restarts, or the link breaks, the connections stay, and
// the edge announces them anew (session.go).
package edge

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"herald/internal/link"
	"herald/notify"
	"herald/notify/internal/conn"
)

// Config says where the origin is. Zero fields stand for the defaults.
type Config struct {
	// NATS is the address of the NATS server, nats://HOST:PORT (several with commas).
	NATS string
	// Credentials is a file with NATS user credentials, or with the seed of an nkey. Optional.
	Credentials string
	// App is the name of the application on the NATS server. Defaults to "herald".
	App string
	// Name is the name of this edge, which no other edge of the application has. Defaults to the name of the machine.
	Name string
	// Origin is the origin's address, http://HOST:PORT, for requests that are not about realtime connections. If it is
	// empty they are answered with 404, for set-ups in which a load balancer sends them to the origin.
	Origin string

	// TrustProxy says that clients reach the edge only through a proxy that sets X-Forwarded-For: the edge passes that
	// on as it is, instead of appending the proxy's address.
	TrustProxy bool

	// QueueSize, QueueBytes and Heartbeat are as in notify.Config.
	QueueSize  int
	QueueBytes int
	Heartbeat  time.Duration
	// Patience is for how long connections are kept without an origin. Defaults to a minute.
	Patience time.Duration
	// Logger defaults to slog.Default().
	Logger *slog.Logger
}

func (c Config) withDefaults() Config {
	c.App = cmp.Or(c.App, "herald")
	if c.Name == "" {
		host, _ := os.Hostname()
		c.Name = cmp.Or(regexp.MustCompile(`[^A-Za-z0-9_-]+`).ReplaceAllString(host, "-"), "edge")
	}
	if c.QueueSize <= 0 {
		c.QueueSize = notify.DefaultQueueSize
	}
	if c.QueueBytes <= 0 {
		c.QueueBytes = notify.DefaultQueueBytes
	}
	if c.Heartbeat == 0 {
		c.Heartbeat = notify.DefaultHeartbeat
	}
	if c.Patience <= 0 {
		c.Patience = time.Minute
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return c
}

// Edge holds realtime connections. It is an [http.Handler] for the requests of their clients. Its methods may be
// called concurrently.
type Edge struct {
	config   Config
	subjects link.Subjects
	boot     uint64
	group    *conn.Group
	nc       *nats.Conn
	proxy    http.Handler
	numbers  atomic.Uint64 // of connections and of requests

	mu          sync.Mutex // guards the fields below
	session     *session   // nil while there is none
	lost        time.Time  // when there was one last
	connections map[uint64]*connection
	byID        map[string]*connection
	stopped     bool
}

// New returns an edge that connects to NATS. Call [Edge.Run] to join the origin.
func New(config Config) (*Edge, error) {
	config = config.withDefaults()
	if config.NATS == "" {
		return nil, errors.New("the address of the NATS server is missing")
	}
	if err := cmp.Or(link.CheckName("name of an application", config.App), link.CheckName("name of an edge", config.Name)); err != nil {
		return nil, err
	}
	e := &Edge{
		config: config, subjects: link.Subjects{App: config.App}, boot: rand.Uint64() | 1, lost: time.Now(),
		connections: map[uint64]*connection{}, byID: map[string]*connection{}, proxy: http.NotFoundHandler(),
	}
	e.group = conn.NewGroup(conn.Config{QueueSize: config.QueueSize, QueueBytes: config.QueueBytes, Heartbeat: config.Heartbeat},
		func(what string, cause any, id string) {
			config.Logger.Error("Panic while "+what, slog.Any("cause", cause), slog.String("connection", id))
		})
	if config.Origin != "" {
		origin, err := url.Parse(config.Origin)
		if err != nil || origin.Scheme != "http" && origin.Scheme != "https" || origin.Host == "" {
			return nil, fmt.Errorf("the origin %q is not an address such as http://10.0.0.5:8090", config.Origin)
		}
		e.proxy = e.newProxy(origin)
	}
	var err error
	e.nc, err = link.Connect(link.Options{
		URL: config.NATS, Credentials: config.Credentials, Name: "herald edge " + config.Name, Inbox: e.subjects.Inbox(config.Name), Logger: config.Logger,
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}

// Run joins the origin, and again whenever that is lost, until ctx ends. Then it ends all connections, once what waits
// for them has been written or after a few seconds. An error means that the origin will not accept this edge.
func (e *Edge) Run(ctx context.Context) error {
	defer e.stop()
	return e.join(ctx)
}

// stopPatience is how long a stopping edge writes what it has.
const stopPatience = 5 * time.Second

func (e *Edge) stop() {
	e.mu.Lock()
	e.stopped = true
	session := e.session
	e.mu.Unlock()
	patience, cancel := context.WithTimeout(context.Background(), stopPatience)
	defer cancel()
	end, cancelEnd := context.WithTimeout(context.Background(), stopPatience+time.Second)
	defer cancelEnd()
	e.group.Shutdown(patience, end)
	if session != nil {
		session.stream.Drain(time.Second) // the origin learns of the ends
		session.stream.Close()
	}
	e.nc.Close()
}

// Stats are numbers of an edge.
type Stats struct {
	Connections    int
	Taken          int // that are written to without net/http
	QueuedMessages int
	QueuedBytes    int
	Bytes          int64 // written to connections so far
	OnTheWay       int   // bytes to the origin that have not arrived yet
	Joined         bool  // to the origin
}

// Stats returns the current numbers.
func (e *Edge) Stats() Stats {
	totals := e.group.Totals()
	e.mu.Lock()
	defer e.mu.Unlock()
	stats := Stats{
		Connections: len(e.connections), Taken: totals.Taken, QueuedMessages: totals.QueuedMessages, QueuedBytes: totals.QueuedBytes,
		Bytes: e.group.Bytes(), Joined: e.session.isUp(),
	}
	if e.session != nil {
		stats.OnTheWay = e.session.stream.OnTheWay()
	}
	return stats
}

// guard logs a panic of a goroutine. Each must defer it.
func (e *Edge) guard(what string) {
	if cause := recover(); cause != nil {
		e.config.Logger.Error("Panic while "+what, slog.Any("cause", cause))
	}
}
