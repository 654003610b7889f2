// The audience of a message in the history: written by history.go, read by recovery.go.
// Everything in it is known by its id. A name may be another collection's tomorrow, and
// what was sent to the members of the one would be shown to those of the other.

package notify

import (
	"encoding/json/v2"
	"fmt"
	"slices"
	"strings"

	"herald/notify/internal/sets"
)

// storedAudience is an audience as it is stored, as JSON. Users are
// "COLLECTION_ID:RECORD_ID". Of the lists null narrows nothing, [] is nobody.
type storedAudience struct {
	// Version is 1; of the first versions, which had names, it was missing.
	Version     int      `json:"v"`
	Auth        string   `json:"auth"`
	Users       []string `json:"users"`
	Collections []string `json:"collections"`
	Clients     []string `json:"clients"`
	// ClientUsers says whose connections Clients were: "COLLECTION_ID:RECORD_ID" by id. Of
	// guests nothing is known.
	ClientUsers map[string]string `json:"clientUsers,omitzero"`

	Filter string `json:"filter,omitzero"`
	// FilterOn has the meaning of the filter for each auth collection that it applies to:
	// see collectionFilter.
	FilterOn map[string]string `json:"filterOn,omitzero"`

	ExceptUsers   []string `json:"exceptUsers"`
	ExceptClients []string `json:"exceptClients"`

	// Unknown: for whom it was meant cannot be told any more.
	Unknown bool `json:"unknown,omitzero"`

	// To is for the first versions, should one of them be started again: nobody. They
	// would not see anything else of this, and show the message to everybody.
	To struct {
		Users []string `json:"users"`
	} `json:"to"`
}

const storedVersion = 1

// stored returns a as it is stored; nil for everybody.
func (a *audience) stored() ([]byte, error) {
	if !a.narrows() {
		return nil, nil
	}
	s := storedAudience{
		Version: storedVersion, Auth: a.auth, Users: listOf(a.users), Collections: listOf(a.collections), Clients: listOf(a.clients), ClientUsers: a.clientUsers,
		ExceptUsers: listOf(a.exceptUsers), ExceptClients: listOf(a.exceptClients),
	}
	if a.filter != nil {
		s.Filter, s.FilterOn = a.filterText, map[string]string{}
		for _, filter := range a.filter {
			s.FilterOn[filter.collection.Id] = filter.meaning
		}
	}
	return s.encode()
}

func (s storedAudience) encode() ([]byte, error) {
	s.To.Users = []string{}
	encoded, err := json.Marshal(s, json.FormatNilSliceAsNull(true), json.Deterministic(true))
	if err != nil {
		return nil, fmt.Errorf("encode the audience: %w", err)
	}
	return encoded, nil
}

// readStored returns the audience that is stored, without its filter; nil where nobody can
// tell any more for whom it was.
func readStored(encoded []byte) (s storedAudience, a *audience) {
	if err := json.Unmarshal(encoded, &s); err != nil || s.Version != storedVersion || s.Unknown {
		return s, nil
	}
	a = &audience{
		auth: s.Auth, users: toRefs(s.Users), collections: sets.From(s.Collections), clients: sets.From(s.Clients),
		exceptUsers: toRefs(s.ExceptUsers), exceptClients: sets.From(s.ExceptClients),
	}
	a.noteLooks(s.FilterOn != nil)
	return s, a
}

// listOf returns the members of a set in order; nil of nil.
func listOf[K comparable](s sets.Of[K]) []string {
	if s == nil {
		return nil
	}
	list := make([]string, 0, len(s))
	for member := range s {
		list = append(list, fmt.Sprint(member))
	}
	slices.Sort(list)
	return list
}

func toRefs(list []string) sets.Of[userRef] {
	if list == nil {
		return nil
	}
	refs := make(sets.Of[userRef], len(list))
	for _, item := range list {
		refs[refFrom(item)] = struct{}{}
	}
	return refs
}

// refFrom reads what [userRef.String] returns.
func refFrom(text string) userRef {
	collectionID, id, _ := strings.Cut(text, ":")
	return userRef{collectionID, id}
}

// nameOf returns ref with the present name of its collection; with its id where that is
// gone.
func (n *Notifier) nameOf(ref userRef) string {
	if ref == (userRef{}) {
		return ""
	}
	collection, err := n.app.FindCachedCollectionByNameOrId(ref.collectionID)
	if err != nil || collection.Id != ref.collectionID {
		return ref.String()
	}
	return userRef{collection.Name, ref.id}.String()
}
