package notify_test

import (
	"testing"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/internal/pbtest"
	"herald/notify"
)

func TestMain(m *testing.M) { pbtest.Main(m) }

// connect registers a client that is signed in as auth (nil: a guest) and
// subscribed to keys. Nothing writes out what it gets.
func connect(app core.App, auth *core.Record, keys ...string) *notify.Client {
	client := notify.New(app, notify.Config{}).NewClient(subscriptions.NewDefaultClient(), nil)
	if auth != nil {
		client.Set(apis.RealtimeClientAuthKey, auth)
	}
	client.Subscribe(keys...)
	client.Register(client)
	return client
}

// received takes what waits in client's queue.
func received(client *notify.Client) []subscriptions.Message { return client.TakeQueued() }
