package hooks_test

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

// TestTimeouts checks that what a handler sets holds, and that what was sent
// before the end arrives.
func TestTimeouts(t *testing.T) {
	t.Parallel() // it waits most of the time
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		lifetime, idle := time.Hour, time.Hour
		w.OnRealtimeConnectRequest().BindFunc(func(e *core.RealtimeConnectRequestEvent) error {
			if d := e.MaxTimeout; d < 27*time.Minute || d > 33*time.Minute {
				t.Errorf("the lifetime is %v, not about 30 minutes", d)
			}
			if e.IdleTimeout != e.MaxTimeout {
				t.Errorf("ends when idle for %v", e.IdleTimeout)
			}
			e.MaxTimeout, e.IdleTimeout = lifetime, idle
			return e.Next()
		})
		server := serve(t, w)

		lifetime = time.Millisecond
		subscriber := server.Subscribe(t, nil, "example")
		if report := send(t, w, notify.Message{Topic: "example", Data: 1}); report.Queued == 1 {
			subscriber.Expect(t, "example", "1")
		}
		subscriber.ExpectEnd(t)
		awaitReason(t, w, notify.DisconnectLifetime)

		lifetime, idle = time.Hour, time.Millisecond
		server.Connect(t).ExpectEnd(t)
		awaitReason(t, w, notify.DisconnectIdle)
	})
}

func TestTokenExpiry(t *testing.T) {
	t.Parallel() // it waits most of the time
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		w.OnRealtimeSubscribeRequest().Bind(replacing(func(e *subscribeEvent) error {
			if slices.Contains(e.Subscriptions, "refused") {
				return e.BadRequestError("", nil)
			}
			return e.Next()
		}))
		server := serve(t, w)
		subscriber := server.Connect(t)
		token, err := w.ann.NewStaticAuthToken(4 * time.Second)
		if err != nil {
			t.Fatal(err)
		}
		status, answer := server.Do(t, "POST", "/api/realtime", "Bearer "+token, map[string]any{"clientId": subscriber.ID, "subscriptions": []string{"example"}})
		if status != http.StatusNoContent {
			t.Fatalf("%d %v", status, answer)
		}
		message := notify.Message{Topic: "example", Data: 1, To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}}
		if report := send(t, w, message); report.Queued != 1 {
			t.Fatalf("report %+v", report)
		}
		subscriber.Expect(t, "example", "1")
		// a request that is refused does not prolong it
		if status, answer := subscriber.Try(t, w.ann, "refused"); status != http.StatusBadRequest {
			t.Fatalf("%d %v", status, answer)
		}

		pbtest.WaitFor(t, "the token expires", func() bool { return send(t, w, message).Matched == 0 })
		for _, event := range subscriber.ExpectEnd(t) {
			if event.Data != "1" {
				t.Errorf("got %v", event)
			}
		}
		awaitReason(t, w, notify.DisconnectTokenExpired)
	})
}

// fill sends msg, with a large text, and more behind it to a client that does not read, again and again, until some of it
// waits in the queue, for good: more than the kernel may still take when a write is tried again. Once something waits, it
// sends more at once: the client is ended when it has taken nothing for 10 seconds.
func fill(t *testing.T, server *pbtest.Server, msg notify.Message, more ...notify.Message) {
	t.Helper()
	messages := append([]notify.Message{msg}, more...)
	queued := func() int { return engine(server.App).Stats().QueuedBytes + server.EdgeStats().QueuedBytes }
	most := max(1, 256<<10/len(msg.Data.(string))/len(messages))
	atOnce := 1
	for range 1000 {
		for range atOnce {
			for _, message := range messages {
				if report := send(t, server.App, message); report.Queued != 1 {
					t.Fatalf("report %+v", report)
				}
			}
		}
		server.AwaitLink(t)
		patience := time.Now().Add(30 * time.Millisecond)
		for queued() > 0 && time.Now().Before(patience) {
			time.Sleep(time.Millisecond)
		}
		atOnce = 1
		if queued() > 0 {
			atOnce = most
		}
		// A socket of this machine takes more at the next tries, which come every second.
		for last := 0; queued() > 600<<10; time.Sleep(time.Millisecond) {
			switch now := queued(); {
			case now != last:
				last, patience = now, time.Now().Add(2500*time.Millisecond)
			case time.Now().After(patience):
				return
			}
		}
	}
	t.Fatal("the client takes everything")
}

// TestTokenExpiryAfterFailure: a request that fails after it has signed the client in has also said when that ends.
func TestTokenExpiryAfterFailure(t *testing.T) {
	t.Parallel() // it waits most of the time
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		w.OnRealtimeSubscribeRequest().Bind(replacing(func(e *subscribeEvent) error {
			if err := e.Next(); err != nil || e.Auth == nil {
				return err
			}
			return e.BadRequestError("", nil)
		}))
		server := serve(t, w)
		subscriber := server.Subscribe(t, nil, "example")
		token, err := w.ann.NewStaticAuthToken(2 * time.Second)
		if err != nil {
			t.Fatal(err)
		}
		server.Do(t, "POST", "/api/realtime", token, map[string]any{"clientId": subscriber.ID, "subscriptions": []string{"example"}})
		message := notify.Message{Topic: "example", Data: 1, To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}}
		pbtest.WaitFor(t, "the token expires", func() bool { return send(t, w, message).Matched == 0 })
	})
}

// TestRevoked lets a user's messages wait for a connection that does not read
// when the user is signed out: these must not be written any more.
func TestRevoked(t *testing.T) {
	t.Parallel() // it waits most of the time
	for name, prepare := range map[string]func(w *world) (revoke func() error){
		"new password": func(w *world) func() error {
			w.ann.SetPassword("0987654321") // takes long: the client must not be slow for 10 seconds
			return func() error { return w.Save(w.ann) }
		},
		"deleted": func(w *world) func() error { return func() error { return w.Delete(w.ann) } },
		"new secret": func(w *world) func() error {
			return func() error {
				users, err := w.FindCollectionByNameOrId("users")
				if err != nil {
					return err
				}
				users.AuthToken.Secret = strings.Repeat("x", 50)
				return w.Save(users)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
				server := serve(t, w)
				id := stall(t, server, w.ann, "private")
				client, err := w.SubscriptionsBroker().ClientById(id)
				if err != nil {
					t.Fatal(err)
				}
				message := notify.Message{Topic: "private", Data: strings.Repeat("x", 200<<10), To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}}
				own, _ := engine(w).Own(client)
				revoke := prepare(w)
				fill(t, server, message)
				if err := revoke(); err != nil {
					t.Fatal(err)
				}
				<-own.Done()
				awaitReason(t, w, notify.DisconnectAuthEnded)
			})
		})
	}
}

// TestTakenBack lets messages wait for a connection that does not read when its user loses the right to them: these
// must not be written any more. Others are, or the client connects again.
func TestTakenBack(t *testing.T) {
	t.Parallel() // it waits most of the time
	for name, c := range map[string]struct {
		secret func(w *world) notify.Message
		lose   func(w *world, member *core.Record) error
		reason notify.Disconnect
	}{
		"denied": {
			func(*world) notify.Message { return notify.Message{Topic: "room/42"} },
			func(w *world, member *core.Record) error { return w.Delete(member) },
			notify.DisconnectDenied,
		},
		"signed out": {
			func(w *world) notify.Message {
				return notify.Message{Topic: "example", To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}}
			},
			func(w *world, _ *core.Record) error { w.ann.RefreshTokenKey(); return w.Save(w.ann) },
			notify.DisconnectAuthEnded,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
				addMembers(t, w)
				member := addMember(t, w, "42", w.ann)
				addChannel(t, w, map[string]any{"pattern": "room/{room}", "subscribeRule": memberRule})
				server := serve(t, w)
				sent := 0
				secret := c.secret(w)
				secret.Data = counter{&sent}
				id, lines := openOn(t, server, w.ann, "example")
				if status, answer := server.Do(t, "POST", "/api/realtime", pbtest.Token(t, w.ann), map[string]any{
					"clientId": id, "subscriptions": []string{"example", secret.Topic},
				}); status != http.StatusNoContent {
					t.Fatal(status, answer)
				}
				client, err := w.SubscriptionsBroker().ClientById(id)
				if err != nil {
					t.Fatal(err)
				}
				own, _ := engine(w).Own(client)
				const size = 16 << 10 // of both some wait at the edge, if there is one
				fill(t, server, notify.Message{Topic: "example", Data: strings.Repeat("x", size)}, secret)
				queued := server.Queued(own)
				// At the edge, a message may be several pieces. And the kernel takes some more until the right is lost: its
				// probes of a full socket are seconds apart in the end.
				const taken = 5
				waiting := own.Queued()/2 + server.EdgeStats().QueuedBytes/(size+100) - taken
				if waiting < taken {
					t.Fatalf("only %d wait", waiting)
				}
				if err := c.lose(w, member); err != nil {
					t.Fatal(err)
				}
				switch knows := !server.IsEdge() || strings.HasSuffix(t.Name(), "/edge") || strings.HasSuffix(t.Name(), "/edge,_wrapped"); {
				case c.reason == notify.DisconnectAuthEnded, !knows: // who was signed out must go, and where an edge cannot tell what waits
					<-own.Done()
					awaitReason(t, w, c.reason)
				default:
					pbtest.WaitFor(t, "the rules have been asked again", func() bool { return server.Queued(own) < queued })
				}
				server.AwaitLink(t) // until then, an edge goes on
				mustSend(t, w, "example", "last")
				for lines.Scan() {
					text := lines.Text()
					if strings.Contains(text, "last") {
						break
					}
					var number int
					if _, err := fmt.Sscanf(text, `data:"secret %d"`, &number); err == nil && number > sent-waiting {
						t.Fatalf("%s was written; of %d, %d waited", text, sent, waiting)
					}
				}
			})
		})
	}
}

// counter is data that says how often it has been sent.
type counter struct{ sent *int }

func (c counter) MarshalText() ([]byte, error) {
	*c.sent++
	return fmt.Appendf(nil, "secret %d", *c.sent), nil
}

// TestLateHandler binds a handler when connections have been taken already: it
// must not be passed by.
func TestLateHandler(t *testing.T) {
	w := newWorld(t)
	server := pbtest.Serve(t, w)
	subscriber := server.Subscribe(t, nil, "example")
	send(t, w, notify.Message{Topic: "example", Data: 1})
	w.OnRealtimeMessageSend().BindFunc(func(e *core.RealtimeMessageEvent) error {
		if e.Message.Name == "example" {
			return nil // stops it
		}
		return e.Next()
	})
	if report := send(t, w, notify.Message{Topic: "example", Data: 2}); report.Matched != 0 {
		t.Errorf("report %+v", report)
	}
	subscriber.Expect(t, "example", "1")
	if rest := subscriber.ExpectEnd(t); len(rest) != 0 {
		t.Errorf("passed by the handler: %v", rest)
	}
	again := server.Subscribe(t, nil, "example", "fence")
	send(t, w, notify.Message{Topic: "example", Data: 3})
	send(t, w, notify.Message{Topic: "fence", Data: 4})
	again.Expect(t, "fence", "4")
}

// TestShutdown sends until the server stops: what it accepted has to arrive.
func TestShutdown(t *testing.T) {
	t.Parallel() // it waits most of the time
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		server := serve(t, w)
		token := pbtest.Token(t, w.root)
		var subscribers []*pbtest.Subscriber
		for range 20 {
			subscribers = append(subscribers, server.Subscribe(t, nil, "example"))
		}
		started, accepted := make(chan struct{}), make(chan int)
		go func() {
			for i := 0; ; i++ {
				status, answer := server.Do(t, "POST", "/api/notify", token, fmt.Sprintf(`{"topic":"example","data":%d}`, i))
				if status == http.StatusServiceUnavailable {
					accepted <- i
					return
				}
				if status != http.StatusOK {
					t.Errorf("%d %v", status, answer)
				}
				if i == 50 {
					close(started)
				}
			}
		}()
		<-started
		engine(w).Shutdown(5 * time.Second)
		want := <-accepted
		for _, subscriber := range subscribers {
			if server.IsEdge() {
				for i := range want {
					subscriber.Expect(t, "example", fmt.Sprint(i))
				}
				continue
			}
			if got := len(subscriber.ExpectEnd(t)); got != want {
				t.Errorf("%d of %d messages arrived", got, want)
			}
		}
		if _, err := engine(w).Send(t.Context(), notify.Message{Topic: "example"}); !errors.Is(err, notify.ErrShutdown) {
			t.Errorf("error %v", err)
		}
		status, answer := server.Do(t, "GET", "/api/realtime", "", nil)
		if status != http.StatusServiceUnavailable {
			t.Errorf("%d %v", status, answer)
		}
		if count := w.SubscriptionsBroker().TotalClients(); count != 0 {
			t.Errorf("%d clients are left", count)
		}
	})
}

// TestShutdownOfStalled is about clients that never take what is queued.
func TestShutdownOfStalled(t *testing.T) {
	t.Parallel() // it waits most of the time
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		server := serve(t, w)
		stall(t, server, nil, "flood")
		fill(t, server, notify.Message{Topic: "flood", Data: strings.Repeat("x", 200<<10)})
		const timeout = 10 * time.Millisecond
		began := time.Now()
		engine(w).Shutdown(timeout)
		if time.Since(began) < timeout+time.Second && w.SubscriptionsBroker().TotalClients() != 0 {
			t.Error("the client is still there")
		}
		// after a second it gives up, on a busy machine
		pbtest.WaitFor(t, "the client is gone", func() bool { return w.SubscriptionsBroker().TotalClients() == 0 })
	})
}
