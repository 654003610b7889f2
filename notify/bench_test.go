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

// BenchmarkSend measures a send against what PocketBase's documentation
// suggests for it ("Realtime messaging"), in the same run and taking turns: to
// all of N subscribers, and to one among N connections. The clients are real,
// each with a reader; nothing is written to a socket. x-snippet is the time of
// a send divided by the snippet's.
func BenchmarkSend(b *testing.B) {
	data := map[string]any{"text": "about one hundred bytes of data, which is what a chat message or a progress report has", "n": 1}
	for _, connections := range []int{100, 1000, 5000} {
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
					client := notify.NewClient(subscriptions.NewDefaultClient(), 256, func(reason string) { b.Error(reason) })
					clients = append(clients, client)
					read(b, own, client, topic)
					read(b, stock, subscriptions.NewDefaultClient(), topic)
				}

				var ownTime, stockTime time.Duration
				sends := 0
				b.ReportAllocs()
				for b.Loop() {
					start := time.Now()
					if err := snippet(stock, "example", data); err != nil {
						b.Fatal(err)
					}
					middle := time.Now()
					report, err := n.Send(b.Context(), notify.Message{Topic: "example", Data: data})
					if err != nil || report.Queued != subscribers {
						b.Fatalf("report %+v, error %v", report, err)
					}
					stockTime += middle.Sub(start)
					ownTime += time.Since(middle)
					if sends++; sends%128 == 0 { // sends do not wait for the readers; the queues must not overflow
						for _, client := range clients {
							pbtest.WaitFor(b, "the readers catch up", func() bool { return client.Queued() == 0 })
						}
					}
				}
				b.ReportMetric(float64(ownTime.Nanoseconds())/float64(b.N), "ns/send")
				b.ReportMetric(float64(stockTime.Nanoseconds())/float64(b.N), "ns/snippet")
				b.ReportMetric(float64(ownTime)/float64(stockTime), "x-snippet")
			})
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
