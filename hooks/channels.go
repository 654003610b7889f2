// Channels: the records of "notify_channels" are the engine's rules. The engine is told before
// anything changes that a rule may depend on.

package hooks

import (
	"fmt"
	"log/slog"
	"sync"

	validation "github.com/pocketbase/ozzo-validation/v4"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/hooks/internal/records"
	"herald/notify"
	"herald/pb_migrations"
)

// recheckEvery is the cron expression of the recheck of all subscriptions. It covers what no hook
// reports: rules that look at the time, and writes that bypass PocketBase.
const recheckEvery = "*/5 * * * *"

// channels keeps the engine's channels in step with the collection.
type channels struct {
	app      core.App
	notifier *notify.Notifier

	mu    sync.Mutex // held while the channels are loaded, so that the last load wins
	off   bool       // the collection is missing, and the log says so
	count int        // number of channels in force

	changes records.PerTx[txChanges]
}

// bindChannels binds to the collection by the id from the migration.
func bindChannels(app core.App, notifier *notify.Notifier) {
	c := &channels{app: app, notifier: notifier}
	const id = pb_migrations.ChannelsCollectionID

	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldChannels",
		Func: func(e *core.ServeEvent) error {
			c.restore(true)
			if _, err := c.load(); err != nil {
				return fmt.Errorf("the channels cannot be loaded, and without them private topics would be open: %w", err)
			}
			return e.Next()
		},
	})
	app.OnRecordValidate(id).Bind(&hook.Handler[*core.RecordEvent]{
		Id:   "heraldChannelCheck",
		Func: c.check,
	})

	for _, execute := range []*hook.TaggedHook[*core.RecordEvent]{
		app.OnRecordCreateExecute(), app.OnRecordUpdateExecute(), app.OnRecordDeleteExecute(),
	} {
		execute.Bind(&hook.Handler[*core.RecordEvent]{
			Id:   "heraldChange",
			Func: c.change,
			// after other handlers, which may still change the record
			Priority: 9999,
		})
	}
	reload := func(e *core.CollectionEvent) error {
		if e.Type == core.ModelEventTypeCreate && e.Collection.Id == id {
			c.restore(false)
		}
		notifier.CollectionChanged(e.Collection)
		if count, _ := c.load(); count > 0 { // a rule may look at something that was removed or renamed
			notifier.ChangeOfAll().End(true)
		}
		return e.Next()
	}
	for _, success := range []*hook.TaggedHook[*core.CollectionEvent]{
		app.OnCollectionAfterCreateSuccess(), app.OnCollectionAfterUpdateSuccess(), app.OnCollectionAfterDeleteSuccess(),
	} {
		success.Bind(&hook.Handler[*core.CollectionEvent]{Id: "heraldChannels", Func: reload})
	}

	app.Cron().MustAdd("heraldRecheck", recheckEvery, func() {
		_, _ = c.load()
		if _, err := notifier.Recheck(notify.RecheckFilter{}); err != nil {
			app.Logger().Error("Failed to recheck the subscriptions", slog.String("error", err.Error()))
		}
	})
}

// load gives the engine the current channels. It returns how many channels are or, until now, were
// in force. If they cannot be loaded, the known ones stay in force; the error is logged.
func (c *channels) load() (count int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.count
	records, err := c.find()
	if err != nil {
		c.app.Logger().Error("Failed to load the channels; the known ones stay in force", slog.String("error", err.Error()))
		return before, err
	}
	c.notifier.SetChannels(records)
	c.count = len(records)
	return max(before, c.count), nil
}

// find returns the records of the channels. If their collection has disappeared, it returns those
// of the copy, closed.
func (c *channels) find() ([]*core.Record, error) {
	reason := records.Missing(c.app, pb_migrations.ChannelsCollectionID, pb_migrations.ChannelsCollectionName)
	kept, err := c.readKept()
	if err != nil {
		return nil, fmt.Errorf("read the copy of the channels: %w", err)
	}
	if reason == "" {
		c.off = false
		records, err := findChannels(c.app)
		if err != nil {
			return nil, err
		}
		if kept.Missing { // the collection is back, but maybe not all of its channels yet
			closed, err := kept.closed(records)
			if err != nil || len(closed) > 0 {
				return append(records, closed...), err
			}
		}
		c.keep(kept, records)
		return records, nil
	}
	isNews := !c.off
	c.off = true
	if len(kept.Records) == 0 {
		if isNews {
			c.app.Logger().Warn("Herald's channels are off: " + reason)
		}
		return nil, nil
	}
	if isNews {
		c.app.Logger().Error("Herald's channels are off: "+reason+". Topics that they restricted stay closed to all but superusers. "+
			"The channels return when the collection is imported again or the server restarts; to remove them for good, delete them then",
			slog.Int("channels", len(kept.Records)))
	}
	kept.Missing = true
	c.save(kept)
	return kept.closed(nil)
}

// findChannels returns the records of all channels, oldest first.
func findChannels(app core.App) ([]*core.Record, error) {
	records := []*core.Record{}
	err := app.RecordQuery(pb_migrations.ChannelsCollectionID).OrderBy("rowid").All(&records)
	return records, err
}

// check refuses an invalid record of a channel, with errors on its fields.
func (c *channels) check(e *core.RecordEvent) error {
	err := e.Next()
	errs, ok := err.(validation.Errors)
	if err != nil && !ok {
		return err
	}
	others, err := findChannels(e.App)
	if err != nil {
		return err
	}
	if errs == nil {
		errs = validation.Errors{}
	}
	for _, fieldErr := range c.notifier.CheckChannel(e.App, e.Record, others) {
		if errs[fieldErr.Field] == nil { // otherwise PocketBase has already reported an error
			errs[fieldErr.Field] = validation.NewError(fieldErr.Code(), fieldErr.Detail)
		}
	}
	pattern := e.Record.GetString("pattern")
	if reason := c.notifier.ReservedByRecords(pattern); reason != "" && pattern != e.Record.Original().GetString("pattern") {
		e.App.Logger().Warn("A channel's pattern matches topics to which it does not apply: those with the id of a record are reserved "+reason,
			slog.String("pattern", pattern))
	}
	return errs.Filter()
}

// txChanges are changes that are committed together.
type txChanges struct {
	list       []*notify.Change
	hasChannel bool
}

// end ends the changes of a transaction.
func (c *channels) end(changes txChanges, committed bool) {
	if changes.hasChannel && committed {
		_, _ = c.load()
	}
	notify.EndAll(committed, changes.list...)
}

// change reports a change of a record to the engine, before and after its commit.
func (c *channels) change(e *core.RecordEvent) error {
	isChannel := e.Record.Collection().Id == pb_migrations.ChannelsCollectionID
	if !isChannel && !c.notifier.DependsOn(e.Record.Collection()) {
		return e.Next()
	}
	var before, after *core.Record
	if e.Type != core.ModelEventTypeCreate {
		before = records.Stored(e.App, e.Record)
	}
	if e.Type != core.ModelEventTypeDelete {
		after = e.Record
	}
	var change *notify.Change
	if isChannel {
		change = c.notifier.ChangeOfChannel(before, after)
	} else if change = c.notifier.ChangeOfRecord(before, after); change == nil {
		return e.Next()
	}

	if e.App.IsTransactional() {
		c.changes.With(e.App.TxInfo(), c.end, func(all *txChanges) {
			all.list = append(all.list, change)
			all.hasChannel = all.hasChannel || isChannel
		})
		return e.Next()
	}
	changes := txChanges{[]*notify.Change{change}, isChannel}
	committed := false
	defer func() { c.end(changes, committed) }() // also if a handler panics
	err := e.Next()
	committed = err == nil
	return err
}
