package pb_migrations

import (
	"log/slog"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"
	m "github.com/pocketbase/pocketbase/migrations"
	"github.com/pocketbase/pocketbase/tools/types"
)

// The channels are recognised by their collection's id as well.
const (
	ChannelsCollectionID   = "herald_chans_01"
	ChannelsCollectionName = "notify_channels"
)

func init() {
	m.Register(createChannels, dropChannels)
}

// createChannels adds the collection, unless the application has one of that name.
func createChannels(app core.App) error {
	if _, err := app.FindCollectionByNameOrId(ChannelsCollectionName); err == nil {
		app.Logger().Warn("No channels added: the application has its own collection", slog.String("name", ChannelsCollectionName))
		return nil
	}
	return app.Save(newChannelsCollection())
}

// newChannelsCollection returns the collection as the migration creates it.
func newChannelsCollection() *core.Collection {
	const rule = `Empty means superusers only, * means everyone. Anything else is a filter with @request.auth.*, @collection.*, and the pattern's {room} as @request.query.room.`

	channels := core.NewBaseCollection(ChannelsCollectionName, ChannelsCollectionID) // without API rules: superusers only
	channels.Fields.Add(
		&core.TextField{Name: "pattern", Required: true, Presentable: true, Max: 255,
			Help: "The topics of the channel: news, chat/{room}, files/{path...}. The most specific pattern wins."},
		&core.TextField{Name: "subscribeRule", Help: "Controls who may subscribe. " + rule},
		&core.TextField{Name: "publishRule", Help: "Controls which clients may publish. The server's own code always may. " + rule},
		&core.TextField{Name: "presenceRule", Help: "Controls who may see which users are present. Has no effect yet. " + rule},
		&core.NumberField{Name: "history", OnlyInt: true, Min: types.Pointer(0.0),
			Help: "How many messages per topic are kept for clients that reconnect; 0 keeps none."},
		&core.NumberField{Name: "historyTTL", OnlyInt: true, Min: types.Pointer(0.0),
			Help: "How many seconds they are kept; 0 keeps them indefinitely."},
		&core.BoolField{Name: "presence", Help: "Tracks which users are present. Has no effect yet."},
		&core.NumberField{Name: "rateLimit", Min: types.Pointer(0.0),
			Help: "How many messages per second one user (or IP, for guests) may publish; 0 means no limit."},
		&core.NumberField{Name: "maxSize", OnlyInt: true, Min: types.Pointer(0.0),
			Help: "The maximum size of a published message's data, in bytes of JSON; 0 means the server's own limit."},
		&core.AutodateField{Name: "created", OnCreate: true},
		&core.AutodateField{Name: "updated", OnCreate: true, OnUpdate: true},
	)
	channels.AddIndex("idx_notify_channels_pattern", true, "`pattern`", "")
	return channels
}

// ChannelsParam is the id of the row in PocketBase's table _params where the server keeps a copy of
// the channels, in case their collection disappears.
const ChannelsParam = "heraldChannels"

// dropChannels removes the collection if createChannels created it.
func dropChannels(app core.App) error {
	channels, err := app.FindCollectionByNameOrId(ChannelsCollectionID)
	if err != nil {
		return nil
	}
	// reverting the migration drops the copy of the channels as well
	if _, err := app.DB().Delete("_params", dbx.HashExp{"id": ChannelsParam}).Execute(); err != nil {
		return err
	}
	return app.Delete(channels)
}
