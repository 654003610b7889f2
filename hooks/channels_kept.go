// A copy of the channels, in case their collection disappears, for example because an import of
// collections deletes whatever it does not contain. What the channels restricted stays closed until
// a superuser decides otherwise. Called by channels.go.

package hooks

import (
	"database/sql"
	"encoding/json/jsontext"
	"encoding/json/v2"
	"errors"
	"log/slog"
	"slices"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/types"

	"herald/pb_migrations"
)

// keptChannels is a copy of the channels in the application's database.
type keptChannels struct {
	// Missing means that the collection has disappeared since.
	Missing bool             `json:"missing"`
	Records []jsontext.Value `json:"records"`

	saved string // as it is in the database; empty if it is not there
}

// keep saves a copy of the channels if it differs from the previous one.
func (c *channels) keep(before keptChannels, records []*core.Record) {
	kept := keptChannels{Records: []jsontext.Value{}, saved: before.saved}
	for _, record := range records {
		encoded, err := json.Marshal(record.FieldsData(), json.Deterministic(true))
		if err != nil {
			c.logKept("Failed to keep a copy of the channels", err)
			return
		}
		kept.Records = append(kept.Records, encoded)
	}
	c.save(kept)
}

func (c *channels) save(kept keptChannels) {
	encoded, err := json.Marshal(kept)
	if err != nil || string(encoded) == kept.saved {
		return
	}
	// not through app.Save, which would reload PocketBase's settings
	_, err = c.app.NonconcurrentDB().NewQuery("INSERT INTO _params (id, value, created, updated) VALUES ({:id}, {:value}, {:now}, {:now}) " +
		"ON CONFLICT (id) DO UPDATE SET value = excluded.value, updated = excluded.updated").
		Bind(dbx.Params{"id": pb_migrations.ChannelsParam, "value": string(encoded), "now": types.NowDateTime().String()}).Execute()
	if err != nil {
		c.logKept("Failed to keep a copy of the channels", err)
	}
}

// readKept returns the copy, or an empty one if there is none.
func (c *channels) readKept() (kept keptChannels, err error) {
	err = c.app.DB().Select("value").From("_params").Where(dbx.HashExp{"id": pb_migrations.ChannelsParam}).Row(&kept.saved)
	if errors.Is(err, sql.ErrNoRows) {
		return kept, nil
	}
	if err == nil {
		err = json.Unmarshal([]byte(kept.saved), &kept)
	}
	return kept, err
}

// records returns the channels of the copy as records of collection.
func (k keptChannels) records(collection *core.Collection) ([]*core.Record, error) {
	records := make([]*core.Record, 0, len(k.Records))
	for _, encoded := range k.Records {
		values := map[string]any{}
		if err := json.Unmarshal(encoded, &values); err != nil {
			return nil, err
		}
		record := core.NewRecord(collection)
		record.Load(values)
		records = append(records, record)
	}
	return records, nil
}

// besides returns the channels of the copy, as records of collection, whose id and pattern are both
// missing among present.
func (k keptChannels) besides(present []*core.Record, collection *core.Collection) ([]*core.Record, error) {
	records, err := k.records(collection)
	return slices.DeleteFunc(records, func(record *core.Record) bool {
		return slices.ContainsFunc(present, func(other *core.Record) bool {
			return other.Id == record.Id || other.GetString("pattern") == record.GetString("pattern")
		})
	}), err
}

// closed returns the channels of the copy that are missing among present. What is open to everyone
// stays open; everything else is for superusers only, because the rules cannot be evaluated without
// the collection.
func (k keptChannels) closed(present []*core.Record) ([]*core.Record, error) {
	records, err := k.besides(present, pb_migrations.CurrentChannelsCollection())
	for _, record := range records {
		for _, field := range []string{"subscribeRule", "publishRule", "presenceRule"} {
			if record.GetString(field) != "*" {
				record.Set(field, "")
			}
		}
	}
	return records, err
}

// restore gives the collection its channels back once it exists again. If the collection is still
// missing at the start of the server, restore creates it. If it did not disappear, nothing happens.
func (c *channels) restore(isStart bool) {
	kept, err := c.readKept()
	if err != nil || !kept.Missing || len(kept.Records) == 0 {
		return // load reports an error
	}
	err = c.app.RunInTransaction(func(tx core.App) error {
		collection, err := tx.FindCollectionByNameOrId(pb_migrations.ChannelsCollectionID)
		if err != nil {
			if _, err := tx.FindCollectionByNameOrId(pb_migrations.ChannelsCollectionName); err == nil || !isStart {
				return nil // the name is taken, or a superuser may still import it
			}
			collection = pb_migrations.CurrentChannelsCollection()
			if err := tx.Save(collection); err != nil {
				return err
			}
		}
		present, err := findChannels(tx)
		if err != nil {
			return err
		}
		records, err := kept.besides(present, collection)
		if err != nil {
			return err
		}
		for _, record := range records {
			// a rule that no longer compiles closes its channel, as always
			if err := tx.SaveNoValidate(record); err != nil {
				return err
			}
		}
		tx.Logger().Warn("The channels are back, as they were before their collection disappeared", slog.Int("channels", len(records)))
		return nil
	})
	if err != nil {
		c.logKept("Failed to restore the channels; what they restricted stays closed", err)
	}
}

func (c *channels) logKept(message string, err error) {
	c.app.Logger().Error(message, slog.String("error", err.Error()))
}
