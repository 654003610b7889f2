package pb_migrations

import (
	"log/slog"

	"github.com/pocketbase/pocketbase/core"
	m "github.com/pocketbase/pocketbase/migrations"
)

// The triggers are recognised by their collection's id as well.
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
		&core.TextField{Name: "name", Required: true, Presentable: true, Max: 255, Help: "The trigger's name in the log."},
		&core.TextField{Name: "collection", Required: true, Max: 255, Help: "The name of the collection whose records it watches."},
		&core.SelectField{Name: "events", Required: true, MaxSelect: 3, Values: []string{"create", "update", "delete"}},
		&core.TextField{Name: "changed", Help: "Fields, such as status, total. An update counts only if one of them changed. Empty means every update."},
		&core.TextField{Name: "filter", Help: `A filter that selects records, such as status = "shipped". @request.auth is the user who made the change. Empty means all records.`},
		&core.TextField{Name: "topic", Required: true, Max: 1000, Help: "The topic to send to, such as order/{id}, shop/{shop}, team/{owner.team}. The message's data is {action, collection, record}."},
		&core.TextField{Name: "fields", Help: "The fields of the record to send, in the syntax of the API's parameter fields: id,status,expand.owner.name. Empty means all except hidden ones."},
		&core.TextField{Name: "to", Help: `Which subscribers get it: record:owner for the users in that field, or JSON such as {"auth": "user"} or {"filter": "plan = 'pro'"}. Empty means all.`},
		&core.BoolField{Name: "enabled"},
		&core.TextField{Name: "status", Help: "Why the trigger was switched off. Set by the server."},
		&core.AutodateField{Name: "created", OnCreate: true},
		&core.AutodateField{Name: "updated", OnCreate: true, OnUpdate: true},
	)
	return app.Save(triggers)
}

// dropTriggers removes the collection if createTriggers created it.
func dropTriggers(app core.App) error {
	triggers, err := app.FindCollectionByNameOrId(TriggersCollectionID)
	if err != nil {
		return nil
	}
	return app.Delete(triggers)
}
