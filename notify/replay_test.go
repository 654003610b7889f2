package notify_test

import (
	"encoding/json/v2"
	"fmt"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

// keepHistory gives the topics log/{name} a history, without hooks.
func keepHistory(n *notify.Notifier, count int) {
	collection := core.NewBaseCollection("channels")
	collection.Fields.Add(&core.TextField{Name: "pattern"}, &core.NumberField{Name: "history"})
	channel := core.NewRecord(collection)
	channel.Load(map[string]any{"pattern": "log/{name}", "history": count})
	n.SetChannels([]*core.Record{channel})
}

// What is sent after a subscription is not counted among the last messages before it,
// however late these are read.
func TestRewindEndsWhereTheSubscriptionBegins(t *testing.T) {
	for _, test := range []struct {
		rewind string
		want   []int64
	}{
		{"0", []int64{6, 7, 8}},
		{"0s", []int64{6, 7, 8}},
		{"1ns", []int64{6, 7, 8}},
		{"2", []int64{4, 5, 6, 7, 8}},
		{"1h", []int64{1, 2, 3, 4, 5, 6, 7, 8}},
	} {
		t.Run(test.rewind, func(t *testing.T) {
			app := pbtest.NewApp(t)
			n := notify.New(app, notify.Config{})
			t.Cleanup(func() { n.Shutdown(time.Second) })
			keepHistory(n, 100)
			send := func(count int) {
				for range count {
					if _, err := n.Send(t.Context(), notify.Message{Topic: "log/a", Data: 1}); err != nil {
						t.Fatal(err)
					}
				}
			}
			send(5)
			release := n.HoldReplays()
			client := connect(app, nil, "log/a?options="+url.QueryEscape(fmt.Sprintf(`{"query":{"rewind":%q}}`, test.rewind)))
			t.Cleanup(func() { client.Close(notify.DisconnectLeft); <-client.Done() })
			send(3)
			release()
			var got []int64
			pbtest.WaitFor(t, fmt.Sprint("messages ", test.want), func() bool {
				for _, message := range received(client) {
					var envelope struct {
						Seq int64 `json:"seq"`
					}
					if err := json.Unmarshal(message.Data, &envelope); err != nil {
						t.Fatal(err)
					}
					got = append(got, envelope.Seq)
				}
				return len(got) >= len(test.want)
			})
			if !slices.Equal(got, test.want) {
				t.Errorf("got %v, not %v", got, test.want)
			}
		})
	}
}
