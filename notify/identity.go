// Identity: an auth record or a guest, at a given moment.

package notify

import (
	"time"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// userRef identifies an auth record.
type userRef struct{ collectionID, id string }

func (r userRef) String() string { return r.collectionID + ":" + r.id }

func refOf(auth *core.Record) userRef { return userRef{auth.Collection().Id, auth.Id} }

// isSameUser reports whether a and b are the same user, or both guests.
func isSameUser(a, b *core.Record) bool {
	if a == nil || b == nil {
		return a == b
	}
	return refOf(a) == refOf(b)
}

// authAt returns the auth record that counts at the time now, or nil for a guest.
func (c *Client) authAt(now time.Time) *core.Record {
	if auth := c.auth.Load(); auth != nil && !c.expired(now) {
		return auth
	}
	return nil
}

func (c *Client) expired(now time.Time) bool {
	at := c.expires.Load()
	return at != 0 && now.Unix() >= at
}

// Publisher is the publishing client, as the server knows it.
type Publisher struct {
	// Auth is nil for a guest.
	Auth *core.Record
	// IP tells guests apart.
	IP string
	// ClientIDs are ids of realtime connections that the publisher claims to have, or to have had.
	// From the history it gets messages that were sent to those of its own user, but none that
	// excluded one of them.
	ClientIDs []string
	// Headers are the request's headers in PocketBase's form, for the rules.
	Headers map[string]string
}

func (p Publisher) isSuperuser() bool { return p.Auth != nil && p.Auth.IsSuperuser() }

// key tells publishers apart.
func (p Publisher) key() string {
	if p.Auth != nil {
		return p.Auth.Collection().Id + ":" + p.Auth.Id
	}
	return "guest:" + p.IP
}

// authCollections returns the auth collections, those of users before the superusers', because that
// order gives the more helpful error.
func (n *Notifier) authCollections() ([]*core.Collection, error) {
	all, ok := n.app.Store().Get(core.StoreKeyCachedCollections).([]*core.Collection)
	if !ok {
		return n.app.FindAllCollections(core.CollectionTypeAuth)
	}
	var own, system []*core.Collection
	for _, collection := range all {
		switch {
		case !collection.IsAuth():
		case collection.System:
			system = append(system, collection)
		default:
			own = append(own, collection)
		}
	}
	return append(own, system...), nil
}

// foreignAuth returns the auth record of a client of other code that counts now.
func (n *Notifier) foreignAuth(client subscriptions.Client) *core.Record {
	if rights := n.foreign.rightsOf(client); rights != nil && !rights.expires.IsZero() && !time.Now().Before(rights.expires) {
		return nil
	}
	auth, _ := client.Get(apis.RealtimeClientAuthKey).(*core.Record)
	return auth
}

// authOf returns the auth record of client's connection, or nil for a guest.
func (n *Notifier) authOf(client subscriptions.Client) *core.Record {
	if own := n.own(client); own != nil {
		return own.authAt(time.Now())
	}
	return n.foreignAuth(client)
}
