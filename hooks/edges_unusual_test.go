// Restarts of the origin where handlers of the application do unusual things, or requests come by another way than the
// connection that they are about: a client that stays has what it had, as whom it had it.

package hooks_test

import (
	"errors"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/internal/pbtest"
	"herald/notify"
	"herald/notify/edge"
)

type (
	connectEvent   = core.RealtimeConnectRequestEvent
	subscribeEvent = core.RealtimeSubscribeRequestEvent
)

// replacing returns a handler that is called while the subscriptions of a client are replaced.
func replacing(f func(*subscribeEvent) error) *hook.Handler[*subscribeEvent] {
	return &hook.Handler[*subscribeEvent]{Func: f, Priority: 2000}
}

// newLogWorld has topics with history, that all may listen to, and own/USER, which only that user may.
func newLogWorld(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "log/{name}", "subscribeRule": "*", "history": 100})
	addChannel(t, w, map[string]any{"pattern": "own/{user}", "subscribeRule": `@request.auth.id = @request.query.user`, "history": 100})
	return w
}

// afterRestart restarts the origin and expects that the client has what it had, or connects anew.
func afterRestart(t *testing.T, w *world, o *pbtest.Origin, s *pbtest.Server, stays bool) {
	t.Helper()
	restart(t, w, o, s)
	if has := w.SubscriptionsBroker().TotalClients() == 1; has != stays {
		t.Errorf("the client stays: %v, want %v", has, stays)
	}
}

func TestEdgeUnusualHandlers(t *testing.T) {
	t.Parallel()
	signedIn := func(e *subscribeEvent) bool { return e.Auth != nil }
	for name, test := range map[string]struct {
		bind  func(w *world)
		then  func(t *testing.T, w *world, s *pbtest.Server, c *pbtest.Subscriber)
		stays bool
	}{
		"fails when all is done": {
			bind: func(w *world) {
				w.OnRealtimeSubscribeRequest().Bind(replacing(func(e *subscribeEvent) error {
					if err := e.Next(); err != nil || !signedIn(e) {
						return err
					}
					return errors.New("afterwards")
				}))
			},
			then: func(t *testing.T, w *world, _ *pbtest.Server, c *pbtest.Subscriber) { c.Try(t, w.ann, "log/b") }, stays: true,
		},
		"panics when all is done": {
			bind: func(w *world) {
				w.OnRealtimeSubscribeRequest().Bind(replacing(func(e *subscribeEvent) error {
					if err := e.Next(); err != nil || !signedIn(e) {
						return err
					}
					panic("afterwards")
				}))
			},
			then: func(t *testing.T, w *world, _ *pbtest.Server, c *pbtest.Subscriber) { c.Try(t, w.ann, "log/b") }, stays: true,
		},
		"signs in when all is done": {
			bind: func(w *world) {
				w.OnRealtimeSubscribeRequest().BindFunc(func(e *subscribeEvent) error {
					err := e.Next()
					if e.Request.Header.Get("Authorization") == "ApiKey ann" {
						e.Client.Set(apis.RealtimeClientAuthKey, w.ann)
					}
					return err
				})
			},
			then: func(t *testing.T, _ *world, s *pbtest.Server, c *pbtest.Subscriber) {
				body := map[string]any{"clientId": c.ID, "subscriptions": []string{"log/b"}}
				if status, answer := s.Do(t, http.MethodPost, "/api/realtime", "ApiKey ann", body); status != http.StatusNoContent {
					t.Fatal(status, answer)
				}
			}, stays: true,
		},
		"replaces the subscriptions itself": {
			bind: func(w *world) {
				w.OnRealtimeSubscribeRequest().Bind(replacing(func(e *subscribeEvent) error {
					e.Client.Set(apis.RealtimeClientAuthKey, e.Auth)
					for key := range e.Client.Subscriptions() {
						e.Client.Unsubscribe(key)
					}
					e.Client.Subscribe(e.Subscriptions...)
					return e.NoContent(http.StatusNoContent)
				}))
			}, stays: true,
		},
		"signs in while it connects, and its client asks as a guest": {
			bind: func(w *world) {
				w.OnRealtimeConnectRequest().BindFunc(func(e *connectEvent) error {
					e.Client.Set(apis.RealtimeClientAuthKey, w.ann)
					return e.Next()
				})
			}, stays: true,
		},
		"signs in while it connects, and nothing is asked": {
			bind: func(w *world) {
				w.OnRealtimeConnectRequest().BindFunc(func(e *connectEvent) error {
					e.Client.Set(apis.RealtimeClientAuthKey, w.ann)
					return e.Next()
				})
			},
			then: func(t *testing.T, w *world, s *pbtest.Server, c *pbtest.Subscriber) {
				c.Close(t)
				s.Connect(t)
				pbtest.WaitFor(t, "the other one is gone", func() bool { return w.SubscriptionsBroker().TotalClients() == 1 })
			}, stays: true,
		},
		"signs in some time": {
			then: func(t *testing.T, w *world, _ *pbtest.Server, c *pbtest.Subscriber) {
				clientOf(t, w, c).Set(apis.RealtimeClientAuthKey, w.ann)
			},
		},
		"signs out some time": {
			then: func(t *testing.T, w *world, _ *pbtest.Server, c *pbtest.Subscriber) {
				c.Set(t, w.ann, "log/a")
				clientOf(t, w, c).Unset(apis.RealtimeClientAuthKey)
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newLogWorld(t)
			if test.bind != nil {
				test.bind(w)
			}
			o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
			s := o.Edge(t, "edge")
			c := s.Subscribe(t, nil, "log/a")
			if test.then != nil {
				test.then(t, w, s, c)
			}
			afterRestart(t, w, o, s, test.stays)
		})
	}
}

func clientOf(t *testing.T, w *world, c *pbtest.Subscriber) subscriptions.Client {
	t.Helper()
	client, err := w.SubscriptionsBroker().ClientById(c.ID)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// TestEdgeSwallows: a client whose repeated request had no effect connects anew.
func TestEdgeSwallows(t *testing.T) {
	t.Parallel()
	w := newLogWorld(t)
	var swallows atomic.Bool
	w.OnRealtimeSubscribeRequest().BindFunc(func(e *subscribeEvent) error {
		if swallows.Load() {
			return e.NoContent(http.StatusNoContent)
		}
		return e.Next()
	})
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	s := o.Edge(t, "edge")
	s.Subscribe(t, nil, "log/a")
	swallows.Store(true)
	afterRestart(t, w, o, s, false)
}

// TestEdgeSwallowsSome: likewise if it had another effect.
func TestEdgeSwallowsSome(t *testing.T) {
	t.Parallel()
	w := newLogWorld(t)
	var swallows atomic.Bool
	w.OnRealtimeSubscribeRequest().Bind(replacing(func(e *subscribeEvent) error {
		if swallows.Load() {
			e.Client.Subscribe("log/own")
			return e.NoContent(http.StatusNoContent)
		}
		return e.Next()
	}))
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	s := o.Edge(t, "edge")
	c := s.Subscribe(t, nil, "log/a")
	swallows.Store(true)
	o.Close(time.Second)
	o.Begin(t)
	c.ExpectEnd(t)
}

// TestEdgeRestartsTwice: what a handler subscribes the client to keeps its position if the origin restarts again before that
// handler has done it.
func TestEdgeRestartsTwice(t *testing.T) {
	t.Parallel()
	w := newLogWorld(t)
	var isHeld atomic.Bool
	held, release := make(chan struct{}), make(chan struct{})
	w.OnRealtimeSubscribeRequest().BindFunc(func(e *subscribeEvent) error {
		if err := e.Next(); err != nil {
			return err
		}
		if isHeld.CompareAndSwap(true, false) {
			close(held)
			<-release
			return nil
		}
		e.Client.Subscribe("log/own")
		return nil
	})
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	c := o.Edge(t, "edge").Subscribe(t, nil, "log/a")
	mustSend(t, w, "log/own", 1)
	c.Expect(t, "log/own", "1")
	isHeld.Store(true)
	o.Close(time.Second)
	mustSend(t, w, "log/own", "missed")
	o.Begin(t)
	<-held
	mustSend(t, w, "log/a", "after that")
	c.Expect(t, "log/a", `"after that"`) // the edge has heard of what the request has done
	time.AfterFunc(100*time.Millisecond, func() { close(release) })
	o.Close(time.Second)
	o.Begin(t)
	c.Expect(t, "log/own", `"missed"`)
}

func ann(w *world) *core.Record { return w.ann }
func bob(w *world) *core.Record { return w.bob }

// TestEdgeOtherWayWhileBack: a request by another way waits until the client is back, and does not stand in for the
// one that brings it back.
func TestEdgeOtherWayWhileBack(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		as     func(*world) *core.Record
		key    string
		status int
		want   string
	}{
		"refused":          {ann, "own/nobody", http.StatusForbidden, "[log/a] ann"},
		"accepted":         {ann, "log/b", http.StatusNoContent, "[log/b] ann"},
		"of somebody else": {bob, "log/b", http.StatusForbidden, "[log/a] ann"},
		"of a guest":       {nil, "log/b", http.StatusNoContent, "[log/b] "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newLogWorld(t)
			var isHeld atomic.Bool
			held, release := make(chan struct{}), make(chan struct{})
			w.OnRealtimeSubscribeRequest().BindFunc(func(e *subscribeEvent) error {
				if isHeld.CompareAndSwap(true, false) { // the request that brings it back
					close(held)
					<-release
				}
				return e.Next()
			})
			o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
			first, second := o.Edge(t, "first"), o.Edge(t, "second")
			c := first.Subscribe(t, w.ann, "log/a")
			isHeld.Store(true)
			o.Close(time.Second)
			o.Begin(t)
			<-held
			token := ""
			if test.as != nil {
				token = pbtest.Token(t, test.as(w))
			}
			o.AwaitEdges(t, first, second)
			time.AfterFunc(100*time.Millisecond, func() { close(release) })
			status, answer := second.Do(t, http.MethodPost, "/api/realtime", token, map[string]any{"clientId": c.ID, "subscriptions": []string{test.key}})
			if status != test.status {
				t.Errorf("%d %v", status, answer)
			}
			if now := standingOf(w)[c.ID]; now != strings.ReplaceAll(test.want, "ann", w.ann.Id) {
				t.Errorf("the client is %q, want %q", now, test.want)
			}
		})
	}
}

// edgeOverLink returns an origin and its edge "first", whose link loses what loses says of each packet, by its subject.
func edgeOverLink(t *testing.T, w *world, loses func(subject string) bool) (*pbtest.Origin, *pbtest.Server) {
	t.Helper()
	here, there := pbtest.NATS(t, &server.Options{}), pbtest.NATS(t, &server.Options{})
	o := pbtest.NewOrigin(t, w, here)
	bridge(t, here, there, func(subject string, _ []byte, publish func()) {
		if !loses(subject) {
			publish()
		}
	})
	return o, o.EdgeWith(t, edge.Config{NATS: there, Name: "first"})
}

// TestEdgeOtherWay: a sign-out that comes by another way, and that the edge with the connection does not hear of, is not
// undone by a restart.
func TestEdgeOtherWay(t *testing.T) {
	t.Parallel()
	w := newLogWorld(t)
	var isDue, isCut atomic.Bool
	w.OnRealtimeSubscribeRequest().Bind(replacing(func(e *subscribeEvent) error {
		err := e.Next()
		if isDue.CompareAndSwap(true, false) {
			isCut.Store(true) // the edge is ready for it, and hears nothing more
		}
		return err
	}))
	o, first := edgeOverLink(t, w, func(subject string) bool {
		if strings.HasSuffix(subject, ".first.hello") {
			isCut.Store(false) // it has heard of the next origin, so that nothing of this one is on the way
		}
		return isCut.Load() && strings.HasSuffix(subject, ".first.down")
	})
	second := o.Edge(t, "second")
	for name, way := range map[string]struct {
		*pbtest.Server
		field  string
		status int
	}{
		"another edge":      {second, "clientId", http.StatusNoContent},
		"the origin itself": {o.Server, "clientId", http.StatusNoContent},
		// the edge does not recognise it, but PocketBase does; the answer is lost
		"its edge, spelt in another way": {first, "clientid", http.StatusServiceUnavailable},
	} {
		own := "own/" + w.ann.Id
		c := first.Subscribe(t, w.ann, own, "log/a")
		body := map[string]any{way.field: c.ID, "subscriptions": []string{"log/a", "log/b"}}
		isDue.Store(true)
		var asked sync.WaitGroup
		asked.Go(func() {
			if status, answer := way.Do(t, http.MethodPost, "/api/realtime", "", body); status != way.status {
				t.Errorf("by %s: %d %v", name, status, answer)
			}
		})
		pbtest.WaitFor(t, "it is signed out", func() bool { return isCut.Load() && standingOf(w)[c.ID] == "[log/a log/b] " })
		if way.status == http.StatusNoContent {
			asked.Wait()
		}
		o.Close(0)
		o.Begin(t)
		mustSend(t, w, own, "for ann")
		for _, event := range c.ExpectEnd(t) {
			if event.Type == own {
				t.Errorf("a guest got %s", event.Data)
			}
		}
		asked.Wait()
		o.AwaitEdges(t, first, second)
	}
	// and what the edge hears of, it keeps
	c := first.Subscribe(t, w.ann, "log/a")
	if status, answer := second.Do(t, http.MethodPost, "/api/realtime", "", map[string]any{"clientId": c.ID, "subscriptions": []string{"log/b"}}); status != http.StatusNoContent {
		t.Fatal(status, answer)
	}
	afterRestart(t, w, o, first, true)
}

// TestEdgeOtherWayInDoubt: while the edge with the connection does not answer, a request by another way does nothing.
func TestEdgeOtherWayInDoubt(t *testing.T) {
	t.Parallel()
	w := newLogWorld(t)
	var isCut atomic.Bool
	o, first := edgeOverLink(t, w, func(subject string) bool { return isCut.Load() && strings.HasSuffix(subject, ".first.up") })
	c := first.Subscribe(t, w.ann, "log/a")
	isCut.Store(true)
	body := map[string]any{"clientId": c.ID, "subscriptions": []string{"log/a", "log/b"}} // a sign-out
	var asked sync.WaitGroup
	asked.Go(func() {
		status, answer := o.Do(t, http.MethodPost, "/api/realtime", "", body)
		if status != http.StatusServiceUnavailable && status != http.StatusNotFound {
			t.Errorf("%d %v", status, answer)
		}
	})
	for range 20 {
		mustSend(t, w, "log/b", 1)
		if now := standingOf(w)[c.ID]; now != "[log/a] "+w.ann.Id {
			t.Fatalf("the client is %q", now)
		}
		time.Sleep(10 * time.Millisecond) // nothing happens: there is nothing to wait for
	}
	o.Close(0)
	isCut.Store(false)
	asked.Wait()
	o.Begin(t)
	c.ExpectEnd(t)
}

// TestEdgeOtherWaySilent: a request by another way is not answered as done if the link of the edge with the connection is lost
// before that edge knows of it.
func TestEdgeOtherWaySilent(t *testing.T) {
	t.Parallel()
	w := newLogWorld(t)
	var isCut atomic.Bool
	o, first := edgeOverLink(t, w, func(subject string) bool { return isCut.Load() && strings.Contains(subject, ".first.") })
	c := first.Subscribe(t, w.ann, "log/a")
	isCut.Store(true)
	body := map[string]any{"clientId": c.ID, "subscriptions": []string{"log/a", "log/b"}}
	if status, answer := o.Do(t, http.MethodPost, "/api/realtime", pbtest.Token(t, w.ann), body); status != http.StatusServiceUnavailable {
		t.Errorf("%d %v", status, answer)
	}
	isCut.Store(false)
	pbtest.WaitFor(t, "the client is back as it was", func() bool { return standingOf(w)[c.ID] == "[log/a] "+w.ann.Id })
}

// TestEdgeSignedOutByCode: a client that code of the application has signed out gets nothing for its former user when its
// request, which still has the token, is repeated after a restart.
func TestEdgeSignedOutByCode(t *testing.T) {
	t.Parallel()
	w := newLogWorld(t)
	var isBack atomic.Bool
	w.OnRealtimeSubscribeRequest().BindFunc(func(e *subscribeEvent) error {
		err := e.Next()
		if isBack.Load() {
			time.Sleep(100 * time.Millisecond) // a handler that takes a while
		}
		return err
	})
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	c := o.Edge(t, "edge").Subscribe(t, w.ann, "log/a")
	clientOf(t, w, c).Unset(apis.RealtimeClientAuthKey)
	isBack.Store(true)
	o.Close(time.Second)
	send(t, w, notify.Message{Topic: "log/a", Data: "private", To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}})
	o.Begin(t)
	for _, event := range c.ExpectEnd(t) {
		if event.Type == "log/a" {
			t.Errorf("signed out, it got %s", event.Data)
		}
	}
}

// TestEdgeForgetsPositions: the position of a topic that a client has left is not used when it returns to the topic.
func TestEdgeForgetsPositions(t *testing.T) {
	t.Parallel()
	w := newLogWorld(t)
	var isDue atomic.Bool
	w.OnRealtimeSubscribeRequest().Bind(replacing(func(e *subscribeEvent) error {
		if isDue.CompareAndSwap(true, false) {
			mustSend(t, w, "log/a", "while it leaves") // waits until the request is done
		}
		return e.Next()
	}))
	o := pbtest.NewOrigin(t, w, pbtest.NATS(t, &server.Options{}))
	c := o.Edge(t, "edge").Subscribe(t, nil, "log/a", "log/b")
	isDue.Store(true)
	c.Set(t, nil, "log/b")
	c.Expect(t, "log/a", `"while it leaves"`)
	mustSend(t, w, "log/a", "while it is away")
	c.Set(t, nil, "log/a", "log/b")
	o.Close(time.Second)
	o.Begin(t)
	pbtest.WaitFor(t, "it is back", func() bool { return standingOf(w)[c.ID] == "[log/a log/b] " })
	mustSend(t, w, "log/a", "next")
	c.Expect(t, "log/a", `"next"`)
}
