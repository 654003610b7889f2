package pb_migrations

import (
	"log/slog"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"
	m "github.com/pocketbase/pocketbase/migrations"
	"github.com/pocketbase/pocketbase/tools/types"
)

// The collection that says when users were last seen is recognised by its id as well.
const (
	LastSeenCollectionID   = "herald_lseen_01"
	LastSeenCollectionName = "notify_last_seen"
)

// LastSeenParam is the id of the row in PocketBase's table _params that says when the server was
// last known to run.
const LastSeenParam = "heraldAlive"

func init() {
	m.Register(addPresence, removePresence)
}

// presenceFields are the fields of a channel that the first version did not have.
func presenceFields() []core.Field {
	return []core.Field{
		&core.TextField{Name: "presenceFields", Help: "Which fields of the user are shown to those who see who is present: name,avatar. Hidden fields never are. Empty shows none."},
		&core.NumberField{Name: "presenceLimit", OnlyInt: true, Min: types.Pointer(0.0),
			Help: "Above this number of users only their number is shown, not who they are; 0 means 1000."},
		&core.NumberField{Name: "presenceTTL", OnlyInt: true, Min: types.Pointer(0.0),
			Help: "Users count as gone if their clients do not renew their presence within this many seconds; 0 means that an open connection is enough."},
	}
}

// CurrentChannelsCollection returns the collection of the channels as all migrations leave it.
func CurrentChannelsCollection() *core.Collection {
	channels := newChannelsCollection()
	describePresence(channels)
	return channels
}

// describePresence adds the fields that presence needs to the channels' collection.
func describePresence(channels *core.Collection) {
	const rule = `Empty means superusers only, * means everyone. Anything else is a filter with @request.auth.*, @collection.*, and the pattern's {room} as @request.query.room.`
	setHelp(channels, "presence", "Tracks which users are subscribed, for @presence/TOPIC.")
	setHelp(channels, "presenceRule", "Controls who may see who is present. "+rule)
	channels.Fields.Add(presenceFields()...)
}

// addPresence adds what presence needs, unless the application has a collection of that name.
func addPresence(app core.App) error {
	if channels, err := app.FindCollectionByNameOrId(ChannelsCollectionID); err == nil {
		describePresence(channels)
		if err := app.Save(channels); err != nil {
			return err
		}
	}
	if _, err := app.FindCollectionByNameOrId(LastSeenCollectionName); err == nil {
		app.Logger().Warn("Nothing says when users were last seen: the application has its own collection", slog.String("name", LastSeenCollectionName))
		return nil
	}
	lastSeen := core.NewBaseCollection(LastSeenCollectionName, LastSeenCollectionID) // without API rules: superusers only
	lastSeen.Fields.Add(
		&core.TextField{Name: "user", Required: true, Presentable: true, Help: "The id of the user's record."},
		&core.DateField{Name: "at", Help: "When the user was last present."},
		&core.BoolField{Name: "online", Help: "The user is present now."},
	)
	lastSeen.AddIndex("idx_notify_last_seen_user", true, "`user`", "")
	return app.Save(lastSeen)
}

func setHelp(collection *core.Collection, name, help string) {
	switch field := collection.Fields.GetByName(name).(type) {
	case *core.TextField:
		field.Help = help
	case *core.BoolField:
		field.Help = help
	}
}

// removePresence undoes addPresence.
func removePresence(app core.App) error {
	if _, err := app.DB().Delete("_params", dbx.HashExp{"id": LastSeenParam}).Execute(); err != nil {
		return err
	}
	if lastSeen, err := app.FindCollectionByNameOrId(LastSeenCollectionID); err == nil {
		if err := app.Delete(lastSeen); err != nil {
			return err
		}
	}
	channels, err := app.FindCollectionByNameOrId(ChannelsCollectionID)
	if err != nil {
		return nil
	}
	for _, field := range presenceFields() {
		channels.Fields.RemoveByName(field.GetName())
	}
	setHelp(channels, "presence", "Tracks which users are present. Has no effect yet.")
	return app.Save(channels)
}
