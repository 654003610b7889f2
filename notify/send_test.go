package notify_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/internal/pbtest"
	"herald/notify"
)

// TestOrder lets many senders send to a few topics and checks that the
// subscribers of a topic all saw one order, in which each sender's messages are
// in the order they were sent.
func TestOrder(t *testing.T) {
	const senders, messages, subscribers = 8, 200, 40
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{ChunkSize: 7})
	topics := []string{"a", "b"}

	clients := map[string][]subscriptions.Client{}
	for i := range subscribers {
		topic := topics[i%len(topics)]
		var client subscriptions.Client = connect(app, nil, senders*messages, topic)
		clients[topic] = append(clients[topic], client)
	}

	var group sync.WaitGroup
	for sender := range senders {
		group.Go(func() {
			for i := range messages {
				for _, topic := range topics {
					if _, err := n.Send(t.Context(), notify.Message{Topic: topic, Data: fmt.Sprintf("%d:%d", sender, i)}); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	group.Wait()

	for topic, clients := range clients {
		var first []string
		for _, client := range clients {
			var order []string
			for _, message := range received(client) {
				order = append(order, string(message.Data))
			}
			if first == nil {
				first = order
				checkSenders(t, order, senders, messages)
			}
			if !slices.Equal(first, order) {
				t.Fatalf("two subscribers of %q saw different orders", topic)
			}
		}
	}
}

func checkSenders(t *testing.T, order []string, senders, messages int) {
	t.Helper()
	if len(order) != senders*messages {
		t.Fatalf("%d messages arrived, want %d", len(order), senders*messages)
	}
	next := make([]int, senders)
	for _, data := range order {
		var sender, i int
		if _, err := fmt.Sscanf(data, `"%d:%d"`, &sender, &i); err != nil {
			t.Fatal(err)
		}
		if i != next[sender] {
			t.Fatalf("message %d of sender %d came when %d was due", i, sender, next[sender])
		}
		next[sender]++
	}
}

func TestOverflow(t *testing.T) {
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{})
	closed := make(chan string, 2)
	stalled := notify.NewClient(subscriptions.NewDefaultClient(), 3, func(reason string) { closed <- reason })
	stalled.Subscribe("t")
	app.SubscriptionsBroker().Register(stalled)
	healthy := connect(app, nil, 8, "t")

	for i := range 6 {
		report, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: i})
		if err != nil {
			t.Fatal(err)
		}
		want := notify.Report{ID: report.ID, Topic: "t", Matched: 2, Queued: 2}
		switch {
		case i == 3:
			want.Queued, want.Dropped = 1, 1
		case i > 3: // it is gone
			want.Matched, want.Queued = 1, 1
		}
		if report != want {
			t.Errorf("message %d: report %+v, want %+v", i, report, want)
		}
	}

	if reason := <-closed; reason != notify.ReasonQueueFull {
		t.Errorf("closed for %q", reason)
	}
	if !stalled.IsDiscarded() {
		t.Error("the stalled client is not discarded")
	}
	stalled.Close("again")
	stalled.Discard()
	stalled.Send(subscriptions.Message{Name: "t"})
	if len(closed) != 0 {
		t.Error("closed twice")
	}
	var got []string
	for message := range stalled.Channel() { // it is closed
		got = append(got, string(message.Data))
	}
	if !slices.Equal(got, []string{"0", "1", "2"}) {
		t.Errorf("the stalled client got %v: not the first ones without a hole", got)
	}
	if got := received(healthy); len(got) != 6 {
		t.Errorf("the healthy client got %d messages, want 6", len(got))
	}
}

// TestForeignClients is about clients that other code registers in the broker.
// The Send of PocketBase's own DefaultClient waits for a reader.
func TestForeignClients(t *testing.T) {
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{QueueSize: 16})

	t.Run("gets its messages in order", func(t *testing.T) {
		client := subscriptions.NewDefaultClient()
		client.Subscribe("t")
		app.SubscriptionsBroker().Register(client)
		defer app.SubscriptionsBroker().Unregister(client.Id())
		for i := range 10 {
			if report, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: i}); err != nil || report.Queued != 1 {
				t.Fatalf("report %+v, error %v", report, err)
			}
		}
		for i := range 10 {
			if message := <-client.Channel(); string(message.Data) != strconv.Itoa(i) {
				t.Fatalf("got %s, want %d", message.Data, i)
			}
		}
	})

	t.Run("that nobody reads is removed", func(t *testing.T) {
		client := subscriptions.NewDefaultClient()
		client.Subscribe("t")
		app.SubscriptionsBroker().Register(client)
		dropped := false
		for i := 0; i < 100 && !dropped; i++ {
			report, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: i})
			if err != nil {
				t.Fatal(err)
			}
			dropped = report.Dropped == 1
		}
		if !dropped {
			t.Fatal("the queue has no bound")
		}
		pbtest.WaitFor(t, "the client is removed", client.IsDiscarded)
	})

	t.Run("that panics costs the others nothing", func(t *testing.T) {
		bad := &panicking{subscriptions.NewDefaultClient()}
		bad.Subscribe("t")
		app.SubscriptionsBroker().Register(bad)
		defer app.SubscriptionsBroker().Unregister(bad.Id())
		good := connect(app, nil, 8, "t")
		for range 2 {
			if _, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: 1}); err != nil {
				t.Fatal(err)
			}
		}
		if len(received(good)) != 2 {
			t.Error("the other client did not get both messages")
		}
	})
}

type panicking struct{ *subscriptions.DefaultClient }

func (*panicking) Send(subscriptions.Message) { panic("test") }

func TestCancelledContext(t *testing.T) {
	app := pbtest.NewApp(t)
	client := connect(app, nil, 8, "t")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, message := range []notify.Message{
		{Topic: "t", Data: 1},
		{Topic: "t", Data: 1, To: notify.Audience{Filter: "id != ''"}},
	} {
		if _, err := notify.New(app, notify.Config{}).Send(ctx, message); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	}
	if len(received(client)) != 0 {
		t.Error("sent all the same")
	}
}
