package hooks_test

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/internal/pbtest"
	"herald/notify"
)

// Clients of the application's own that do not behave as one would think, put around
// Herald's or in its place.

// hidingWrapper shows only some of its subscriptions.
type hidingWrapper struct{ subscriptions.Client }

func (w hidingWrapper) Subscriptions(prefixes ...string) map[string]subscriptions.SubscriptionOptions {
	all := w.Client.Subscriptions(prefixes...)
	for key := range all {
		if strings.HasPrefix(key, "muted") {
			delete(all, key)
		}
	}
	return all
}

func TestWrapperHidesSubscriptions(t *testing.T) {
	w := newWorld(t)
	wrapClients(w, func(client subscriptions.Client) subscriptions.Client { return hidingWrapper{client} })
	client := pbtest.Serve(t, w).Subscribe(t, nil, "muted/1", "example")
	mustSend(t, w, "muted/1", 1)
	mustSend(t, w, "example", 2)
	client.Expect(t, "example", "2")
}

// lateWrapper passes a message on when release is closed.
type lateWrapper struct {
	subscriptions.Client
	holding, release chan struct{}
}

func (w lateWrapper) Send(m subscriptions.Message) {
	if m.Name == "example" {
		go func() { w.holding <- struct{}{}; <-w.release; w.Client.Send(m) }()
		return
	}
	w.Client.Send(m)
}

// TestWrapperSendsLate: what a wrapper has taken for a user must not reach the guest that the
// connection is by the time it passes it on.
func TestWrapperSendsLate(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, w *world, client *pbtest.Subscriber){
		"sign-out": func(t *testing.T, _ *world, client *pbtest.Subscriber) { client.Try(t, nil, "example", "fence") },
		"revoked": func(t *testing.T, w *world, _ *pbtest.Subscriber) {
			w.ann.RefreshTokenKey()
			save(t, w, w.ann)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			holding, release := make(chan struct{}), make(chan struct{})
			wrapClients(w, func(client subscriptions.Client) subscriptions.Client { return lateWrapper{client, holding, release} })
			client := pbtest.Serve(t, w).Subscribe(t, w.ann, "example", "fence")
			send(t, w, notify.Message{Topic: "example", Data: "for ann", To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}})
			<-holding
			end(t, w, client)
			awaitReason(t, w, notify.DisconnectAuthEnded)
			close(release)
			if got := client.ExpectEnd(t); len(got) > 0 {
				t.Errorf("got %v", got)
			}
		})
	}
}

// TestEndedBeforeItIsServed: a handler ends the client and goes on.
func TestEndedBeforeItIsServed(t *testing.T) {
	for name, wrap := range map[string]func(subscriptions.Client) subscriptions.Client{
		"plain":       func(client subscriptions.Client) subscriptions.Client { return client },
		"wrapped":     func(client subscriptions.Client) subscriptions.Client { return &wrapper{client} },
		"own channel": func(client subscriptions.Client) subscriptions.Client { return &channelWrapper{Client: client} },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			wrapClients(w, func(client subscriptions.Client) subscriptions.Client {
				client.Discard()
				<-client.(*notify.Client).Done()
				return wrap(client)
			})
			server := pbtest.Serve(t, w)
			response, err := server.Client().Get(server.URL + "/api/realtime")
			if err == nil {
				_, _ = io.Copy(io.Discard, response.Body) // it ends
				response.Body.Close()
			}
			pbtest.WaitFor(t, "nothing is left in the broker", func() bool { return w.SubscriptionsBroker().TotalClients() == 0 })
		})
	}
}

type panicsAtEnd struct{ subscriptions.Client }

func (panicsAtEnd) Discard() { panic("test") }

func TestWrapperPanicsAtTheEnd(t *testing.T) {
	w := newWorld(t)
	wrapClients(w, func(client subscriptions.Client) subscriptions.Client { return panicsAtEnd{client} })
	client := pbtest.Serve(t, w).Subscribe(t, nil, "example")
	registered, err := w.SubscriptionsBroker().ClientById(client.ID)
	if err != nil {
		t.Fatal(err)
	}
	own, _ := engine(w).Own(registered)
	own.Close(notify.DisconnectRequested)
	client.ExpectEnd(t)
	awaitReason(t, w, notify.DisconnectRequested)
}

// TestWrappedQueueIsBounded: a wrapped client that does not read has as much waiting as
// another one, and not more.
func TestWrappedQueueIsBounded(t *testing.T) {
	w := newWorld(t)
	wrapClients(w, func(client subscriptions.Client) subscriptions.Client { return &wrapper{client} })
	server := pbtest.Serve(t, w)
	id := stall(t, server, nil, "flood")
	registered, err := w.SubscriptionsBroker().ClientById(id)
	if err != nil {
		t.Fatal(err)
	}
	own, _ := engine(w).Own(registered)
	fill(t, server, notify.Message{Topic: "flood", Data: strings.Repeat("x", 200<<10)})
	message := notify.Message{Topic: "flood", Data: "x"}
	for range 100_000 {
		if report := send(t, w, message); report.Queued == 0 {
			awaitReason(t, w, notify.DisconnectQueueFull)
			return
		}
		if waiting := own.Queued(); waiting > 2*notify.DefaultQueueSize {
			t.Fatalf("%d messages wait", waiting)
		}
	}
	t.Fatal("it has no end")
}

// forgetfulClient keeps nothing in its store but what PocketBase puts there.
type forgetfulClient struct{ *subscriptions.DefaultClient }

func (c forgetfulClient) Set(key string, value any) {
	if key == apis.RealtimeClientAuthKey || key == apis.RealtimeClientIPKey {
		c.DefaultClient.Set(key, value)
	}
}

func replaceByForgetful(client subscriptions.Client) subscriptions.Client {
	other := forgetfulClient{subscriptions.NewDefaultClient()}
	other.Set(apis.RealtimeClientIPKey, client.Get(apis.RealtimeClientIPKey))
	return other
}

// TestReplacedClientsRights closes a channel at the worst moments: a client that has nothing
// to do with Herald's gets nothing of it after that.
func TestReplacedClientsRights(t *testing.T) {
	setUp := func(t *testing.T) (w *world, channel *core.Record, closeIt func()) {
		w = newWorld(t)
		wrapClients(w, replaceByForgetful)
		channel = addChannel(t, w, map[string]any{"pattern": "chat/{room}", "subscribeRule": "*"})
		return w, channel, func() {
			channel.Set("subscribeRule", "")
			if err := w.Save(channel); err != nil {
				t.Error(err)
			}
		}
	}
	expectNothing := func(t *testing.T, w *world, client *pbtest.Subscriber) {
		t.Helper()
		mustSend(t, w, "chat/1", "secret")
		mustSend(t, w, "fence", 1)
		client.Expect(t, "fence", "1")
	}
	onSubscribe := func(w *world, f func(e *core.RealtimeSubscribeRequestEvent) error) {
		w.OnRealtimeSubscribeRequest().Bind(&hook.Handler[*core.RealtimeSubscribeRequestEvent]{Priority: 1000, Func: f})
	}

	t.Run("while it is subscribed", func(t *testing.T) {
		w, _, closeIt := setUp(t)
		client := pbtest.Serve(t, w).Subscribe(t, nil, "chat/1", "fence")
		closeIt()
		expectNothing(t, w, client)
	})
	t.Run("between the decision and the subscription", func(t *testing.T) {
		w, _, closeIt := setUp(t)
		var once atomic.Bool
		onSubscribe(w, func(e *core.RealtimeSubscribeRequestEvent) error {
			if once.Swap(true) {
				return e.Next()
			}
			closeIt()
			err := e.Next()
			mustSend(t, w, "chat/1", "secret")
			return err
		})
		client := pbtest.Serve(t, w).Subscribe(t, nil, "chat/1", "fence")
		expectNothing(t, w, client)
	})
	t.Run("after two requests at once", func(t *testing.T) {
		w, _, closeIt := setUp(t)
		first, second := make(chan struct{}), make(chan struct{})
		onSubscribe(w, func(e *core.RealtimeSubscribeRequestEvent) error {
			if slices.Contains(e.Subscriptions, "chat/1") {
				return e.Next()
			}
			err := e.Next() // the first one is slow to end
			close(first)
			<-second
			return err
		})
		client := pbtest.Serve(t, w).Connect(t)
		ended := make(chan struct{}, 2)
		go func() { client.Try(t, nil, "fence"); ended <- struct{}{} }()
		<-first
		go func() { client.Try(t, nil, "chat/1", "fence"); ended <- struct{}{} }()
		close(second)
		<-ended
		<-ended
		closeIt()
		expectNothing(t, w, client)
	})
}

// failingClient panics where it is asked whether it has ended.
type failingClient struct {
	*subscriptions.DefaultClient
	fails *atomic.Bool
}

func (c failingClient) IsDiscarded() bool {
	if c.fails.Load() {
		panic("test")
	}
	return c.DefaultClient.IsDiscarded()
}

func TestForeignClientPanics(t *testing.T) {
	w := newWorld(t)
	var fails atomic.Bool
	server := pbtest.Serve(t, w)
	w.SubscriptionsBroker().Register(failingClient{subscriptions.NewDefaultClient(), &fails})
	client := server.Subscribe(t, nil, "example")
	mustSend(t, w, "example", 1)
	fails.Store(true)
	engine(w).ChangeOfAll().End(true) // checks everybody, on another goroutine
	if _, err := engine(w).Recheck(notify.RecheckFilter{Topic: "example"}); err != nil {
		t.Fatal(err)
	}
	mustSend(t, w, "example", 2)
	client.Expect(t, "example", "1")
	client.Expect(t, "example", "2")
	fails.Store(false)
}

// TestGuestForgetsOwnIDs: a guest whose messages all differ has a limit of ids, too, and
// makes the server forget nobody else's.
func TestGuestForgetsOwnIDs(t *testing.T) {
	w := newWorld(t)
	client := pbtest.Serve(t, w).Subscribe(t, nil, "jobs")
	job := notify.Message{Topic: "jobs", Data: 1, ID: "job"}
	first := send(t, w, job)
	for i := range 100_001 {
		message := notify.Message{Topic: "chat/1", Data: i, ID: fmt.Sprint(i)}
		if _, err := engine(w).SendFrom(t.Context(), notify.Publisher{IP: "1.2.3.4"}, message); err != nil {
			t.Fatal(err)
		}
	}
	if again := send(t, w, job); again != first {
		t.Errorf("sent again: %+v", again)
	}
	mustSend(t, w, "jobs", "last")
	client.Expect(t, "jobs", "1")
	client.Expect(t, "jobs", `"last"`)
}

// TestWrappedClient has a handler that puts a client of its own around ours.
func TestWrappedClient(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	seen := 0
	w.OnRealtimeConnectRequest().BindFunc(func(e *core.RealtimeConnectRequestEvent) error {
		e.Client = &counting{Client: e.Client, count: func() { mu.Lock(); seen++; mu.Unlock() }}
		return e.Next()
	})
	server := pbtest.Serve(t, w)
	subscriber := server.Subscribe(t, nil, "example")
	for i := range 10 {
		if report := send(t, w, notify.Message{Topic: "example", Data: i}); report.Queued != 1 {
			t.Fatalf("report %+v", report)
		}
	}
	for i := range 10 {
		subscriber.Expect(t, "example", fmt.Sprint(i))
	}
	mu.Lock()
	defer mu.Unlock()
	if seen != 10 {
		t.Errorf("the wrapper saw %d messages", seen)
	}
}

type counting struct {
	subscriptions.Client
	count func()
}

func (c *counting) Send(m subscriptions.Message) { c.count(); c.Client.Send(m) }

// panickingWrapper is a client of the application's own that fails.
type panickingWrapper struct{ subscriptions.Client }

func (w panickingWrapper) Send(m subscriptions.Message) {
	if string(m.Data) == "1" {
		panic("test")
	}
	w.Client.Send(m)
}

// A panic of other code costs the message that it is about, and nothing after it.
func TestPanicInAWrapper(t *testing.T) {
	w := newWorld(t)
	wrapClients(w, func(client subscriptions.Client) subscriptions.Client { return panickingWrapper{client} })
	server := pbtest.Serve(t, w)
	subscriber := server.Subscribe(t, nil, "example")
	for i := range 3 {
		mustSend(t, w, "example", i)
	}
	subscriber.Expect(t, "example", "0")
	subscriber.Expect(t, "example", "2")
}
