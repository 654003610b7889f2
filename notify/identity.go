// Identity: who a connection or a request acts as, and to whom a message may go.

package notify

import (
	"time"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
)

// userRef identifies an auth record. The zero value is a guest.
type userRef struct{ collectionID, id string }

func (r userRef) String() string { return r.collectionID + ":" + r.id }

func refOf(auth *core.Record) userRef { return userRef{auth.Collection().Id, auth.Id} }

// identity is who somebody acts as: an auth record, or a guest. It never changes after creation.
type identity struct {
	user        userRef
	isSuperuser bool
	tokenKey    string // of the auth record when it signed in: its tokens are revoked if that changes
	expires     int64  // when the token does, in Unix seconds; 0 means never
}

var guest = &identity{}

// identityOf returns the identity of an auth record, or guest for nil. expires is in Unix seconds.
func identityOf(auth *core.Record, expires int64) *identity {
	if auth == nil {
		return guest
	}
	return &identity{refOf(auth), auth.IsSuperuser(), auth.TokenKey(), expires}
}

func (i *identity) isGuest() bool { return i.user == userRef{} }

// UserOf names auth, as [Client.User] does.
func UserOf(auth *core.Record) string { return identityOf(auth, 0).name() }

// name names the user, and is "" for a guest.
func (i *identity) name() string {
	if i.isGuest() {
		return ""
	}
	return i.user.String()
}

// expiry returns when the token expires; the zero time means never.
func (i *identity) expiry() time.Time {
	if i.expires == 0 {
		return time.Time{}
	}
	return time.Unix(i.expires, 0)
}

// at returns i as it counts at the time now, in Unix seconds: a guest once the token has expired.
func (i *identity) at(now int64) *identity {
	if i.expires != 0 && now >= i.expires {
		return guest
	}
	return i
}

// identity returns who the client is now.
func (c *Client) identity() *identity { return c.auth.Load().at(time.Now().Unix()) }

// identityOf returns who is behind a client from PocketBase's broker now.
func (n *Notifier) identityOf(client subscriptions.Client) *identity {
	if own := n.own(client); own != nil {
		return own.identity()
	}
	return n.foreignIdentity(client)
}

// foreignIdentity is identityOf for a client of other code.
func (n *Notifier) foreignIdentity(client subscriptions.Client) *identity {
	auth, _ := client.Get(apis.RealtimeClientAuthKey).(*core.Record)
	expires := int64(0)
	if rights := n.foreign.rightsOf(client); rights != nil && !rights.expires.IsZero() {
		expires = rights.expires.Unix()
	}
	return identityOf(auth, expires).at(time.Now().Unix())
}

// CollectionChanged must be called when a collection was changed. It brings the auth records of
// connections up to date with it: PocketBase ends the rights of those whose user was changed or
// deleted, and finds them by the collection's name (realtimeUpdateClientsAuth in its apis/realtime.go).
func (n *Notifier) CollectionChanged(collection *core.Collection) {
	for _, client := range n.index.clientsIn(collection.Id) {
		client.renewRecord(collection.Id)
	}
}

// renewRecord brings the client's auth record up to date with its collection.
func (c *Client) renewRecord(collectionID string) {
	c.authMu.Lock()
	defer c.authMu.Unlock()
	auth, _ := c.Client.Get(apis.RealtimeClientAuthKey).(*core.Record)
	if auth == nil || c.auth.Load().user != refOf(auth) || auth.Collection().Id != collectionID {
		return
	}
	renewed := c.notifier.upToDate(auth)
	c.Client.Set(apis.RealtimeClientAuthKey, renewed)
	c.setAuthLocked(renewed)
}

// authOf returns the auth record of client's connection, or nil for a guest.
func (n *Notifier) authOf(client subscriptions.Client) *core.Record {
	auth, _ := client.Get(apis.RealtimeClientAuthKey).(*core.Record)
	if n.identityOf(client).isGuest() {
		return nil
	}
	return auth
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
	// Headers returns the request's headers in PocketBase's form, for rules that look at them; nil means that
	// there are none.
	Headers func() map[string]string
}

func (p Publisher) headers() map[string]string {
	if p.Headers == nil {
		return nil
	}
	return p.Headers()
}

func (p Publisher) isSuperuser() bool { return p.Auth != nil && p.Auth.IsSuperuser() }

func (p Publisher) identity() *identity { return identityOf(p.Auth, 0) }

// key tells publishers apart.
func (p Publisher) key() string {
	if p.Auth != nil {
		return refOf(p.Auth).String()
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
