package hooks_test

import (
	"encoding/json/v2"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/internal/link"
	"herald/internal/pbtest"
	"herald/notify"
	"herald/notify/edge"
	"herald/notify/origin"
)

// TestEdges: clients of two edges and of the origin are clients of one application.
func TestEdges(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "chat/{room}", "subscribeRule": `@request.auth.id != ""`, "publishRule": `@request.auth.id != ""`, "presence": true})
	w.OnServe().BindFunc(func(e *core.ServeEvent) error {
		e.Router.Bind(apis.CORS(apis.CORSConfig{AllowOrigins: []string{"*"}, AllowMethods: []string{"POST"}})) // as PocketBase's "serve" does
		return e.Next()
	})
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	first, second := o.Edge(t, "first"), o.Edge(t, "second")
	ann := first.Subscribe(t, w.ann, "chat/1")
	also := first.Subscribe(t, w.ann, "chat/1")
	bob := second.Subscribe(t, w.bob, "chat/1")
	direct := o.Subscribe(t, w.bob, "chat/1")
	if status, answer := second.Do(t, "POST", "/api/notify/publish", pbtest.Token(t, w.bob), map[string]any{"topic": "chat/1", "data": "hi"}); status != http.StatusOK {
		t.Fatalf("%d %v", status, answer)
	}
	for _, client := range []*pbtest.Subscriber{ann, also, bob, direct} {
		client.Expect(t, "chat/1", `"hi"`)
	}
	send(t, w, notify.Message{Topic: "chat/1", Data: 1, To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}})
	mustSend(t, w, "chat/1", 2)
	for _, client := range []*pbtest.Subscriber{ann, also} {
		client.Expect(t, "chat/1", "1")
	}
	for _, client := range []*pbtest.Subscriber{ann, also, bob, direct} {
		client.Expect(t, "chat/1", "2")
	}

	_, answer := o.Do(t, "GET", "/api/notify/clients", pbtest.Token(t, w.root), nil)
	edges := map[string]int{}
	items, _ := at(answer, "items")
	for _, item := range items.([]any) {
		name, _ := item.(map[string]any)["edge"].(string)
		edges[name]++
	}
	if fmt.Sprint(edges) != "map[:1 first:2 second:1]" {
		t.Errorf("clients by edge: %v", edges)
	}
	if stats := o.Edges(); len(stats) != 2 || stats[0].Name != "first" || stats[0].Connections != 2 || stats[1].Connections != 1 {
		t.Errorf("edges %+v", stats)
	}
	if status, _ := o.Do(t, "DELETE", "/api/notify/clients/"+also.ID, pbtest.Token(t, w.root), nil); status != http.StatusNoContent {
		t.Errorf("status %d", status)
	}
	also.ExpectEnd(t)
	ann.Close(t)
	pbtest.WaitFor(t, "the edge has no connections", func() bool { return first.EdgeStats().Connections == 0 })

	// another site's page asks whether it may subscribe
	preflight, err := http.NewRequestWithContext(t.Context(), http.MethodOptions, second.URL+"/api/realtime", nil)
	if err != nil {
		t.Fatal(err)
	}
	preflight.Header.Set("Origin", "https://example.com")
	preflight.Header.Set("Access-Control-Request-Method", "POST")
	allowed, err := second.Client().Do(preflight)
	if err != nil {
		t.Fatal(err)
	}
	allowed.Body.Close()
	if allowed.StatusCode != http.StatusNoContent || allowed.Header.Get("Access-Control-Allow-Origin") != "*" {
		t.Errorf("status %s", allowed.Status)
	}
	if status, answer := second.Do(t, "GET", "/api/health", "", nil); status != http.StatusOK {
		t.Errorf("%d %v", status, answer)
	}
	if status, answer := second.Do(t, "POST", "/api/realtime", "", "{"); status != http.StatusBadRequest {
		t.Errorf("%d %v", status, answer)
	}
	if status, answer := second.Do(t, "POST", "/api/realtime", "", map[string]any{"clientId": "none", "subscriptions": []string{"a"}}); status != http.StatusNotFound {
		t.Errorf("%d %v", status, answer)
	}
}

// TestEdgeResumes: when the origin is another process, an edge's clients stay, and get what was sent meanwhile on topics
// with history.
func TestEdgeResumes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addMembers(t, w)
	stays := addMember(t, w, "42", w.ann)
	leaves := addMember(t, w, "43", w.ann)
	addChannel(t, w, map[string]any{"pattern": "room/{room}", "subscribeRule": memberRule, "history": 1000})
	addChannel(t, w, map[string]any{"pattern": "open/{name}", "subscribeRule": "*", "history": 1000})
	addChannel(t, w, map[string]any{"pattern": "seen/{name}", "subscribeRule": "*", "presence": true, "presenceRule": "*"})
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	s := o.Edge(t, "edge")

	rewind := withQuery("open/a", "rewind", "10")
	full := withQuery("open/a", "envelope", "true")
	mustSend(t, w, "open/a", "before")
	plain := s.Subscribe(t, w.ann, "open/a", "room/42", "room/43", "seen/a", notify.DeniedTopic)
	wrapped := s.Subscribe(t, nil, rewind, full)
	watcher := watch(t, s, nil, "seen/a")
	watcher.await(t, w.ann)
	quiet := s.Connect(t)
	envelopeOf := func(client *pbtest.Subscriber, key string, want any) {
		t.Helper()
		event := client.Next(t)
		var got struct {
			Data any `json:"data"`
		}
		if err := json.Unmarshal([]byte(event.Data), &got); err != nil || event.Type != key || got.Data != want {
			t.Fatalf("got %v, want %v on %s", event, want, key)
		}
	}
	envelopeOf(wrapped, rewind, "before")

	for round := range 3 {
		if round == 1 { // its client may not have what follows
			if err := w.Delete(leaves); err != nil {
				t.Fatal(err)
			}
			expectDenied(t, plain, "room/43")
		}
		live := fmt.Sprintf("live %d", round)
		mustSend(t, w, "open/a", live)
		plain.Expect(t, "open/a", `"`+live+`"`)
		for range 2 {
			event := wrapped.Next(t)
			if !strings.Contains(event.Data, live) {
				t.Fatalf("got %v", event)
			}
		}
		o.Close(time.Second)
		for i := range 3 {
			mustSend(t, w, "open/a", fmt.Sprintf("missed %d %d", round, i))
			mustSend(t, w, "room/42", fmt.Sprintf("room %d %d", round, i))
			if round > 0 {
				mustSend(t, w, "room/43", "secret")
			}
		}
		pbtest.WaitFor(t, "the origin has no clients", func() bool { return w.SubscriptionsBroker().TotalClients() == 0 })
		o.Begin(t)

		got := map[string][]string{}
		for range 6 {
			event := plain.Next(t)
			got[event.Type] = append(got[event.Type], event.Data)
		}
		for i := range 3 {
			if len(got["open/a"]) != 3 || len(got["room/42"]) != 3 || got["open/a"][i] != fmt.Sprintf(`"missed %d %d"`, round, i) || got["room/42"][i] != fmt.Sprintf(`"room %d %d"`, round, i) {
				t.Fatalf("round %d: got %v", round, got)
			}
		}
		for range 6 {
			if event := wrapped.Next(t); !strings.Contains(event.Data, fmt.Sprintf(`"missed %d `, round)) {
				t.Fatalf("got %v", event)
			}
		}
		pbtest.WaitFor(t, "all are back", func() bool { return w.SubscriptionsBroker().TotalClients() == 4 })
		watcher.await(t, w.ann)
	}
	quiet.Set(t, nil, "open/b")
	mustSend(t, w, "open/b", 1)
	quiet.Expect(t, "open/b", "1")

	// it can lose the right while there is no origin to say so
	o.Close(time.Second)
	if err := w.Delete(stays); err != nil {
		t.Fatal(err)
	}
	mustSend(t, w, "room/42", "secret")
	o.Begin(t)
	expectDenied(t, plain, "room/42")
}

// expectDenied waits until client learns that it may not have topic.
func expectDenied(t *testing.T, client *pbtest.Subscriber, topic string) {
	t.Helper()
	if event := client.Next(t); !strings.HasPrefix(event.Type, notify.DeniedTopic) || !strings.Contains(event.Data, topic) {
		t.Fatalf("got %v", event)
	}
}

// TestEdgeResumesAfterGap: a client must know that messages are missing: by the envelope or, without one, because it has
// to connect anew.
func TestEdgeResumesAfterGap(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "open", "subscribeRule": "*", "history": 2})
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	s := o.Edge(t, "edge")
	full := withQuery("open", "envelope", "true")
	plain, told := s.Subscribe(t, nil, "open"), s.Subscribe(t, nil, full)
	o.Close(time.Second)
	mustSendAll(t, w, "open", 1, 2, 3, 4, 5)
	o.Begin(t)
	plain.Expect(t, "open", "4")
	plain.Expect(t, "open", "5")
	plain.ExpectEnd(t)
	if event := told.Next(t); !strings.Contains(event.Data, `"data":4,"gap":true`) {
		t.Errorf("got %v", event)
	}
	told.Next(t)

	plain = s.Subscribe(t, nil, "open")
	o.Close(time.Second)
	mustSend(t, w, "open", "lost")
	for range 2 { // which alone are kept, and not for them
		send(t, w, notify.Message{Topic: "open", Data: "secret", To: notify.Audience{Users: []string{pbtest.Ref(w.bob)}}})
	}
	o.Begin(t)
	if rest := plain.ExpectEnd(t); len(rest) > 0 {
		t.Errorf("got %v", rest)
	}
	pbtest.WaitFor(t, "the other is back", func() bool { return engine(w).Stats().Subscriptions == 1 })
	mustSend(t, w, "open", 6)
	if event := told.Next(t); !strings.Contains(event.Data, `"data":6,"gap":true`) {
		t.Errorf("got %v", event)
	}
}

// TestEdgeSignsOut: who signs out, or whose token ends, is not brought back as who they were.
func TestEdgeSignsOut(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "own/{user}", "subscribeRule": `@request.auth.id = @request.query.user`, "history": 100})
	addChannel(t, w, map[string]any{"pattern": "open", "subscribeRule": "*", "history": 100})
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	s := o.Edge(t, "edge")
	own := "own/" + w.ann.Id
	out := s.Subscribe(t, w.ann, own, "open")
	out.Set(t, nil, "open")
	refused := s.Subscribe(t, w.ann, own, "open")
	refused.Try(t, nil, own) // 403, and a guest now
	revoked := s.Subscribe(t, w.bob, "open")
	o.Close(time.Second)
	w.bob.RefreshTokenKey()
	save(t, w, w.bob)
	mustSend(t, w, own, "secret")
	mustSend(t, w, "open", 1)
	o.Begin(t)
	out.Expect(t, "open", "1")
	revoked.ExpectEnd(t)
	mustSend(t, w, own, "secret")
	mustSend(t, w, "open", 2)
	out.Expect(t, "open", "2")
	pbtest.WaitFor(t, "the others are back", func() bool { return w.SubscriptionsBroker().TotalClients() == 2 })
	connections, err := engine(w).Connections(notify.ConnectionFilter{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range connections {
		if c.Auth != nil || strings.Contains(fmt.Sprint(c.Subscriptions), own) {
			t.Errorf("back with %v as %v", c.Subscriptions, c.Auth)
		}
	}
}

// TestEdgeLosesMessages: if the link of a running origin is lost, clients that listen to topics without history must
// notice, and those that do not need not.
func TestEdgeLosesMessages(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "kept", "subscribeRule": "*", "history": 100})
	address := pbtest.NATS(t, &server.Options{})
	o := pbtest.NewOrigin(t, w, address)
	s := o.Edge(t, "edge")
	kept, other := s.Subscribe(t, nil, "kept", notify.BeatTopic, notify.DeniedTopic), s.Subscribe(t, nil, "kept", "example")
	nc, err := nats.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	subjects := link.Subjects{App: origin.DefaultApp}
	packets, err := nc.SubscribeSync(subjects.Up("edge"))
	if err != nil {
		t.Fatal(err)
	}
	packet, err := packets.NextMsg(pbtest.Timeout)
	if err != nil {
		t.Fatal(err)
	}
	// both sides forget the session
	for _, subject := range []string{subjects.Up("edge"), subjects.Down("edge")} {
		if err := nc.Publish(subject, link.Reset(link.Session(packet.Data), 0)); err != nil {
			t.Fatal(err)
		}
	}
	other.ExpectEnd(t)
	pbtest.WaitFor(t, "one is back", func() bool { return w.SubscriptionsBroker().TotalClients() == 1 })
	mustSend(t, w, "kept", 1)
	for event := kept.Next(t); event.Type != "kept"; event = kept.Next(t) {
		if event.Type != "@beat" {
			t.Fatalf("got %v", event)
		}
	}
}

// TestEdgeAlone: without an origin an edge accepts nobody, and in the end it keeps nobody.
func TestEdgeAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	address := pbtest.NATS(t, &server.Options{})
	o := pbtest.NewOrigin(t, w, address)
	s := o.EdgeWith(t, edge.Config{NATS: address, Name: "edge", Patience: 2 * time.Second})
	client := s.Subscribe(t, nil, "example")
	o.Close(0)
	pbtest.WaitFor(t, "the edge is not healthy", func() bool {
		status, _ := s.Do(t, "GET", "/api/health", "", nil)
		return status == http.StatusServiceUnavailable
	})
	for _, method := range []string{"GET", "POST"} {
		if status, answer := s.Do(t, method, "/api/realtime", "", nil); status != http.StatusServiceUnavailable {
			t.Errorf("%s: %d %v", method, status, answer)
		}
	}
	client.ExpectEnd(t)
	o.Begin(t)
	pbtest.WaitFor(t, "the edge is healthy", func() bool {
		status, _ := s.Do(t, "GET", "/api/health", "", nil)
		return status == http.StatusOK
	})
	client = s.Subscribe(t, nil, "example")
	mustSend(t, w, "example", 1)
	client.Expect(t, "example", "1")
}

// TestEdgeBound: a client that the application's own code has subscribed to something connects anew after a restart, so
// that this code can do it again.
func TestEdgeBound(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "log/{name}", "subscribeRule": "*", "history": 10})
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	s := o.Edge(t, "edge")
	bound, other := s.Subscribe(t, nil, "log/a"), s.Subscribe(t, nil, "log/a")
	client, err := w.SubscriptionsBroker().ClientById(bound.ID)
	if err != nil {
		t.Fatal(err)
	}
	client.Subscribe("own")
	mustSend(t, w, "own", 1)
	bound.Expect(t, "own", "1")
	mustSend(t, w, "log/a", 2) // the edge has taken all that came before
	bound.Expect(t, "log/a", "2")
	other.Expect(t, "log/a", "2")

	o.Close(time.Second)
	o.Begin(t)
	if left := bound.ExpectEnd(t); len(left) > 0 {
		t.Errorf("got %v", left)
	}
	mustSend(t, w, "log/a", 3)
	other.Expect(t, "log/a", "3")
}

// TestEdgeSubscribesAlong: a client stays that the application's own code subscribes to something whenever it subscribes
// itself. The code does it again after a restart, and nothing is missed meanwhile.
func TestEdgeSubscribesAlong(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "log/{name}", "subscribeRule": "*", "history": 10})
	w.OnRealtimeSubscribeRequest().BindFunc(func(e *core.RealtimeSubscribeRequestEvent) error {
		e.Client.Subscribe("before")
		if err := e.Next(); err != nil {
			return err
		}
		e.Client.Subscribe("own", "log/own")
		return nil
	})
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	s := o.Edge(t, "edge")
	client := s.Subscribe(t, nil, "log/a")
	for i := range 3 {
		if i > 0 {
			o.Close(time.Second)
			mustSend(t, w, "log/own", fmt.Sprint("missed ", i))
			o.Begin(t)
			client.Expect(t, "log/own", fmt.Sprintf("%q", fmt.Sprint("missed ", i)))
		}
		for _, topic := range []string{"log/a", "own", "log/own"} {
			pbtest.WaitFor(t, "the client is back", func() bool { return len(w.SubscriptionsBroker().Clients()) == 1 })
			mustSend(t, w, topic, i)
			client.Expect(t, topic, fmt.Sprint(i))
		}
	}
}

// TestEdgeSubscribesOnce: a client connects anew whose subscription neither it nor the application's code repeats.
func TestEdgeSubscribesOnce(t *testing.T) {
	t.Parallel()
	subscribesAfter := func(w *world, first *sync.Once) {
		w.OnRealtimeSubscribeRequest().BindFunc(func(e *core.RealtimeSubscribeRequestEvent) error {
			err := e.Next()
			first.Do(func() { e.Client.Subscribe("secret/a") })
			return err
		})
	}
	for name, test := range map[string]struct {
		subscribe func(w *world, first *sync.Once)
		keys      []string // that the client requests
	}{
		"while it connects": {func(w *world, first *sync.Once) {
			w.OnRealtimeConnectRequest().BindFunc(func(e *core.RealtimeConnectRequestEvent) error {
				first.Do(func() { e.Client.Subscribe("secret/a") })
				return e.Next()
			})
		}, nil},
		"while it subscribes": {subscribesAfter, []string{"example"}},
		"what it may not":     {subscribesAfter, []string{"example", "secret/a"}},
		"during the replacement": {func(w *world, first *sync.Once) {
			w.OnRealtimeSubscribeRequest().Bind(&hook.Handler[*core.RealtimeSubscribeRequestEvent]{
				Func: func(e *core.RealtimeSubscribeRequestEvent) error {
					first.Do(func() { e.Subscriptions = append(e.Subscriptions, "secret/a") })
					return e.Next()
				},
				Priority: 2000, // after the rules were checked
			})
		}, []string{"example"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			addChannel(t, w, map[string]any{"pattern": "secret/{name}", "subscribeRule": nil})
			test.subscribe(w, new(sync.Once))
			o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
			client := o.Edge(t, "edge").Connect(t)
			if test.keys != nil {
				client.Set(t, nil, test.keys...)
			}
			mustSend(t, w, "secret/a", 1)
			client.Expect(t, "secret/a", "1")
			o.Close(time.Second)
			o.Begin(t)
			client.ExpectEnd(t)
		})
	}
}

// TestEdgePresenceWindow: clients that are back after a restart make nobody hear of changes more often than usual when they
// begin to watch.
func TestEdgePresenceWindow(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(nil))
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	s := o.Edge(t, "edge")
	clients := make([]*pbtest.Subscriber, 30)
	for i := range clients {
		clients[i] = s.Subscribe(t, nil, "example")
	}
	o.Close(time.Second)
	o.Begin(t)
	pbtest.WaitFor(t, "all are back", func() bool { return w.SubscriptionsBroker().TotalClients() == len(clients) })

	watcher, member := o.Subscribe(t, nil, "@presence/room/a"), o.Connect(t)
	begun := time.Now()
	for i, client := range clients {
		topics := []string{"example", "room/a"}
		member.Set(t, w.ann, topics[:1+i%2]...)
		client.Set(t, nil, "example", "@presence/room/a")
		client.Next(t)
	}
	most := 2 + int(time.Since(begun)/(250*time.Millisecond))
	if told := len(watcher.Events()); told > most {
		t.Errorf("a watcher is told %d times, at most %d are due", told, most)
	}
}
