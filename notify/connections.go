// Listing connections and their subscriptions, and disconnecting them. Called by hooks/routes.go.

package notify

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/sets"
)

// TopicInfo counts the subscribers of a topic.
type TopicInfo struct {
	Topic string `json:"topic"`
	// Subscribers is the number of connections.
	Subscribers int `json:"subscribers"`
	// Users is the number of different auth records behind them.
	Users int `json:"users"`
}

// Connection describes one realtime connection.
type Connection struct {
	ID            string
	Auth          *core.Record // nil for a guest
	IP            string
	Connected     time.Time // zero if other code registered the client
	Subscriptions []string  // the subscription keys, sorted
	Queued        int       // messages that wait to be written
	Edge          string    // the name of the edge that holds it; empty: this server
}

// ConnectionFilter selects connections. Empty fields select all.
type ConnectionFilter struct {
	Topic string
	// User is an auth record as "COLLECTION:RECORD_ID".
	User string
}

// Topics returns all topics with subscribers, sorted by name. It includes those of PocketBase's
// record events.
func (n *Notifier) Topics() []TopicInfo {
	infos := map[string]*TopicInfo{}
	users := map[string]sets.Of[userRef]{}
	var mu sync.Mutex // guards infos and users
	n.walkClients(func(client subscriptions.Client) {
		who, topics := n.identityOf(client), topicsOf(client)
		mu.Lock()
		defer mu.Unlock()
		for topic := range topics {
			if infos[topic] == nil {
				infos[topic] = &TopicInfo{Topic: topic}
				users[topic] = sets.Of[userRef]{}
			}
			infos[topic].Subscribers++
			if !who.isGuest() {
				users[topic][who.user] = struct{}{}
			}
		}
	})

	result := make([]TopicInfo, 0, len(infos))
	for topic, info := range infos {
		info.Users = len(users[topic])
		result = append(result, *info)
	}
	slices.SortFunc(result, func(a, b TopicInfo) int { return cmp.Compare(a.Topic, b.Topic) })
	return result
}

// Connections returns the connections that filter selects, longest connected
// first. The error is of type [Errors], with the field "user".
func (n *Notifier) Connections(filter ConnectionFilter) ([]Connection, error) {
	clients, err := n.selectClients(filter)
	if err != nil {
		return nil, err
	}
	result := make([]Connection, 0, len(clients))
	for _, client := range clients {
		ip, _ := client.Get(apis.RealtimeClientIPKey).(string)
		connection := Connection{
			ID:            client.Id(),
			Auth:          n.authOf(client),
			IP:            ip,
			Subscriptions: slices.Sorted(maps.Keys(client.Subscriptions())),
		}
		if own := n.own(client); own != nil {
			connection.Connected = own.Connected()
			connection.Queued = own.Queued()
			if own.carrier != nil {
				connection.Edge = own.carrier.Edge()
			}
		}
		result = append(result, connection)
	}
	slices.SortFunc(result, func(a, b Connection) int {
		return cmp.Or(a.Connected.Compare(b.Connected), cmp.Compare(a.ID, b.ID))
	})
	return result, nil
}

// HasSubscribers reports whether user ("COLLECTION:RECORD_ID") has a connection that is subscribed
// to topic. It saves the work of preparing a message that nobody would get.
func (n *Notifier) HasSubscribers(topic, user string) bool {
	clients, err := n.selectClients(ConnectionFilter{Topic: topic, User: user})
	return err == nil && len(clients) > 0
}

// ClientsOf returns the ids of the connections of an auth record.
func (n *Notifier) ClientsOf(auth *core.Record) []string {
	var ids []string
	for _, client := range n.index.clientsOf(refOf(auth)) {
		ids = append(ids, client.Id())
	}
	return ids
}

// Disconnect ends the connection with id and reports whether there was one.
// The SDK on the other side reconnects.
func (n *Notifier) Disconnect(id string) bool {
	client, err := n.app.SubscriptionsBroker().ClientById(id)
	if err != nil {
		return false
	}
	n.disconnect(client)
	return true
}

// DisconnectUser ends every connection of the auth record user ("COLLECTION:RECORD_ID") and returns
// their number. The error is of type [Errors], with the field "user".
func (n *Notifier) DisconnectUser(user string) (int, error) {
	if user == "" {
		return 0, Errors{invalid("user", ErrRequired, "cannot be blank")}
	}
	clients, err := n.selectClients(ConnectionFilter{User: user})
	for _, client := range clients {
		n.disconnect(client)
	}
	return len(clients), err
}

func (n *Notifier) disconnect(client subscriptions.Client) {
	if own := n.own(client); own != nil {
		own.Close(DisconnectRequested)
	}
	// at once, not when the connection's handler returns: nothing sent from here on is for this
	// client
	n.app.SubscriptionsBroker().Unregister(client.Id())
}

func (n *Notifier) selectClients(filter ConnectionFilter) ([]subscriptions.Client, error) {
	var user userRef
	if filter.User != "" {
		ref, fieldErr := n.resolveUser("user", filter.User)
		if fieldErr != nil {
			return nil, Errors{fieldErr}
		}
		user = ref
	}
	var result []subscriptions.Client
	for _, client := range n.candidates(filter.Topic, filter.User != "", user) {
		if client.IsDiscarded() || filter.Topic != "" && len(n.keysOf(client, filter.Topic)) == 0 {
			continue
		}
		if filter.User != "" {
			if n.identityOf(client).user != user {
				continue
			}
		}
		result = append(result, client)
	}
	return result, nil
}

// candidates returns a superset of the clients that are subscribed to topic (if it is not empty)
// and belong to user (if byUser), as small as the index allows.
func (n *Notifier) candidates(topic string, byUser bool, user userRef) []subscriptions.Client {
	var own []*Client
	switch {
	case byUser:
		own = n.index.clientsOf(user)
	case topic != "":
		own = n.index.clientsOn(topic)
	default:
		return slices.Collect(maps.Values(n.app.SubscriptionsBroker().Clients()))
	}
	clients := slices.Clone(n.foreignClients())
	for _, client := range own {
		clients = append(clients, client)
	}
	return clients
}

// topicsOf returns the topics of all of client's subscription keys.
func topicsOf(client subscriptions.Client) sets.Of[string] {
	topics := sets.Of[string]{}
	for key := range client.Subscriptions() {
		topics[topicOf(key)] = struct{}{}
	}
	return topics
}
