// Subscription keys: a topic, or a topic with options, "example?options=…".

package notify

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/history"
)

// keysOf returns the keys by which client is subscribed to topic: the topic
// itself and the topic with options, `example?options=…`. The SDK listens on the
// key, and HasSubscription("example") does not find the one with options.
func (n *Notifier) keysOf(client subscriptions.Client, topic string) []string {
	if own := n.own(client); own != nil {
		if subscription := own.subscriptionTo(topic); subscription != nil {
			return own.namesOf(subscription)
		}
		return nil
	}
	// a client of other code: Subscriptions appends "?" to each key before it compares, so
	// "example?" does not find `example2`
	found := client.Subscriptions(topic + "?")
	keys := make([]string, 0, len(found))
	for key := range found {
		if safeKey(key) {
			keys = append(keys, key)
		}
	}
	return keys
}

// IsSubscribed reports whether the realtime connection has key, a subscription key of topic. If so, all that is sent to the
// topic from now on reaches it under that key, if it is meant for it.
func (n *Notifier) IsSubscribed(clientID, topic, key string) bool {
	client, err := n.app.SubscriptionsBroker().ClientById(clientID)
	return err == nil && slices.Contains(n.keysOf(client, topic), key)
}

// topicOf returns the topic of a subscription key.
func topicOf(key string) string {
	topic, _, _ := strings.Cut(key, "?")
	return topic
}

// wantsEnvelope reports whether the options of a subscription key ask for the
// envelope, or for history, which always comes in it.
func wantsEnvelope(options subscriptions.SubscriptionOptions) bool {
	wants, _ := strconv.ParseBool(options.Query["envelope"])
	return wants || options.Query["since"] != "" || options.Query["rewind"] != ""
}

// wantsToHide reports whether the options of a subscription key ask not to list the user among who
// is present. What is not understood hides.
func wantsToHide(options subscriptions.SubscriptionOptions) bool {
	text, isSet := options.Query["visible"]
	isVisible, _ := strconv.ParseBool(text)
	return isSet && !isVisible
}

// checkOptions returns what is wrong with the options of a subscription key.
func checkOptions(options subscriptions.SubscriptionOptions) error {
	if text, isSet := options.Query["visible"]; isSet {
		if _, err := strconv.ParseBool(text); err != nil {
			return fmt.Errorf("the option visible must be true or false, and is %q", text)
		}
	}
	_, err := startOf(options)
	return err
}

// readers are clients of PocketBase that parse keys. A new one would cost 40 random letters.
var readers = sync.Pool{New: func() any { return subscriptions.NewDefaultClient() }}

// optionsOf parses the options of a subscription key as PocketBase does.
func optionsOf(key string) subscriptions.SubscriptionOptions {
	reader := readers.Get().(*subscriptions.DefaultClient)
	defer readers.Put(reader)
	defer reader.Unsubscribe()
	reader.Subscribe(key)
	return reader.Subscriptions()[key]
}

// clientIDsOf parses the option "clientId": ids of earlier connections of the client, separated by
// commas, the most recent one last.
func clientIDsOf(options subscriptions.SubscriptionOptions) []string {
	return ParseClientIDs(options.Query["clientId"])
}

// maxClientIDs is how many ids count; if there are more, the last ones do.
const maxClientIDs = 20

// ParseClientIDs parses ids of realtime connections, separated by commas.
func ParseClientIDs(text string) []string {
	if text == "" {
		return nil
	}
	ids := strings.Split(text, ",")
	return ids[max(0, len(ids)-maxClientIDs):]
}

// startOf parses where a subscription with options should begin. The zero Start begins with what is
// sent from now on.
func startOf(options subscriptions.SubscriptionOptions) (Start, error) {
	return history.ParseStart(options.Query["since"], options.Query["rewind"])
}

// safeKey reports whether key can be written as the name of an SSE event. A key is the client's own
// text, so a key with a line break could break only that client's stream; it gets no message.
func safeKey(key string) bool { return !strings.ContainsAny(key, "\r\n\x00") }
