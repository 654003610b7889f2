package notify_test

import (
	"encoding/json/v2"
	"fmt"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
	"golang.org/x/sync/errgroup"

	"herald/internal/pbtest"
	"herald/notify"
)

var benchData = map[string]any{"text": "about one hundred bytes of data, which is what a chat message or a progress report has", "n": 1}

// BenchmarkSend measures what a send costs its sender, up to the queues, against
// what PocketBase's documentation suggests for it ("Realtime messaging"), in the
// same run and taking turns: to all of N connections, and to one among them.
// Nothing is written to a socket: that is what make bench measures. x-snippet is
// the time of a send divided by the snippet's.
func BenchmarkSend(b *testing.B) {
	for _, connections := range []int{100, 1000, 10_000} {
		for _, subscribers := range []int{connections, 1} {
			b.Run(fmt.Sprintf("%d of %d", subscribers, connections), func(b *testing.B) {
				own, stock := pbtest.NewApp(b), pbtest.NewApp(b)
				n := notify.New(own, notify.Config{})
				var clients []*notify.Client
				for i := range connections {
					topic := "other"
					if i < subscribers {
						topic = "example"
					}
					client := connect(own, nil, topic)
					if i < subscribers {
						clients = append(clients, client)
					}
					read(b, stock, subscriptions.NewDefaultClient(), topic)
				}

				var ownTime, stockTime time.Duration
				b.ReportAllocs()
				for b.Loop() {
					start := time.Now()
					if err := snippet(stock, "example", benchData); err != nil {
						b.Fatal(err)
					}
					middle := time.Now()
					report, err := n.Send(b.Context(), notify.Message{Topic: "example", Data: benchData})
					ownTime += time.Since(middle)
					if err != nil || report.Queued != subscribers {
						b.Fatalf("report %+v, error %v", report, err)
					}
					stockTime += middle.Sub(start)
					for _, client := range clients {
						client.DropQueued()
					}
				}
				b.ReportMetric(float64(ownTime.Nanoseconds())/float64(b.N), "ns/send")
				b.ReportMetric(float64(stockTime.Nanoseconds())/float64(b.N), "ns/snippet")
				b.ReportMetric(float64(ownTime)/float64(stockTime), "x-snippet")
			})
		}
	}
}

// TestAllocations counts what a send allocates: it must not depend on how many
// get the message, nor on who they are.
func TestAllocations(t *testing.T) {
	app := pbtest.NewApp(t)
	n := notify.New(app, notify.Config{})
	ann := pbtest.AddAuth(t, app, "users", "ann@x.com", nil)
	var clients []*notify.Client
	allocations := func(to notify.Audience) float64 {
		return testing.AllocsPerRun(20, func() {
			if _, err := n.Send(t.Context(), notify.Message{Topic: "t", Data: benchData, To: to}); err != nil {
				t.Fatal(err)
			}
			for _, client := range clients {
				client.DropQueued()
			}
		})
	}
	for name, to := range map[string]notify.Audience{"everybody": {}, "users": {Auth: notify.AuthUser}} {
		clients = append(clients, connect(app, ann, "t"))
		few := allocations(to)
		for range 500 {
			clients = append(clients, connect(app, ann, "t"))
		}
		if many := allocations(to); many > few+2 { // the runtime's own, now and then
			t.Errorf("%s: %v allocations with 500 more recipients, %v before", name, many, few)
		}
	}
}

func read(b *testing.B, app core.App, client subscriptions.Client, topic string) {
	client.Subscribe(topic)
	app.SubscriptionsBroker().Register(client)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range client.Channel() {
		}
	}()
	b.Cleanup(func() {
		app.SubscriptionsBroker().Unregister(client.Id())
		<-done
	})
}

// snippet does what the documentation's does: every connection is looked at,
// and each send waits until its subscriber takes it.
func snippet(app core.App, topic string, data any) error {
	encoded, err := json.Marshal(data)
	if err != nil {
		return err
	}
	group := new(errgroup.Group)
	for _, chunk := range app.SubscriptionsBroker().ChunkedClients(300) {
		group.Go(func() error {
			for _, client := range chunk {
				if client.HasSubscription(topic) {
					client.Send(subscriptions.Message{Name: topic, Data: encoded})
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// BenchmarkSubscribe replaces the subscriptions of a client as a request does, with many
// keys: what ours costs times what PocketBase's own client does ("x-stock").
func BenchmarkSubscribe(b *testing.B) {
	app := pbtest.NewApp(b)
	n := notify.New(app, notify.Config{})
	keys := make([]string, 1000)
	for i := range keys {
		keys[i] = fmt.Sprint("topic/", i)
	}
	replace := func(client subscriptions.Client) func() error {
		return func() error {
			client.Unsubscribe()
			client.Subscribe(keys...)
			return nil
		}
	}
	client, stock := connect(app, nil), subscriptions.NewDefaultClient()
	var ours, theirs time.Duration
	for b.Loop() {
		began := time.Now()
		admission, err := n.Admit(b.Context(), client, nil, keys)
		if err == nil {
			err = client.Resubscribe(admission, nil, replace(client))
		}
		if err != nil {
			b.Fatal(err)
		}
		ours += time.Since(began)

		began = time.Now()
		_ = replace(stock)()
		theirs += time.Since(began)
	}
	b.ReportMetric(float64(ours)/float64(theirs), "x-stock")
}
