package hooks_test

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	"github.com/pocketbase/pocketbase/core"

	"herald/hooks"
	"herald/internal/link"
	"herald/internal/pbtest"
	"herald/notify/edge"
	"herald/notify/origin"
)

// TestEdgeRefused: what an origin does not accept, it refuses with a reason.
func TestEdgeRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	address := pbtest.NATS(t, &server.Options{})
	o := pbtest.NewOrigin(t, w, address)
	o.Edge(t, "edge")
	nc, err := link.Connect(link.Options{URL: address, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	good := link.Hello{Version: link.Version, App: origin.DefaultApp, Boot: 1, Session: 1}
	for _, try := range []struct {
		name  string
		app   string
		edge  string
		hello link.Hello
		want  error
		text  string
	}{
		{"another version", origin.DefaultApp, "other", link.Hello{Version: link.Version + 1, App: origin.DefaultApp, Session: 1}, link.ErrRefused, "run the same release"},
		{"another application", origin.DefaultApp, "other", link.Hello{Version: link.Version, App: "shop", Session: 1}, link.ErrRefused, `"shop"`},
		{"no session", origin.DefaultApp, "other", link.Hello{Version: link.Version, App: origin.DefaultApp}, link.ErrRefused, "no session"},
		{"no such application", "shop", "other", good, link.ErrNoOrigin, `"shop"`},
		{"the name of another", origin.DefaultApp, "edge", good, nil, "another edge"},
		{"a bad name", origin.DefaultApp, "a$b", good, link.ErrRefused, "letters"},
	} {
		_, err := link.Greet(nc, link.Subjects{App: try.app}, try.edge, try.hello)
		if err == nil || !strings.Contains(err.Error(), try.text) || try.want != nil && !errors.Is(err, try.want) || try.want == nil && errors.Is(err, link.ErrRefused) {
			t.Errorf("%s: %v", try.name, err)
		}
	}

	for _, config := range []edge.Config{{}, {NATS: address, Name: "a b"}, {NATS: address, App: "a.b"}, {NATS: address, Origin: "10.0.0.5"}, {NATS: address, Credentials: "/none"}} {
		if _, err := edge.New(config); err == nil {
			t.Errorf("%+v is accepted", config)
		}
	}
	for _, config := range []origin.Config{{NATS: address, App: "a.b"}, {NATS: "embedded://127.0.0.1"}, {NATS: "embedded://0.0.0.0:4222"}, {NATS: "embedded://a:@127.0.0.1:4222"},
		{NATS: "embedded://" + strings.TrimPrefix(address, "nats://")}, {NATS: address, Credentials: "/none"}} {
		if made, err := origin.New(w, engine(w), config); err == nil {
			made.Close(0)
			t.Errorf("%+v is accepted", config)
		}
	}
}

// TestEdgeOfClosingOrigin: an origin that is stopping refuses an edge for now only.
func TestEdgeOfClosingOrigin(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	entered, release := make(chan struct{}), make(chan struct{})
	w.OnRealtimeConnectRequest().BindFunc(func(e *core.RealtimeConnectRequestEvent) error {
		close(entered)
		<-release
		return e.Next()
	})
	address := pbtest.NATS(t, &server.Options{})
	o := pbtest.NewOrigin(t, w, address)
	s := o.Edge(t, "edge")
	go func() { // it is answered by the edge when the origin is lost
		if response, err := s.Client().Get(s.URL + "/api/realtime"); err == nil {
			response.Body.Close()
		}
	}()
	<-entered
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		o.Close(time.Second) // waits for the handler
	}()
	nc, err := link.Connect(link.Options{URL: address, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	hello := link.Hello{Version: link.Version, App: origin.DefaultApp, Boot: 1, Session: 1}
	pbtest.WaitFor(t, "it is stopping", func() bool {
		_, err := link.Greet(nc, link.Subjects{App: origin.DefaultApp}, "other", hello)
		if errors.Is(err, link.ErrRefused) {
			t.Fatal(err)
		}
		return err != nil && strings.Contains(err.Error(), "shutting down")
	})
	close(release)
	<-closed
	o.Begin(t)
	pbtest.WaitFor(t, "the edge has an origin", func() bool { return s.EdgeStats().Joined })
}

// TestEmbedded: the server itself is the NATS server, with a password or not.
func TestEmbedded(t *testing.T) {
	t.Parallel()
	for _, user := range []string{"", "a:secret@"} {
		address := pbtest.FreeAddress(t)
		app := pbtest.NewApp(t, func(app core.App) {
			hooks.MustRegister(app, nil, hooks.Config{Origin: origin.Config{NATS: "embedded://" + user + address, App: "shop"}})
		})
		handled := pbtest.Serve(t, app)
		o := &pbtest.Origin{Server: handled}
		s := o.EdgeWith(t, edge.Config{NATS: "nats://" + user + address, App: "shop", Name: "edge"})
		client := s.Subscribe(t, nil, "example")
		mustSend(t, app, "example", 1)
		client.Expect(t, "example", "1")
		root := pbtest.AddAuth(t, app, core.CollectionNameSuperusers, "root@x.com", nil)
		_, stats := handled.Do(t, "GET", "/api/notify/stats", pbtest.Token(t, root), nil)
		if edges, _ := at(stats, "edges"); len(edges.([]any)) != 1 {
			t.Errorf("stats %v", stats)
		}
		if user != "" {
			nc, err := nats.Connect("nats://" + address)
			if err == nil {
				nc.Close()
				t.Error("it lets in everybody")
			}
		}
		if err := app.OnTerminate().Trigger(&core.TerminateEvent{App: app}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestEdgePermissions: with the configuration of the documentation, an edge can do its part and nothing else.
func TestEdgePermissions(t *testing.T) {
	t.Parallel()
	options := &server.Options{}
	if err := options.ProcessConfigFile("../docs/nats.conf"); err != nil {
		t.Fatal(err)
	}
	address := strings.TrimPrefix(pbtest.NATS(t, options), "nats://")
	w := newWorld(t)
	o := pbtest.NewOrigin(t, w, "nats://origin:change-this-0@"+address)
	first := o.EdgeWith(t, edge.Config{NATS: "nats://edge1:change-this-1@" + address, Name: "edge1"})
	second := o.EdgeWith(t, edge.Config{NATS: "nats://edge2:change-this-2@" + address, Name: "edge2"})
	one, two := first.Subscribe(t, nil, "example"), second.Subscribe(t, nil, "example")
	mustSend(t, w, "example", 1)
	one.Expect(t, "example", "1")
	two.Expect(t, "example", "1")

	var mu sync.Mutex
	var denied []string
	nc, err := nats.Connect("nats://edge1:change-this-1@"+address, nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		mu.Lock()
		defer mu.Unlock()
		denied = append(denied, err.Error())
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	subjects := link.Subjects{App: origin.DefaultApp}
	publishes := []string{subjects.Up("edge2"), subjects.Hello("edge2"), subjects.Down("edge2"), subjects.Down("edge1"), subjects.Beat()}
	subscribes := []string{subjects.Down("edge2"), subjects.Up("edge2"), subjects.Hello("*"), subjects.Inbox("edge2") + ".>", "herald.>", ">"}
	for _, subject := range publishes {
		if err := nc.Publish(subject, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	for _, subject := range subscribes {
		if _, err := nc.SubscribeSync(subject); err != nil {
			t.Fatal(err)
		}
	}
	pbtest.WaitFor(t, "all of it is denied", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(denied) == len(publishes)+len(subscribes)
	})
}

// TestEdgeNkeys: the users of that configuration with nkeys instead of passwords. The wrong key is not let in.
func TestEdgeNkeys(t *testing.T) {
	t.Parallel()
	options := &server.Options{}
	if err := options.ProcessConfigFile("../docs/nats.conf"); err != nil {
		t.Fatal(err)
	}
	seeds := map[string]string{} // files, by user
	for _, user := range options.Users {
		pair, err := nkeys.CreateUser()
		if err != nil {
			t.Fatal(err)
		}
		public, err := pair.PublicKey()
		if err != nil {
			t.Fatal(err)
		}
		seed, err := pair.Seed()
		if err != nil {
			t.Fatal(err)
		}
		seeds[user.Username] = filepath.Join(t.TempDir(), user.Username)
		if err := os.WriteFile(seeds[user.Username], seed, 0o600); err != nil {
			t.Fatal(err)
		}
		options.Nkeys = append(options.Nkeys, &server.NkeyUser{Nkey: public, Permissions: user.Permissions})
	}
	options.Users = nil
	address := "nats://" + strings.TrimPrefix(pbtest.NATS(t, options), "nats://")
	w := newWorld(t)
	o := pbtest.NewOriginWith(t, w, origin.Config{NATS: address, Credentials: seeds["origin"]})
	first := o.EdgeWith(t, edge.Config{NATS: address, Credentials: seeds["edge1"], Name: "edge1"})
	client := first.Subscribe(t, nil, "example")
	mustSend(t, w, "example", 1)
	client.Expect(t, "example", "1")

	option, err := nats.NkeyOptionFromSeed(seeds["edge2"])
	if err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(address, option)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, err := link.Greet(nc, link.Subjects{App: origin.DefaultApp}, "edge1", link.Hello{Version: link.Version, App: origin.DefaultApp, Boot: 1, Session: 1}); err == nil {
		t.Error("the second edge speaks for the first")
	}
}
