package hooks_test

import (
	"bufio"
	"context"
	"encoding/json/jsontext"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

// open starts a realtime request and reads up to the client's id; what follows
// is read from lines, or not at all.
func open(t *testing.T, server *pbtest.Server) (clientID string, lines *bufio.Scanner) {
	t.Helper()
	client := *server.Client()
	transport := client.Transport.(*http.Transport).Clone()
	transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err == nil {
			err = conn.(*net.TCPConn).SetReadBuffer(128 << 10) // little waits in the kernel, where no queue counts it
		}
		return conn, err
	}
	client.Transport = transport
	t.Cleanup(transport.CloseIdleConnections)
	response, err := client.Get(server.URL + "/api/realtime")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { response.Body.Close() })
	lines = bufio.NewScanner(response.Body)
	for lines.Scan() {
		if id, ok := strings.CutPrefix(lines.Text(), "id:"); ok {
			return id, lines
		}
	}
	t.Fatal("no PB_CONNECT")
	return "", nil
}

// stall subscribes to topic over a connection that nobody reads after that.
func stall(t *testing.T, server *pbtest.Server, auth *core.Record, topic string) (clientID string) {
	t.Helper()
	clientID, _ = openOn(t, server, auth, topic)
	return clientID
}

// openOn opens a connection, of which lines are what it gets, and subscribes to key.
func openOn(t *testing.T, server *pbtest.Server, auth *core.Record, key string) (clientID string, lines *bufio.Scanner) {
	t.Helper()
	clientID, lines = open(t, server)
	status, answer := server.Do(t, "POST", "/api/realtime", pbtest.Token(t, auth), map[string]any{"clientId": clientID, "subscriptions": []string{key}})
	if status != http.StatusNoContent {
		t.Fatalf("subscribe: %d %v", status, answer)
	}
	return clientID, lines
}

// sendUntilDropped sends large messages until one of the connections is dropped
// and returns how many went out. It calls sent after each: a sender that nothing
// slows down fills the queue of a stream that the server itself has not come to
// write yet.
func sendUntilDropped(t *testing.T, app core.App, topic string, sent func()) int {
	t.Helper()
	data := jsontext.Value(`"` + strings.Repeat("x", 200<<10) + `"`)
	matched := 0
	for i := 1; i < 2000; i++ {
		report, err := notify.New(app, notify.Config{}).Send(t.Context(), notify.Message{Topic: topic, Data: data})
		if err != nil {
			t.Fatal(err)
		}
		sent()
		if report.Dropped > 0 || report.Matched < matched { // an edge drops it later
			return i
		}
		matched = report.Matched
	}
	t.Fatal("the stalled connection was never dropped")
	return 0
}

func waitGone(t *testing.T, app core.App, clientID string) {
	t.Helper()
	pbtest.WaitFor(t, "the stalled connection's handler returns", func() bool {
		_, err := app.SubscriptionsBroker().ClientById(clientID)
		return err != nil
	})
}

func TestStalledSubscriber(t *testing.T) {
	t.Parallel() // it waits most of the time
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		server := serve(t, w)
		stalled := stall(t, server, nil, "flood")
		healthy := server.Subscribe(t, nil, "flood")

		// the healthy one reads along: it has to get every message
		received := 0
		sent := sendUntilDropped(t, w, "flood", func() {
			if event := healthy.Next(t); event.Type == "flood" && event.Data != "null" {
				received++
			}
		})
		waitGone(t, w, stalled)
		if err := notify.Notify(w, "flood", nil); err != nil {
			t.Fatal(err)
		}
		healthy.Expect(t, "flood", "null")
		if received != sent {
			t.Errorf("the healthy subscriber got %d of %d messages", received, sent)
		}
		awaitReason(t, w, notify.DisconnectQueueFull)
		stats := engine(w).Stats()
		if stats.Disconnects[notify.DisconnectQueueFull.Reason] != 1 || stats.Dropped == 0 {
			t.Errorf("stats %+v", stats)
		}
		// its end does not disturb the others, which HTTP/2 has on one connection
		if status, _ := server.Do(t, "GET", "/api/health", "", nil); status != http.StatusOK {
			t.Errorf("status %d", status)
		}
	})
}

// TestOrderOnTheWire lets senders send over HTTP at once: every subscriber has
// to receive everything, in one order.
func TestOrderOnTheWire(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		const senders, messages, subscribers = 4, 50, 5
		server := serve(t, w)
		token := pbtest.Token(t, w.root)
		var connections []*pbtest.Subscriber
		for range subscribers {
			connections = append(connections, server.Subscribe(t, nil, "example"))
		}

		var group sync.WaitGroup
		for sender := range senders {
			group.Go(func() {
				for i := range messages {
					status, answer := server.Do(t, "POST", "/api/notify", token,
						fmt.Sprintf(`{"topic":"example","data":"%d:%d"}`, sender, i))
					if status != http.StatusOK {
						t.Errorf("%d %v", status, answer)
					}
				}
			})
		}
		group.Wait()

		for i := range senders * messages {
			first := connections[0].Next(t).Data
			for _, other := range connections[1:] {
				if got := other.Next(t).Data; got != first {
					t.Fatalf("message %d is %s for one and %s for another subscriber", i, first, got)
				}
			}
		}
	})
}

// TestResubscribing changes a client's subscriptions again and again, as the SDK
// does with each topic that is added (it sends all of them each time), while
// messages are sent: what it was and stays subscribed to must lose none.
func TestResubscribing(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		const messages = 2000
		server := serve(t, w)
		subscriber := server.Subscribe(t, nil, "example")

		lost := make(chan int, 1)
		go func() {
			n, count := notify.New(w, notify.Config{}), 0
			for i := range messages {
				report, err := n.Send(t.Context(), notify.Message{Topic: "example", Data: i})
				if err != nil || report.Queued != 1 {
					count++
					continue
				}
				<-subscriber.Events() // one at a time, so that the queue does not fill
			}
			lost <- count
		}()
		for i := 0; ; i++ {
			select {
			case count := <-lost:
				if count > 0 {
					t.Errorf("%d of %d messages were lost", count, messages)
				}
				return
			default:
				subscriber.Set(t, nil, "example", fmt.Sprint("other", i%3))
			}
		}
	})
}

// TestOtherHandlers checks that handlers of the application keep their meaning.
func TestOtherHandlers(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		var seen core.RealtimeConnectRequestEvent
		left := make(chan string, 1)
		w.OnRealtimeConnectRequest().BindFunc(func(e *core.RealtimeConnectRequestEvent) error {
			seen = *e
			e.Client.Set("mine", 1)
			err := e.Next()
			left <- e.Client.Id()
			return err
		})
		w.OnRealtimeMessageSend().BindFunc(func(e *core.RealtimeMessageEvent) error {
			if e.Message.Name == "example" {
				e.Message.Data = []byte(`"changed"`)
			}
			return e.Next()
		})
		server := serve(t, w)

		subscriber := server.Subscribe(t, w.ann, "example")
		if seen.Client.Id() != subscriber.ID || seen.IdleTimeout == 0 || seen.MaxTimeout == 0 {
			t.Errorf("the handler saw %+v", seen)
		}
		client, err := w.SubscriptionsBroker().ClientById(subscriber.ID)
		if err != nil || client.Get("mine") != 1 {
			t.Errorf("what the handler set is lost (error %v)", err)
		}
		if err := notify.Notify(w, "example", 1); err != nil {
			t.Fatal(err)
		}
		subscriber.Expect(t, "example", `"changed"`)

		if len(left) != 0 {
			t.Error("the handler returned while the client is there")
		}
		subscriber.Close(t)
		if id := <-left; id != subscriber.ID {
			t.Errorf("client %q left", id)
		}
	})
}

// TestStockRealtime checks what PocketBase does over the same connections.
func TestStockRealtime(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, serve func(testing.TB, core.App) *pbtest.Server) {
		server := serve(t, w)

		t.Run("record events", func(t *testing.T) {
			subscriber := server.Subscribe(t, w.ann, "users/"+w.ann.Id)
			stranger := server.Subscribe(t, w.bob, "users/"+w.ann.Id, "fence")
			w.ann.Set("name", "Anna")
			if err := w.Save(w.ann); err != nil {
				t.Fatal(err)
			}
			event := subscriber.Next(t)
			if event.Type != "users/"+w.ann.Id || !strings.Contains(event.Data, `"Anna"`) || !strings.Contains(event.Data, `"action":"update"`) {
				t.Errorf("got %v", event)
			}
			if err := notify.Notify(w, "fence", 1); err != nil {
				t.Fatal(err)
			}
			stranger.Expect(t, "fence", "1")
		})

		t.Run("a guest becomes a user", func(t *testing.T) {
			subscriber := server.Subscribe(t, nil, "example")
			subscriber.Set(t, w.ann, "example")
			n := notify.New(w, notify.Config{})
			if _, err := n.Send(t.Context(), notify.Message{Topic: "example", Data: 1, To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}}); err != nil {
				t.Fatal(err)
			}
			subscriber.Expect(t, "example", "1")
		})

		t.Run("a new password makes a guest of a user", func(t *testing.T) {
			subscriber := server.Subscribe(t, w.bob, "example", "fence")
			w.bob.SetPassword("0987654321")
			if err := w.Save(w.bob); err != nil {
				t.Fatal(err)
			}
			n := notify.New(w, notify.Config{})
			report, err := n.Send(t.Context(), notify.Message{Topic: "example", Data: 1, To: notify.Audience{Users: []string{pbtest.Ref(w.bob)}}})
			if err != nil || report.Matched != 0 {
				t.Errorf("report %+v, error %v", report, err)
			}
			if err := notify.Notify(w, "fence", 1); err != nil {
				t.Fatal(err)
			}
			subscriber.Expect(t, "fence", "1")
		})
	})
}

// TestIdleTimeoutOfOthers: a client that the application puts in the place of ours gets no heartbeats, which would find
// one that has left. So PocketBase's own limit holds, unless a handler has set one.
func TestIdleTimeoutOfOthers(t *testing.T) {
	for name, c := range map[string]struct{ set, want time.Duration }{
		"PocketBase's":   {0, 5 * time.Minute},
		"of the handler": {7 * time.Minute, 7 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			w := replaced.newWorld(t)
			ended := make(chan time.Duration, 1)
			w.OnRealtimeConnectRequest().BindFunc(func(e *core.RealtimeConnectRequestEvent) error {
				if c.set > 0 {
					e.IdleTimeout = c.set
				}
				err := e.Next()
				ended <- e.IdleTimeout
				return err
			})
			pbtest.Serve(t, w).Subscribe(t, nil, "example").Close(t)
			if got := <-ended; got != c.want {
				t.Errorf("the connection ends %v after the last message; want %v", got, c.want)
			}
		})
	}
}
