package pbtest

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/tmaxmax/go-sse"
)

// Subscriber is a realtime connection.
type Subscriber struct {
	ID     string // the client id
	server *Server
	events chan sse.Event // closed at the end of the connection
	cancel context.CancelFunc
}

// Connect opens a realtime connection.
func (s *Server) Connect(t testing.TB) *Subscriber {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL+"/api/realtime", nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := s.Client().Do(request)
	if err != nil {
		t.Fatal(err)
	}
	subscriber := &Subscriber{server: s, events: make(chan sse.Event, 10_000), cancel: cancel}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(subscriber.events)
		defer response.Body.Close()
		for event, err := range sse.Read(response.Body, &sse.ReadConfig{MaxEventSize: 4 << 20}) {
			if err != nil {
				return
			}
			subscriber.events <- event
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	subscriber.ID = subscriber.Next(t).LastEventID
	return subscriber
}

// Subscribe connects and subscribes to keys as auth (nil: a guest).
func (s *Server) Subscribe(t testing.TB, auth *core.Record, keys ...string) *Subscriber {
	t.Helper()
	subscriber := s.Connect(t)
	subscriber.Set(t, auth, keys...)
	return subscriber
}

// Set replaces the subscriptions of the connection, as the SDK does.
func (s *Subscriber) Set(t testing.TB, auth *core.Record, keys ...string) {
	t.Helper()
	if status, answer := s.Try(t, auth, keys...); status != http.StatusNoContent {
		t.Fatalf("subscribe: %d %v", status, answer)
	}
}

// Try is Set that returns the answer.
func (s *Subscriber) Try(t testing.TB, auth *core.Record, keys ...string) (int, any) {
	t.Helper()
	return s.server.Do(t, http.MethodPost, "/api/realtime", Token(t, auth),
		map[string]any{"clientId": s.ID, "subscriptions": keys})
}

// Close ends the connection from the client's side and waits until the server
// has noticed.
func (s *Subscriber) Close(t testing.TB) {
	t.Helper()
	s.cancel()
	WaitFor(t, "the server notices that the client is gone", func() bool {
		_, err := s.server.App.SubscriptionsBroker().ClientById(s.ID)
		return err != nil
	})
}

// Next waits for the next event.
func (s *Subscriber) Next(t testing.TB) sse.Event {
	t.Helper()
	select {
	case event, ok := <-s.events:
		if !ok {
			t.Fatal("the connection ended")
		}
		return event
	case <-time.After(Timeout):
		t.Fatal("no event came")
	}
	panic("unreachable")
}

// Expect waits for the next event and checks its name and data.
func (s *Subscriber) Expect(t testing.TB, name, data string) {
	t.Helper()
	event := s.Next(t)
	if event.Type != name || event.Data != data {
		t.Fatalf("got event %q with data %s, want %q with %s", event.Type, event.Data, name, data)
	}
}

// ExpectEnd waits for the end of the connection and returns what came before.
func (s *Subscriber) ExpectEnd(t testing.TB) []sse.Event {
	t.Helper()
	var events []sse.Event
	for {
		select {
		case event, ok := <-s.events:
			if !ok {
				return events
			}
			events = append(events, event)
		case <-time.After(Timeout):
			t.Fatal("the connection did not end")
		}
	}
}

// Events are all further events; closed at the end of the connection.
func (s *Subscriber) Events() <-chan sse.Event { return s.events }
