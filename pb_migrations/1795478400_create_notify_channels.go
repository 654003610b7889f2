package pb_migrations

import (
	"log/slog"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"
	m "github.com/pocketbase/pocketbase/migrations"
	"github.com/pocketbase/pocketbase/tools/types"
)

// The channels too are recognised by their collection's id.
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
	return app.Save(NewChannelsCollection())
}

// NewChannelsCollection returns the collection as it is made.
func NewChannelsCollection() *core.Collection {
	const rule = `Empty: superusers only. *: everyone. Else a filter, with @request.auth.*, @collection.*, and {room} of the pattern as @request.query.room.`

	channels := core.NewBaseCollection(ChannelsCollectionName, ChannelsCollectionID) // without API rules: superusers only
	channels.Fields.Add(
		&core.TextField{Name: "pattern", Required: true, Presentable: true, Max: 255,
			Help: "The topics of the channel: news, chat/{room}, files/{path...}. The most specific pattern wins."},
		&core.TextField{Name: "subscribeRule", Help: "Who may listen. " + rule},
		&core.TextField{Name: "publishRule", Help: "Who may publish from a client. The server's own code always may. " + rule},
		&core.TextField{Name: "presenceRule", Help: "Who may see who is there. Has no effect yet. " + rule},
		&core.NumberField{Name: "history", OnlyInt: true, Min: types.Pointer(0.0),
			Help: "How many messages are kept for each topic, for those who come back; 0: none."},
		&core.NumberField{Name: "historyTTL", OnlyInt: true, Min: types.Pointer(0.0),
			Help: "For how many seconds they are kept; 0: for any time."},
		&core.BoolField{Name: "presence", Help: "Keep track of who is there. Has no effect yet."},
		&core.NumberField{Name: "rateLimit", Min: types.Pointer(0.0),
			Help: "How many messages one user (or IP, for guests) may publish a second; 0: any number."},
		&core.NumberField{Name: "maxSize", OnlyInt: true, Min: types.Pointer(0.0),
			Help: "The largest data of a published message, in bytes of JSON; 0: as large as the server takes."},
		&core.AutodateField{Name: "created", OnCreate: true},
		&core.AutodateField{Name: "updated", OnCreate: true, OnUpdate: true},
	)
	channels.AddIndex("idx_notify_channels_pattern", true, "`pattern`", "")
	return channels
}

// ChannelsParam is the id of the row of PocketBase's table _params in which the server
// keeps a copy of the channels, for when their collection disappears.
const ChannelsParam = "heraldChannels"

// dropChannels removes the collection if it is the one that createChannels made.
func dropChannels(app core.App) error {
	channels, err := app.FindCollectionByNameOrId(ChannelsCollectionID)
	if err != nil {
		return nil
	}
	// whoever goes down a migration does not want what the channels said
	if _, err := app.DB().Delete("_params", dbx.HashExp{"id": ChannelsParam}).Execute(); err != nil {
		return err
	}
	return app.Delete(channels)
}
