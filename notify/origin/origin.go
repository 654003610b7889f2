// Package origin makes an application the origin of edges: processes without a database that hold realtime connections
// for it (herald/notify/edge), joined to it by NATS.
//
// A connection of an edge is a client of the application like any other. Its requests to connect and to subscribe come
// over the link and run through the application's router, with all middlewares and hooks (exchange.go). What is sent to
// it leaves through a trunk of its edge (session.go).
package origin

import (
	"cmp"
	"context"
	"encoding/json/v2"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/pocketbase/pocketbase/core"

	"herald/internal/link"
	"herald/notify"
)

// Config says how edges reach the application.
type Config struct {
	// NATS is the address of a NATS server, nats://HOST:PORT (several with commas), or embedded://HOST:PORT for one inside this process that
	// listens there. With embedded://USER:PASSWORD@HOST:PORT edges must sign in. Empty: there are no edges.
	NATS string
	// Credentials is a file with NATS user credentials, or with the seed of an nkey. Optional.
	Credentials string
	// App is the name of the application on that NATS server. Defaults to "herald".
	App string
}

// DefaultApp is the default of Config.App.
const DefaultApp = "herald"

// Origin is an application with edges. Its methods may be called concurrently.
type Origin struct {
	app      core.App
	notifier *notify.Notifier
	subjects link.Subjects
	boot     uint64
	begun    time.Time
	nc       *nats.Conn
	embedded *server.Server
	resuming chan struct{} // held while a client is admitted again
	stop     chan struct{}
	stopped  sync.WaitGroup
	lastBack atomic.Pointer[time.Time] // when a client was there again

	mu       sync.Mutex // guards the fields below
	handler  http.Handler
	sessions map[string]*session // by the names of their edges
	closed   bool
}

// maxResuming is how many clients are admitted again at the same time.
const maxResuming = 16

// New connects to NATS. Edges are let in from [Origin.Serve] on.
func New(app core.App, notifier *notify.Notifier, config Config) (*Origin, error) {
	config.App = cmp.Or(config.App, DefaultApp)
	if err := link.CheckName("name of an application", config.App); err != nil {
		return nil, err
	}
	o := &Origin{
		app: app, notifier: notifier, subjects: link.Subjects{App: config.App}, boot: rand.Uint64() | 1, begun: time.Now(),
		resuming: make(chan struct{}, maxResuming), stop: make(chan struct{}), sessions: map[string]*session{},
	}
	address := config.NATS
	var err error
	if isEmbedded(address) {
		if o.embedded, address, err = startEmbedded(address); err != nil {
			return nil, err
		}
	}
	o.nc, err = link.Connect(link.Options{URL: address, Credentials: config.Credentials, Name: "herald origin " + config.App, Logger: app.Logger()})
	if err != nil {
		o.stopEmbedded()
		return nil, err
	}
	return o, nil
}

// Serve lets edges in. Their requests run through handler.
func (o *Origin) Serve(handler http.Handler) error {
	o.mu.Lock()
	o.handler = handler
	o.mu.Unlock()
	for subject, receive := range map[string]nats.MsgHandler{
		o.subjects.Hello("*"): func(m *nats.Msg) { o.stopped.Go(func() { o.greet(m) }) },
		o.subjects.Up("*"):    o.packet,
		o.subjects.Beat():     o.hearBeat,
	} {
		if err := link.Subscribe(o.nc, subject, receive); err != nil {
			return err
		}
	}
	o.stopped.Go(o.beat)
	if !o.nc.IsConnected() {
		log.Print(link.Unreachable(o.nc)) // for who starts it; PocketBase's log is in its database
	}
	return nil
}

// beat says that the origin is there, until it closes.
func (o *Origin) beat() {
	defer o.guard("telling edges of the origin")
	every := time.NewTicker(link.BeatEvery)
	defer every.Stop()
	for {
		_ = link.Publish(o.nc, o.subjects.Beat(), link.Beat{Boot: o.boot}) // the next one may arrive
		select {
		case <-every.C:
		case <-o.stop:
			return
		}
	}
}

// hearBeat notices another origin of the same name.
func (o *Origin) hearBeat(m *nats.Msg) {
	var beat link.Beat
	if json.Unmarshal(m.Data, &beat) == nil && beat.Boot != 0 && beat.Boot != o.boot {
		o.app.Logger().Error("There is another origin with the same name: its edges and ours go back and forth. Give each application a name of its own",
			slog.String("app", o.subjects.App))
	}
}

// greet answers an edge that requests a session.
func (o *Origin) greet(m *nats.Msg) {
	defer o.guard("greeting an edge")
	welcome := link.Welcome{Version: link.Version, Boot: o.boot}
	name := link.EdgeOf(m.Subject)
	var hello link.Hello
	err := o.check(name, m.Data, &hello)
	if err == nil {
		err = o.begin(name, &hello)
		welcome.Again = err != nil
	}
	if err != nil {
		welcome.Error = err.Error()
		o.app.Logger().Warn("An edge is refused", slog.String("edge", name), slog.String("error", err.Error()))
	}
	var answer []byte
	answer, err = json.Marshal(welcome)
	if err == nil {
		err = m.Respond(answer)
	}
	if err != nil {
		o.app.Logger().Warn("Failed to answer an edge", slog.String("edge", name), slog.String("error", err.Error()))
	}
}

// errBusy refuses an edge for now.
var errBusy = errors.New("another edge with this name is connected")

// check reads the request of an edge for a session. An error does not pass by itself.
func (o *Origin) check(name string, request []byte, hello *link.Hello) error {
	switch err := json.Unmarshal(request, hello); {
	case err != nil:
		return fmt.Errorf("the request is not understood: %w", err)
	case hello.Version != link.Version:
		return fmt.Errorf("it speaks version %d of the protocol and this server version %d: run the same release of Herald on both", hello.Version, link.Version)
	case hello.App != o.subjects.App:
		return fmt.Errorf("it belongs to the application %q, and this is %q", hello.App, o.subjects.App)
	case hello.Session == 0:
		return errors.New("it names no session")
	}
	return link.CheckName("name of an edge", name)
}

// begin begins the session that an edge requests, in place of the one that it had. After an error the edge may try again.
func (o *Origin) begin(name string, hello *link.Hello) error {
	o.mu.Lock()
	before := o.sessions[name]
	o.mu.Unlock()
	if before != nil {
		if before.boot != hello.Boot && before.isAlive() {
			return errBusy
		}
		before.stream.Close()
		<-before.over // its clients are gone: they come back with the same ids
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return errors.New("the server is shutting down")
	}
	if o.sessions[name] != nil {
		return errBusy
	}
	o.sessions[name] = o.newSession(name, *hello)
	o.app.Logger().Info("An edge is connected", slog.String("edge", name))
	return nil
}

// packet takes a packet of an edge.
func (o *Origin) packet(m *nats.Msg) {
	defer o.guard("taking a packet of an edge")
	name := link.EdgeOf(m.Subject)
	o.mu.Lock()
	s := o.sessions[name]
	o.mu.Unlock()
	if id := link.Session(m.Data); s == nil || s.id != id {
		if id != 0 {
			_ = o.nc.Publish(o.subjects.Down(name), link.Reset(id, o.boot)) // it is told again with its next packet
		}
		return
	}
	s.stream.Packet(m.Data)
}

// How long clients that are back wait to hear who else is: othersJoin for edges that have not joined yet (they connect
// to NATS again within 0.6 s, and then try twice per second), othersPatience without anybody coming back.
const (
	othersJoin     = 3 * time.Second
	othersPatience = 10 * time.Second
)

// awaitSettled waits until the clients that the edges have kept are there, no more of them come, or ctx ends.
func (o *Origin) awaitSettled(ctx context.Context) {
	since := time.Now()
	select {
	case <-time.After(time.Until(o.begun.Add(othersJoin))):
	case <-ctx.Done():
	}
	o.mu.Lock()
	sessions := slices.Collect(maps.Values(o.sessions))
	o.mu.Unlock()
	for _, s := range sessions {
		for !s.isSettled() {
			last := since
			if at := o.lastBack.Load(); at != nil && at.After(since) {
				last = *at
			}
			patience := othersPatience - time.Since(last)
			if patience <= 0 {
				return
			}
			select {
			case <-s.settled:
			case <-time.After(patience):
			case <-ctx.Done():
				return
			}
		}
	}
}

// Edge describes an edge.
type Edge struct {
	Name        string  `json:"name"`
	Connections int     `json:"connections"`
	OnTheWay    int     `json:"onTheWay"` // bytes that were sent to it and have not arrived yet
	Silent      float64 `json:"silent"`   // for how many seconds nothing has come from it
}

// Edges returns the edges, by name.
func (o *Origin) Edges() []Edge {
	o.mu.Lock()
	defer o.mu.Unlock()
	edges := make([]Edge, 0, len(o.sessions))
	for name, s := range o.sessions {
		edges = append(edges, Edge{name, s.count(), s.onTheWay(), float64(s.stream.Silent())})
	}
	slices.SortFunc(edges, func(a, b Edge) int { return cmp.Compare(a.Name, b.Name) })
	return edges
}

// Close takes what is left to the edges, for at most patience, and disconnects from NATS. Call it after
// [notify.Notifier.Shutdown]. The clients of the edges stay connected there.
func (o *Origin) Close(patience time.Duration) {
	o.mu.Lock()
	if o.closed {
		o.mu.Unlock()
		return
	}
	o.closed = true
	sessions := slices.Collect(maps.Values(o.sessions))
	o.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var closing sync.WaitGroup
	for _, s := range sessions {
		closing.Go(func() {
			s.drain(ctx)
			s.stream.Close()
			<-s.over
		})
	}
	closing.Wait()
	close(o.stop)
	o.nc.Close()
	o.stopped.Wait()
	o.stopEmbedded()
}

// guard logs a panic of a goroutine. Each must defer it.
func (o *Origin) guard(what string) {
	if cause := recover(); cause != nil {
		o.app.Logger().Error("Panic while "+what, slog.Any("cause", cause))
	}
}
