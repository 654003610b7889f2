// Migration of what the first versions of the history stored by name. Called by the log when it is
// opened.

package notify

import (
	"encoding/json/v2"
	"maps"
	"slices"
	"strings"
	"time"

	"herald/notify/internal/sets"
)

// byNames is an audience as the first versions stored it.
type byNames struct {
	To     Audience `json:"to"`
	Except Except   `json:"except"`
}

// identify converts the audience and the sender of a message, as the first versions stored them at
// the time sent, to what is stored now. A name stands for the collection that has it, unless that
// collection was created later.
func (n *Notifier) identify(sent time.Time, encoded []byte, sender string) ([]byte, string) {
	if sender != "" {
		name, id, _ := strings.Cut(sender, ":")
		if collection, err := n.app.FindCachedCollectionByNameOrId(name); err == nil && !collection.Created.Time().After(sent) {
			sender = userRef{collection.Id, id}.String()
		}
	}
	if encoded == nil {
		return nil, sender
	}
	unknown, _ := storedAudience{Version: storedVersion, Unknown: true}.encode()
	var version struct {
		Version int `json:"v"`
	}
	if json.Unmarshal(encoded, &version) == nil && version.Version > 0 {
		return encoded, sender // written before an older version was started in between
	}
	var names byNames
	if err := json.Unmarshal(encoded, &names); err != nil {
		return unknown, sender
	}
	a, errs := n.compile(names.To, names.Except)
	if len(errs) > 0 {
		return unknown, sender
	}
	isLater := func(id string) bool {
		collection, err := n.app.FindCachedCollectionByNameOrId(id)
		return err != nil || collection.Created.Time().After(sent)
	}
	named := slices.Collect(maps.Keys(a.collections))
	for _, refs := range []sets.Of[userRef]{a.users, a.exceptUsers} {
		for ref := range refs {
			named = append(named, ref.collectionID)
		}
	}
	if slices.ContainsFunc(named, isLater) {
		return unknown, sender
	}
	a.filter = slices.DeleteFunc(a.filter, func(filter collectionFilter) bool { return isLater(filter.collection.Id) })
	stored, err := a.stored()
	if err != nil {
		return unknown, sender
	}
	return stored, sender
}
