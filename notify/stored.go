// The audience of a message in the history: written by history.go, read by recovery.go. Everything
// in it is identified by id. A name may belong to another collection tomorrow, and a message for
// the members of the old one would be shown to the members of the new one.

package notify

import (
	"encoding/json/v2"
	"fmt"
	"slices"
	"strings"

	"herald/notify/internal/sets"
)

// storedAudience is an audience as it is stored, in JSON. Users are "COLLECTION_ID:RECORD_ID". A
// list that is null narrows nothing; [] matches nobody.
type storedAudience struct {
	// Version is 1. The first versions, which stored names, had no such field.
	Version     int      `json:"v"`
	Auth        string   `json:"auth"`
	Users       []string `json:"users"`
	Collections []string `json:"collections"`
	Clients     []string `json:"clients"`
	// ClientUsers maps the ids in Clients to the users of those connections at that time, as
	// "COLLECTION_ID:RECORD_ID". Nothing is stored about guests.
	ClientUsers map[string]string `json:"clientUsers,omitzero"`

	Filter string `json:"filter,omitzero"`
	// FilterOn maps each auth collection that the filter applies to, by id, to the filter's
	// meaning: see collectionFilter.
	FilterOn map[string]string `json:"filterOn,omitzero"`

	ExceptUsers   []string `json:"exceptUsers"`
	ExceptClients []string `json:"exceptClients"`

	// Unknown means that the audience of the message can no longer be determined.
	Unknown bool `json:"unknown,omitzero"`

	// To matches nobody. It is for the first versions, in case one is started again: they ignore
	// the other fields, and would show the message to everyone.
	To struct {
		Users []string `json:"users"`
	} `json:"to"`
}

const storedVersion = 1

// stored returns a as it is stored, or nil for everyone.
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

// readStored returns the stored audience without its filter. a is nil if the audience can no longer
// be determined.
func readStored(encoded []byte) (s storedAudience, a *audience) {
	if err := json.Unmarshal(encoded, &s); err != nil || s.Version != storedVersion || s.Unknown {
		return s, nil
	}
	a = &audience{
		auth: s.Auth, users: toRefs(s.Users), collections: sets.From(s.Collections), clients: sets.From(s.Clients),
		exceptUsers: toRefs(s.ExceptUsers), exceptClients: sets.From(s.ExceptClients), clientUsers: s.ClientUsers,
	}
	a.filtered = s.FilterOn != nil
	a.noteLooks()
	return s, a
}

// listOf returns the members of a set in order, or nil for nil.
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

// refFrom parses what [userRef.String] returns.
func refFrom(text string) userRef {
	collectionID, id, _ := strings.Cut(text, ":")
	return userRef{collectionID, id}
}

// nameOf returns ref with the current name of its collection, or with the collection's id if it is
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
