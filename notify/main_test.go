package notify_test

import (
	"testing"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
	"go.uber.org/goleak"

	"herald/notify"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// connect registers a client that is signed in as auth (nil: a guest) and
// subscribed to keys.
func connect(app core.App, auth *core.Record, queueSize int, keys ...string) *notify.Client {
	client := notify.NewClient(subscriptions.NewDefaultClient(), queueSize, func(string) {})
	if auth != nil {
		client.Set(apis.RealtimeClientAuthKey, auth)
	}
	client.Subscribe(keys...)
	app.SubscriptionsBroker().Register(client)
	return client
}

// received takes what waits in client's queue.
func received(client subscriptions.Client) []subscriptions.Message {
	var messages []subscriptions.Message
	for {
		select {
		case message, ok := <-client.Channel():
			if !ok {
				return messages
			}
			messages = append(messages, message)
		default:
			return messages
		}
	}
}
