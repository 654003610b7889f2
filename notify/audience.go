// Which subscribers get a message. message.go compiles an audience once per message; the fan-out
// matches it against each client.

package notify

import (
	"fmt"
	"slices"
	"strings"

	"github.com/pocketbase/pocketbase/core"

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
	filtered   bool
	allowed    sets.Of[userRef] // if filtered: the auth records that match the filter, nobody until it is resolved
}

// noteLooks sets looksAtAuth.
func (a *audience) noteLooks() {
	a.looksAtAuth = a.auth != AuthAny || a.users != nil || a.exceptUsers != nil || a.collections != nil || a.filtered
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

	for field, clients := range map[string][]string{"to.clients": to.Clients, "except.clients": except.Clients} {
		if i := slices.Index(clients, ""); i >= 0 { // of an unset variable
			errs.add(invalid(fmt.Sprintf("%s.%d", field, i), ErrInvalidAudience, "must not be empty"))
		}
	}

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
	a.filtered = a.filter != nil
	a.noteLooks()
	return a, errs
}

// reader is somebody for whom a message may be.
type reader struct {
	who        *identity
	connection string   // id of the realtime connection; empty if it is not on one
	earlier    []string // ids of earlier connections, as the client claims
}

// isFor reports whether the message is meant for r. This is the one place that decides it, for
// messages that are sent, replayed and fetched.
func (a *audience) isFor(r *reader) bool {
	if a.clients != nil && !a.clients.Has(r.connection) && !a.wasFor(r) {
		return false
	}
	if a.exceptClients != nil && (a.exceptClients.Has(r.connection) || slices.ContainsFunc(r.earlier, a.exceptClients.Has)) {
		return false
	}
	return !a.looksAtAuth || a.includes(r.who)
}

// wasFor reports whether the message was sent to an earlier connection of r that belonged to the
// same user. Nothing is known about the connections of guests.
func (a *audience) wasFor(r *reader) bool {
	if r.who.isGuest() {
		return false
	}
	return slices.ContainsFunc(r.earlier, func(id string) bool { return a.clientUsers[id] == r.who.user.String() })
}

// includes reports whether the audience includes who, apart from connections.
func (a *audience) includes(who *identity) bool {
	if who.isGuest() {
		return (a.auth == AuthAny || a.auth == AuthGuest) && a.users == nil && a.collections == nil && !a.filtered
	}
	switch a.auth {
	case AuthGuest:
		return false
	case AuthUser:
		if who.isSuperuser {
			return false
		}
	case AuthSuperuser:
		if !who.isSuperuser {
			return false
		}
	}
	return (a.users == nil || a.users.Has(who.user)) &&
		(a.collections == nil || a.collections.Has(who.user.collectionID)) &&
		(!a.filtered || a.allowed.Has(who.user)) &&
		!a.exceptUsers.Has(who.user)
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
