// Which subscribers get a message. message.go compiles an audience once per message; the fan-out
// matches it against each client.

package notify

import (
	"fmt"
	"strings"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/sets"
)

// The values of [Audience.Auth].
const (
	AuthAny       = "any"       // everyone, the default
	AuthGuest     = "guest"     // connections that are not signed in
	AuthUser      = "user"      // signed in, but not a superuser
	AuthSuperuser = "superuser" // signed in as a superuser
)

// Audience narrows the subscribers of a topic. Its parts combine with AND, the items of a list with
// OR. A nil list narrows nothing. An empty list that is not nil matches nobody, so that a list that
// came out empty never turns into everyone.
type Audience struct {
	// Auth is one of the Auth… constants; empty means AuthAny.
	Auth string `json:"auth"`
	// Users are auth records as "COLLECTION:RECORD_ID", e.g. "users:abc…", because an id is unique
	// only within its collection. Every connection of these users matches.
	Users []string `json:"users"`
	// Collections are names or ids of auth collections.
	Collections []string `json:"collections"`
	// Filter is a PocketBase filter on the auth record:
	// "plan = 'pro' && verified = true". It costs one query per message.
	Filter string `json:"filter"`
	// Clients are ids of realtime connections.
	Clients []string `json:"clients"`
}

// Except excludes subscribers that the [Audience] includes.
type Except struct {
	// Users are auth records as "COLLECTION:RECORD_ID".
	Users []string `json:"users"`
	// Clients are ids of realtime connections.
	Clients []string `json:"clients"`
}

// audience is an Audience and an Except, checked and resolved. A nil set narrows nothing.
type audience struct {
	auth          string
	users         sets.Of[userRef]
	collections   sets.Of[string] // ids
	clients       sets.Of[string]
	exceptUsers   sets.Of[userRef]
	exceptClients sets.Of[string]
	clientUsers   map[string]string // see storedAudience; set when the message is stored

	looksAtAuth bool // false if the client's auth record makes no difference

	filter     []collectionFilter // see filter.go; nil without a filter
	filterText string
	allowed    sets.Of[userRef] // auth records that match the filter; set for each send
}

// noteLooks sets looksAtAuth.
func (a *audience) noteLooks(hasFilter bool) {
	a.looksAtAuth = a.auth != AuthAny || a.users != nil || a.exceptUsers != nil || a.collections != nil || hasFilter
}

// narrows reports whether the audience may exclude a subscriber.
func (a *audience) narrows() bool {
	return a.looksAtAuth || a.clients != nil || a.exceptClients != nil
}

// compile checks to and except against the application's collections.
func (n *Notifier) compile(to Audience, except Except) (*audience, Errors) {
	var errs Errors
	a := &audience{auth: to.Auth, clients: sets.From(to.Clients), exceptClients: sets.From(except.Clients)}

	if a.auth == "" {
		a.auth = AuthAny
	}
	switch a.auth {
	case AuthAny, AuthGuest, AuthUser, AuthSuperuser:
	default:
		errs.add(invalid("to.auth", ErrInvalidAudience, "must be one of %s, %s, %s, %s",
			AuthAny, AuthGuest, AuthUser, AuthSuperuser))
	}

	a.users = n.resolveUsers("to.users", to.Users, &errs)
	a.exceptUsers = n.resolveUsers("except.users", except.Users, &errs)

	if to.Collections != nil {
		a.collections = make(sets.Of[string], len(to.Collections))
	}
	for i, name := range to.Collections {
		collection, fieldErr := n.authCollection(fmt.Sprintf("to.collections.%d", i), name)
		if fieldErr != nil {
			errs.add(fieldErr)
			continue
		}
		a.collections[collection.Id] = struct{}{}
	}

	if to.Filter != "" && len(errs) == 0 {
		filter, fieldErr := n.compileFilter(to.Filter, a)
		errs.add(fieldErr)
		a.filter, a.filterText = filter, to.Filter
	}
	a.noteLooks(a.filter != nil)
	return a, errs
}

// matchClient is match for one of our clients; now decides whether its token has expired.
func (a *audience) matchClient(client *Client, now time.Time) bool {
	return a.matchID(client) && (!a.looksAtAuth || a.matchAuth(client.authAt(now)))
}

// match reports whether client, whose auth record is now auth, belongs to the audience.
func (a *audience) match(client subscriptions.Client, auth *core.Record) bool {
	return a.matchID(client) && (!a.looksAtAuth || a.matchAuth(auth))
}

func (a *audience) matchID(client subscriptions.Client) bool {
	if a.clients == nil && a.exceptClients == nil {
		return true // Id may cost a lock
	}
	id := client.Id()
	return (a.clients == nil || a.clients.Has(id)) && !a.exceptClients.Has(id)
}

func (a *audience) matchAuth(auth *core.Record) bool {
	if auth == nil {
		return (a.auth == AuthAny || a.auth == AuthGuest) &&
			a.users == nil && a.collections == nil && a.filter == nil
	}
	switch a.auth {
	case AuthGuest:
		return false
	case AuthUser:
		if auth.IsSuperuser() {
			return false
		}
	case AuthSuperuser:
		if !auth.IsSuperuser() {
			return false
		}
	}
	ref := refOf(auth)
	return (a.users == nil || a.users.Has(ref)) &&
		(a.collections == nil || a.collections.Has(ref.collectionID)) &&
		(a.filter == nil || a.allowed.Has(ref)) &&
		!a.exceptUsers.Has(ref)
}

func (n *Notifier) resolveUsers(field string, users []string, errs *Errors) sets.Of[userRef] {
	if users == nil {
		return nil
	}
	refs := make(sets.Of[userRef], len(users))
	for i, user := range users {
		ref, fieldErr := n.resolveUser(fmt.Sprintf("%s.%d", field, i), user)
		if fieldErr != nil {
			errs.add(fieldErr)
			continue
		}
		refs[ref] = struct{}{}
	}
	return refs
}

// resolveUser parses "COLLECTION:RECORD_ID". It does not check that the record exists, because a
// missing record has no connections anyway.
func (n *Notifier) resolveUser(field, user string) (userRef, *FieldError) {
	name, id, ok := strings.Cut(user, ":")
	if !ok || name == "" || id == "" {
		return userRef{}, invalid(field, ErrInvalidAudience, "%q must be of the form COLLECTION:RECORD_ID", user)
	}
	collection, fieldErr := n.authCollection(field, name)
	if fieldErr != nil {
		return userRef{}, fieldErr
	}
	return userRef{collection.Id, id}, nil
}

func (n *Notifier) authCollection(field, nameOrID string) (*core.Collection, *FieldError) {
	collection, err := n.app.FindCachedCollectionByNameOrId(nameOrID)
	if err != nil || !collection.IsAuth() {
		return nil, invalid(field, ErrInvalidAudience, "%q is not an auth collection", nameOrID)
	}
	return collection, nil
}
