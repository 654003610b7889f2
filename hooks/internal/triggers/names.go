// Names of collections in triggers, which follow when a collection is renamed. Called by
// triggers.go.

package triggers

import (
	"encoding/json/jsontext"
	"encoding/json/v2"
	"log/slog"
	"strings"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"

	"herald/hooks/internal/records"
	"herald/pb_migrations"
)

// rename gives triggers the new name of a collection, in the transaction of its update. With the
// old name they would watch, or send to, whichever collection gets that name next.
func (t *Triggers) rename(e *core.CollectionEvent) error {
	before, err := e.App.FindCollectionByNameOrId(e.Collection.Id)
	if err := e.Next(); err != nil {
		return err
	}
	if err != nil || before.Name == e.Collection.Name || records.Missing(e.App, pb_migrations.TriggersCollectionID, pb_migrations.TriggersCollectionName) != "" {
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
		// bypass the hooks: the triggers are loaded after the commit
		if _, err := e.App.DB().Update(record.Collection().Name, changed, dbx.HashExp{"id": record.Id}).Execute(); err != nil {
			return err
		}
		e.App.Logger().Info("A trigger follows a collection to its new name",
			slog.String("trigger", record.GetString("name")), slog.String("collection", e.Collection.Name))
	}
	return nil
}

// renamedAudience returns the audience of a trigger with a collection renamed. It returns false if
// the audience does not contain that name.
func renamedAudience(text, from, to string) (string, bool) {
	var parts map[string]jsontext.Value
	if json.Unmarshal([]byte(text), &parts) != nil {
		return "", false
	}
	isNamed := false
	for part, end := range map[string]string{"users": ":", "collections": ""} { // part to the end of the name
		var list []string
		if json.Unmarshal(parts[part], &list) != nil {
			continue
		}
		isNamedHere := false
		for i, item := range list {
			name, id, _ := strings.Cut(item, ":")
			if strings.EqualFold(name, from) {
				list[i], isNamedHere = to+end+id, true
			}
		}
		if encoded, err := json.Marshal(list); err == nil && isNamedHere {
			parts[part], isNamed = encoded, true
		}
	}
	encoded, err := json.Marshal(parts, json.Deterministic(true))
	return string(encoded), err == nil && isNamed
}
