package pb_migrations

import (
	"log/slog"

	"github.com/pocketbase/pocketbase/core"
	m "github.com/pocketbase/pocketbase/migrations"
)

// The triggers too are recognised by their collection's id.
const (
	TriggersCollectionID   = "herald_trigs_01"
	TriggersCollectionName = "notify_triggers"
)

func init() {
	m.Register(createTriggers, dropTriggers)
}

// createTriggers adds the collection, unless the application has one of that name.
func createTriggers(app core.App) error {
	if _, err := app.FindCollectionByNameOrId(TriggersCollectionName); err == nil {
		app.Logger().Warn("No triggers added: the application has its own collection", slog.String("name", TriggersCollectionName))
		return nil
	}
	triggers := core.NewBaseCollection(TriggersCollectionName, TriggersCollectionID) // without API rules: superusers only
	triggers.Fields.Add(
		&core.TextField{Name: "name", Required: true, Presentable: true, Max: 255, Help: "What the log calls it."},
		&core.TextField{Name: "collection", Required: true, Max: 255, Help: "Whose records it watches: the name of a collection."},
		&core.SelectField{Name: "events", Required: true, MaxSelect: 3, Values: []string{"create", "update", "delete"}},
		&core.TextField{Name: "changed", Help: "Fields, such as status, total: an update counts only where one of them changed. Empty: every update."},
		&core.TextField{Name: "filter", Help: `Which records, as a filter: status = "shipped". @request.auth is who made the change. Empty: all.`},
		&core.TextField{Name: "topic", Required: true, Max: 1000, Help: "Where to: order/{id}, shop/{shop}, team/{owner.team}. A message comes as {action, collection, record}."},
		&core.TextField{Name: "fields", Help: "What of the record is sent, as the API's fields: id,status,expand.owner.name. Empty: all but hidden ones."},
		&core.TextField{Name: "to", Help: `Who of the subscribers: record:owner, the users in that field; or as JSON {"auth": "user"}, {"filter": "plan = 'pro'"}. Empty: all.`},
		&core.BoolField{Name: "enabled"},
		&core.TextField{Name: "status", Help: "Why it was switched off. Set by the server."},
		&core.AutodateField{Name: "created", OnCreate: true},
		&core.AutodateField{Name: "updated", OnCreate: true, OnUpdate: true},
	)
	return app.Save(triggers)
}

// dropTriggers removes the collection if it is the one that createTriggers made.
func dropTriggers(app core.App) error {
	triggers, err := app.FindCollectionByNameOrId(TriggersCollectionID)
	if err != nil {
		return nil
	}
	return app.Delete(triggers)
}
