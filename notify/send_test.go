package notify_test

import (
	"context"
	"encoding/json/jsontext"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
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
	n := notify.New(app, notify.Config{QueueSize: senders * messages})
	topics := []string{"a", "b"}

	clients := map[string][]*notify.Client{}
	for i := range subscribers {
		topic := topics[i%len(topics)]
		clients[topic] = append(clients[topic], connect(app, nil, topic))
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
	n := notify.New(app, notify.Config{QueueSize: 3, QueueBytes: 100})
	ended := make(chan struct{}, 2)
	stalled := n.NewClient(subscriptions.NewDefaultClient(), func() { ended <- struct{}{} })
	stalled.Subscribe("t")
	stalled.Register(stalled)
	healthy := connect(app, nil, "t")

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
		if got := received(healthy); len(got) != 1 || string(got[0].Data) != strconv.Itoa(i) {
			t.Errorf("the healthy client got %v", got)
		}
	}

	<-stalled.Done()
	<-ended
	if !stalled.IsDiscarded() {
		t.Error("the stalled client is not discarded")
	}
	stalled.Close(notify.DisconnectLeft)
	stalled.Discard()
	stalled.Send(subscriptions.Message{Name: "t"})
	if len(ended) != 0 {
		t.Error("ended twice")
	}
	if _, err := app.SubscriptionsBroker().ClientById(stalled.Id()); err == nil {
		t.Error("it is still registered")
	}
	stats := n.Stats()
	if stats.Disconnects[notify.DisconnectQueueFull.Reason] != 1 || stats.Dropped != 4 || stats.Messages != 6 || stats.Deliveries != 9 {
		t.Errorf("stats %+v", stats)
	}

	t.Run("by bytes", func(t *testing.T) {
		large := jsontext.Value(`"` + strings.Repeat("x", 90) + `"`)
		client := connect(app, nil, "large")
		for i, want := range []int{1, 0} { // one is taken whatever its size
			report, err := n.Send(t.Context(), notify.Message{Topic: "large", Data: large})
			if err != nil || report.Queued != want {
				t.Errorf("message %d: report %+v, error %v", i, report, err)
			}
		}
		<-client.Done()
	})
}

// TestChannel is about a loop of other code that reads a client's channel, as
// PocketBase's own does.
func TestChannel(t *testing.T) {
	app := pbtest.NewApp(t)
	client := connect(app, nil, "t")
	for i := range 3 {
		if err := notify.Notify(app, "t", i); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		if message := <-client.Channel(); message.Name != "t" || string(message.Data) != strconv.Itoa(i) {
			t.Errorf("got %v", message)
		}
	}
	go func() { _ = notify.Notify(app, "t", 3) }()
	if message := <-client.Channel(); string(message.Data) != "3" {
		t.Errorf("got %v", message)
	}
	app.SubscriptionsBroker().Unregister(client.Id())
	if _, open := <-client.Channel(); open {
		t.Error("the channel of a client that is gone is open")
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
		good := connect(app, nil, "t")
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
	client := connect(app, nil, "t")
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
