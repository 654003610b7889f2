package hooks_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/internal/pbtest"
	"herald/notify"
)

// standingOf returns what the clients of w are subscribed to, as whom, by their ids.
func standingOf(w *world) map[string]string {
	standing := map[string]string{}
	for id, client := range w.SubscriptionsBroker().Clients() {
		var keys []string
		for key := range client.Subscriptions() {
			keys = append(keys, key)
		}
		slices.Sort(keys)
		user := ""
		if auth, _ := client.Get(apis.RealtimeClientAuthKey).(*core.Record); auth != nil {
			user = auth.Id
		}
		standing[id] = fmt.Sprint(keys, " ", user)
	}
	return standing
}

// restart restarts the origin and expects that each client has what it had, or connects anew.
func restart(t *testing.T, w *world, o *pbtest.Origin, s *pbtest.Server) {
	t.Helper()
	before := standingOf(w)
	o.Close(time.Second)
	o.Begin(t)
	// each is back, or has ended
	pbtest.WaitFor(t, "the clients have what they had", func() bool {
		now := standingOf(w)
		for id, standing := range now {
			if standing != before[id] {
				return false
			}
		}
		return len(now) == s.EdgeStats().Connections && s.EdgeStats().Joined
	})
}

// TestEdgeOverlap: requests of a client that overlap leave the edge with what the client has in the end.
func TestEdgeOverlap(t *testing.T) {
	t.Parallel()
	within := func(f func(*core.RealtimeSubscribeRequestEvent) error) *hook.Handler[*core.RealtimeSubscribeRequestEvent] {
		return &hook.Handler[*core.RealtimeSubscribeRequestEvent]{Func: f, Priority: 2000} // while the subscriptions are replaced
	}
	for name, handler := range map[string]*hook.Handler[*core.RealtimeSubscribeRequestEvent]{
		"at once": within(func(e *core.RealtimeSubscribeRequestEvent) error { return e.Next() }),
		"the first takes long": within(func(e *core.RealtimeSubscribeRequestEvent) error {
			if e.Auth == nil {
				time.Sleep(50 * time.Millisecond) // the second waits for it
			}
			return e.Next()
		}),
		"the first takes long afterwards": {Func: func(e *core.RealtimeSubscribeRequestEvent) error {
			err := e.Next()
			if e.Auth == nil {
				time.Sleep(50 * time.Millisecond) // the second overtakes it
			}
			return err
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			addChannel(t, w, map[string]any{"pattern": "log/{name}", "subscribeRule": "*", "history": 10})
			w.OnRealtimeSubscribeRequest().Bind(handler)
			o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
			s := o.Edge(t, "edge")
			var clients sync.WaitGroup
			for range 40 {
				client := s.Connect(t)
				clients.Go(func() {
					var both sync.WaitGroup
					both.Go(func() { client.Try(t, nil, "log/a") })
					both.Go(func() {
						time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond) // no order is depended on
						client.Try(t, w.ann, "log/a", "log/b")
					})
					both.Wait()
				})
			}
			clients.Wait()
			restart(t, w, o, s)
			if count := w.SubscriptionsBroker().TotalClients(); count != 40 {
				t.Errorf("%d of 40 are back", count)
			}
		})
	}
}

// TestEdgeSubscribesBeside: what code of the application subscribes a client to just when a request of the client ends
// is not forgotten in silence.
func TestEdgeSubscribesBeside(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "log/{name}", "subscribeRule": "*", "history": 10})
	var beside sync.WaitGroup
	var once sync.Map // by client
	w.OnRealtimeSubscribeRequest().BindFunc(func(e *core.RealtimeSubscribeRequestEvent) error {
		err := e.Next()
		if _, isKnown := once.LoadOrStore(e.Client.Id(), true); isKnown {
			return err
		}
		for range 8 { // so that the topic's position waits for the disk
			beside.Go(func() {
				toNobody := notify.Audience{Clients: []string{"nobody"}}
				if _, err := engine(w).Send(t.Context(), notify.Message{Topic: "log/own", Data: 1, To: toNobody}); err != nil {
					t.Error(err)
				}
			})
		}
		client := e.Client
		beside.Go(func() { client.Subscribe("log/own") })
		time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond) // as long as that waits, or less
		return err
	})
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	s := o.Edge(t, "edge")
	for range 100 {
		s.Subscribe(t, nil, "log/a")
	}
	beside.Wait()
	restart(t, w, o, s)
}
