// Package triggers sends messages for changes of records. The records of "notify_triggers" say for
// which changes of which records a message is sent, on which topic and to whom.
//
// Within the transaction of the change, where the filter sees the record as it is at that moment,
// the package determines what fires and gives it a place in the queue. SQLite has one writer at a
// time, so the queue is in the order of the commits. Messages are sent after the commit, on another
// goroutine, in that order; after a rollback they are dropped.
package triggers

import (
	"log/slog"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pocketbase/dbx"
	validation "github.com/pocketbase/ozzo-validation/v4"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/hooks/internal/records"
	"herald/notify"
	"herald/pb_migrations"
)

// Triggers fires the triggers of an application.
type Triggers struct {
	app      core.App
	notifier *notify.Notifier

	loading sync.Mutex // held while the triggers are loaded, so that the last load wins
	off     bool       // the collection is missing, and the log says so; guarded by loading
	known   atomic.Pointer[knownTriggers]

	authors  sync.Map // *core.Record that a request is changing, to its auth *core.Record
	foreseen records.PerTx[foresights]

	sent, failed atomic.Int64

	mu      sync.Mutex // guards the fields below
	queue   []*firing  // in the order of the commits
	sending bool       // a goroutine is sending

	toStore   []*firing      // taken off the queue: to topics with history
	storing   map[string]int // their number by topic, that of the one being sent included
	isStoring bool           // a goroutine is sending them

	closed bool
	idle   *sync.Cond // signaled when sending or storing ends
}

// knownTriggers are all triggers at one time.
type knownTriggers struct {
	byID map[string][]*trigger // by the id of their collection
	// cascades holds the ids of the collections in which a delete may cascade to records that a
	// trigger watches.
	cascades map[string]bool
}

// Bind binds triggers to app. When app terminates, they have flushTimeout to send what is
// committed. They are bound to the collection by the id from the migration.
func Bind(app core.App, notifier *notify.Notifier, flushTimeout time.Duration) *Triggers {
	t := &Triggers{app: app, notifier: notifier}
	t.idle = sync.NewCond(&t.mu)
	t.storing = map[string]int{}
	t.known.Store(&knownTriggers{})
	const id = pb_migrations.TriggersCollectionID

	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldTriggers",
		Func: func(e *core.ServeEvent) error {
			t.load()
			return e.Next()
		},
	})
	app.OnTerminate().Bind(&hook.Handler[*core.TerminateEvent]{
		Id: "heraldTriggers",
		Func: func(e *core.TerminateEvent) error {
			t.close(flushTimeout)
			return e.Next()
		},
		Priority: -10001, // before heraldShutdown, after which nothing can be sent
	})
	app.OnRecordValidate(id).Bind(&hook.Handler[*core.RecordEvent]{Id: "heraldTriggerCheck", Func: t.check})

	reload := func(e *core.RecordEvent) error {
		t.load()
		return e.Next()
	}
	for _, success := range []*hook.TaggedHook[*core.RecordEvent]{
		app.OnRecordAfterCreateSuccess(id), app.OnRecordAfterUpdateSuccess(id), app.OnRecordAfterDeleteSuccess(id),
	} {
		success.Bind(&hook.Handler[*core.RecordEvent]{Id: "heraldTriggers", Func: reload})
	}
	app.OnCollectionUpdateExecute().Bind(&hook.Handler[*core.CollectionEvent]{Id: "heraldTriggers", Func: t.rename})
	for _, success := range []*hook.TaggedHook[*core.CollectionEvent]{
		app.OnCollectionAfterCreateSuccess(), app.OnCollectionAfterUpdateSuccess(), app.OnCollectionAfterDeleteSuccess(),
	} {
		success.Bind(&hook.Handler[*core.CollectionEvent]{
			Id: "heraldTriggers",
			Func: func(e *core.CollectionEvent) error {
				t.load()
				return e.Next()
			},
		})
	}
	for action, execute := range map[string]*hook.TaggedHook[*core.ModelEvent]{
		"create": app.OnModelCreateExecute(), "update": app.OnModelUpdateExecute(),
	} {
		execute.Bind(&hook.Handler[*core.ModelEvent]{
			Id:   "heraldTriggers",
			Func: func(e *core.ModelEvent) error { return t.save(e, action) },
			// The last handler of all: only PocketBase's statement follows. Code of the application
			// may write with an app other than the event's.
			Priority: math.MaxInt,
		})
	}
	app.OnRecordDeleteExecute().Bind(&hook.Handler[*core.RecordEvent]{
		Id:       "heraldTriggers",
		Func:     t.delete,
		Priority: 9998, // after other handlers, which may still change the record
	})
	author := func(e *core.RecordRequestEvent) error {
		if known := t.known.Load(); e.Auth != nil && (len(t.of(e.Record.Collection())) > 0 || known.cascades[e.Record.Collection().Id]) {
			t.authors.Store(e.Record, e.Auth)
			defer t.authors.Delete(e.Record)
		}
		return e.Next()
	}
	for _, request := range []*hook.TaggedHook[*core.RecordRequestEvent]{
		app.OnRecordCreateRequest(), app.OnRecordUpdateRequest(), app.OnRecordDeleteRequest(),
	} {
		request.Bind(&hook.Handler[*core.RecordRequestEvent]{Id: "heraldTriggers", Func: author})
	}
	return t
}

// Sent returns the number of messages sent so far.
func (t *Triggers) Sent() int64 { return t.sent.Load() }

// Failed returns the number of failures so far.
func (t *Triggers) Failed() int64 { return t.failed.Load() }

// of returns the triggers of a collection.
func (t *Triggers) of(collection *core.Collection) []*trigger {
	return t.known.Load().byID[collection.Id]
}

// load loads the triggers. A trigger that is invalid, because a collection or a field was renamed
// or removed, is switched off; the reason is in its record and in the log.
func (t *Triggers) load() {
	t.loading.Lock()
	defer t.loading.Unlock()
	reason := records.Missing(t.app, pb_migrations.TriggersCollectionID, pb_migrations.TriggersCollectionName)
	if reason != "" && !t.off {
		t.app.Logger().Warn("Herald's triggers are off: " + reason)
	}
	next := map[string][]*trigger{}
	if t.off = reason != ""; t.off {
		t.known.Store(&knownTriggers{})
		return
	}
	records := []*core.Record{}
	if err := t.app.RecordQuery(pb_migrations.TriggersCollectionID).OrderBy("rowid").All(&records); err != nil {
		t.app.Logger().Error("Failed to load the triggers; the known ones stay in force", slog.String("error", err.Error()))
		return
	}
	for _, record := range records {
		if !record.GetBool("enabled") {
			continue
		}
		compiled, errs := newTrigger(t.app, t.notifier, record)
		if compiled == nil {
			t.switchOff(record, errs)
			continue
		}
		next[compiled.collection] = append(next[compiled.collection], compiled)
	}
	t.known.Store(&knownTriggers{next, cascadesTo(t.app, next)})
}

// switchOff disables a trigger that no longer compiles.
func (t *Triggers) switchOff(record *core.Record, errs validation.Errors) {
	status := "Switched off: " + errs.Error()
	t.app.Logger().Error("A trigger was switched off", slog.String("trigger", record.GetString("name")), slog.String("error", errs.Error()))
	// bypass the hooks: the record cannot be saved as it is, and load is running
	_, err := t.app.NonconcurrentDB().Update(record.Collection().Name,
		map[string]any{"enabled": false, "status": status}, dbx.HashExp{"id": record.Id}).Execute()
	if err != nil {
		t.app.Logger().Error("Failed to save why a trigger was switched off", slog.String("error", err.Error()))
	}
}

// check refuses an invalid record of a trigger, with errors on its fields. A disabled trigger may
// be invalid.
func (t *Triggers) check(e *core.RecordEvent) error {
	if e.Record.GetBool("enabled") {
		e.Record.Set("status", "")
	}
	err := e.Next()
	errs, ok := err.(validation.Errors)
	if err != nil && !ok {
		return err
	}
	if errs == nil {
		errs = validation.Errors{}
	}
	if len(errs) > 0 || !e.Record.GetBool("enabled") {
		return errs.Filter()
	}
	_, errs = newTrigger(e.App, t.notifier, e.Record)
	return errs.Filter()
}

// save determines which triggers fire for a record that is created or updated. If the application
// has no transaction, save starts one for the one remaining statement, because places in the queue
// taken after it would not be in the order of the commits.
func (t *Triggers) save(e *core.ModelEvent, action string) error {
	record := recordOf(e.Model)
	if record == nil {
		return e.Next()
	}
	candidates := t.candidates(record, action)
	if len(candidates) == 0 {
		return e.Next()
	}
	original := e.App
	defer func() { e.App = original }()
	return original.RunInTransaction(func(tx core.App) error {
		e.App = tx
		auth := t.authorOf(record)
		if action == "update" && slices.ContainsFunc(candidates, func(trigger *trigger) bool { return len(trigger.changed) > 0 }) {
			before := records.Stored(tx, record)
			candidates = slices.DeleteFunc(candidates, func(trigger *trigger) bool { return !trigger.hasChanged(before, record) })
		}
		if err := e.Next(); err != nil {
			return err
		}
		// a copy of its current state: the code that changes it may continue
		t.stand(tx, t.firings(tx, action, record.Fresh(), candidates, auth))
		return nil
	})
}

// recordOf returns the record that model is or wraps, or nil.
func recordOf(model core.Model) *core.Record {
	switch m := model.(type) {
	case *core.Record:
		return m
	case core.RecordProxy:
		return m.ProxyRecord()
	}
	return nil
}

// delete determines which triggers fire for a delete. PocketBase runs deletes in a transaction.
func (t *Triggers) delete(e *core.RecordEvent) error {
	if t.known.Load().cascades[e.Record.Collection().Id] {
		t.foresee(e)
	}
	candidates := t.candidates(e.Record, "delete")
	if len(candidates) == 0 || !e.App.IsTransactional() {
		return e.Next()
	}
	firings := t.firingsOfDelete(e, candidates, t.authorOf(e.Record))
	if err := e.Next(); err != nil {
		return err
	}
	t.stand(e.App, firings)
	return nil
}

// candidates returns the triggers of a record's collection for an action whose message anyone could
// get.
func (t *Triggers) candidates(record *core.Record, action string) (candidates []*trigger) {
	for _, trigger := range t.of(record.Collection()) {
		if slices.Contains(trigger.events, action) && t.isWanted(trigger, record) {
			candidates = append(candidates, trigger)
		}
	}
	return candidates
}

// authorOf returns the auth record of the request that changes record. It is nil for a guest or
// without a request.
func (t *Triggers) authorOf(record *core.Record) *core.Record {
	author, _ := t.authors.Load(record)
	auth, _ := author.(*core.Record)
	return auth
}

// isWanted reports whether anyone could get the message. It makes no query if the topic needs none.
func (t *Triggers) isWanted(trigger *trigger, record *core.Record) bool {
	if trigger.topic.hasRelations() {
		return t.notifier.IsPrefixWanted(trigger.topic.prefix())
	}
	topic, err := trigger.topic.of(t.app, record)
	return err != nil || topic != "" && t.notifier.IsWanted(topic)
}

// firings returns the firings for a record as it is in the database now.
func (t *Triggers) firings(app core.App, action string, record *core.Record, candidates []*trigger, auth *core.Record) (firings []*firing) {
	for _, trigger := range candidates {
		passes, err := trigger.passes(app, record, auth)
		if err != nil {
			t.fail(trigger, err)
		}
		if passes {
			firings = append(firings, &firing{trigger: trigger, action: action, record: record, since: time.Now()})
		}
	}
	return firings
}
