// The names of collections in triggers, which follow when a collection is renamed. Called
// by triggers.go.

package hooks

import (
	"encoding/json/v2"
	"log/slog"
	"strings"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"

	"herald/notify"
	"herald/pb_migrations"
)

// rename gives triggers the new name of a collection, in the transaction of its update.
// By its old name they would watch, or send to, whatever gets that one next.
func (t *triggers) rename(e *core.CollectionEvent) error {
	before, err := e.App.FindCollectionByNameOrId(e.Collection.Id)
	if err := e.Next(); err != nil {
		return err
	}
	if err != nil || before.Name == e.Collection.Name || missing(e.App, pb_migrations.TriggersCollectionID, pb_migrations.TriggersCollectionName) != "" {
		return nil
	}
	records := []*core.Record{}
	if err := e.App.RecordQuery(pb_migrations.TriggersCollectionID).All(&records); err != nil {
		return err
	}
	for _, record := range records {
		changed := map[string]any{}
		if strings.EqualFold(record.GetString("collection"), before.Name) {
			changed["collection"] = e.Collection.Name
		}
		if to, ok := renamedAudience(record.GetString("to"), before.Name, e.Collection.Name); ok {
			changed["to"] = to
		}
		if len(changed) == 0 {
			continue
		}
		// past the hooks: the triggers are loaded after the commit
		if _, err := e.App.DB().Update(record.Collection().Name, changed, dbx.HashExp{"id": record.Id}).Execute(); err != nil {
			return err
		}
		e.App.Logger().Info("A trigger follows a collection to its new name",
			slog.String("trigger", record.GetString("name")), slog.String("collection", e.Collection.Name))
	}
	return nil
}

// renamedAudience returns the audience of a trigger with another name of a collection;
// false where it has not got that.
func renamedAudience(text, from, to string) (string, bool) {
	var audience notify.Audience
	if json.Unmarshal([]byte(text), &audience) != nil {
		return "", false
	}
	isNamed := false
	for i, user := range audience.Users {
		if name, id, ok := strings.Cut(user, ":"); ok && strings.EqualFold(name, from) {
			audience.Users[i], isNamed = to+":"+id, true
		}
	}
	for i, name := range audience.Collections {
		if strings.EqualFold(name, from) {
			audience.Collections[i], isNamed = to, true
		}
	}
	if !isNamed {
		return "", false
	}
	parts := map[string]any{} // what is empty is refused
	if audience.Auth != "" {
		parts["auth"] = audience.Auth
	}
	if audience.Filter != "" {
		parts["filter"] = audience.Filter
	}
	for name, list := range map[string][]string{"users": audience.Users, "collections": audience.Collections, "clients": audience.Clients} {
		if list != nil {
			parts[name] = list
		}
	}
	encoded, err := json.Marshal(parts, json.Deterministic(true))
	return string(encoded), err == nil
}
