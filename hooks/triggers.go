// Triggers: the records of "notify_triggers" say for which changes of which records
// a message is sent, where to and to whom.
//
// What fires is found out within the transaction of the change, where the filter
// sees the record as it is just then, and takes a number there: SQLite has one writer
// at a time, so that the numbers are in the order of the commits. It is sent after the
// commit, on another goroutine, in that order; after a rollback it is dropped.

package hooks

import (
	"context"
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

	"herald/notify"
	"herald/pb_migrations"
)

// maxUndecided is how long a firing may be neither committed nor rolled back while
// later ones are: a transaction that panics never tells of its end.
const maxUndecided = 10 * time.Second

// triggers fires the triggers of an application.
type triggers struct {
	app      core.App
	notifier *notify.Notifier

	loading sync.Mutex // held while they are loaded, so that the last to do so is the last
	off     bool       // there are none, and the log says so; guarded by loading
	known   atomic.Pointer[knownTriggers]

	authors  sync.Map // *core.Record that a request is changing, to its auth *core.Record
	foreseen perTx[foresights]

	sent, failed atomic.Int64

	mu      sync.Mutex // guards what follows
	queue   []*firing  // in the order of the commits
	sending bool       // a goroutine sends
	closed  bool
	idle    *sync.Cond // told when sending ends
}

// knownTriggers are all triggers at one time.
type knownTriggers struct {
	byID map[string][]*trigger // by the id of their collection
	// cascades are the ids of the collections of which a deleted record may take others
	// along that a trigger watches.
	cascades map[string]bool
}

// firing is a message of a trigger, on its way.
type firing struct {
	trigger *trigger
	action  string
	record  *core.Record
	since   time.Time
	state   firingState // guarded by triggers.mu

	message notify.Message // made at once for what is deleted, else when it is sent; no topic: not yet
}

type firingState int

const (
	undecided firingState = iota
	committed
	dropped
)

// bindTriggers binds to the collection by the id that the migration gave it.
func bindTriggers(app core.App, notifier *notify.Notifier) *triggers {
	t := &triggers{app: app, notifier: notifier}
	t.idle = sync.NewCond(&t.mu)
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
			// The last of all: behind it there is nothing but PocketBase's statement.
			// Code of the application may write with another app than the event's.
			Priority: math.MaxInt,
		})
	}
	app.OnRecordDeleteExecute().Bind(&hook.Handler[*core.RecordEvent]{
		Id:       "heraldTriggers",
		Func:     t.delete,
		Priority: 9998, // after the handlers of others, who may still change the record
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

// of returns the triggers of a collection.
func (t *triggers) of(collection *core.Collection) []*trigger {
	return t.known.Load().byID[collection.Id]
}

// load reads the triggers. One that is wrong, since a collection or a field was
// renamed or removed, is switched off, with the reason in its record and in the log.
func (t *triggers) load() {
	t.loading.Lock()
	defer t.loading.Unlock()
	reason := missing(t.app, pb_migrations.TriggersCollectionID, pb_migrations.TriggersCollectionName)
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
		t.app.Logger().Error("Failed to load the triggers; those known hold", slog.String("error", err.Error()))
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

// switchOff disables a trigger that does not compile any more.
func (t *triggers) switchOff(record *core.Record, errs validation.Errors) {
	status := "Switched off: " + errs.Error()
	t.app.Logger().Error("A trigger was switched off", slog.String("trigger", record.GetString("name")), slog.String("error", errs.Error()))
	// past the hooks: its record cannot be saved as it is, and load is under way
	_, err := t.app.NonconcurrentDB().Update(record.Collection().Name,
		map[string]any{"enabled": false, "status": status}, dbx.HashExp{"id": record.Id}).Execute()
	if err != nil {
		t.app.Logger().Error("Failed to save why a trigger was switched off", slog.String("error", err.Error()))
	}
}

// check refuses the record of a trigger that is wrong, on its fields. One that is
// disabled may be.
func (t *triggers) check(e *core.RecordEvent) error {
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

// save finds out which triggers fire for a record that is created or updated. Without a
// transaction of the application's it makes one for the one statement that is left to do:
// numbers that were taken after it would not be in the order of the commits.
func (t *triggers) save(e *core.ModelEvent, action string) error {
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
			before := stored(tx, record)
			candidates = slices.DeleteFunc(candidates, func(trigger *trigger) bool { return !trigger.hasChanged(before, record) })
		}
		if err := e.Next(); err != nil {
			return err
		}
		// as it is now: the code that changes it may go on
		t.stand(tx, t.firings(tx, action, record.Fresh(), candidates, auth))
		return nil
	})
}

// recordOf returns the record that model is, nil where it is none.
func recordOf(model core.Model) *core.Record {
	switch m := model.(type) {
	case *core.Record:
		return m
	case core.RecordProxy:
		return m.ProxyRecord()
	}
	return nil
}

// delete finds out which triggers fire for a delete, of which PocketBase makes a
// transaction.
func (t *triggers) delete(e *core.RecordEvent) error {
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

// candidates returns the triggers of a record's collection for an action, whose message
// anybody could get.
func (t *triggers) candidates(record *core.Record, action string) (candidates []*trigger) {
	for _, trigger := range t.of(record.Collection()) {
		if slices.Contains(trigger.events, action) && t.isWanted(trigger, record) {
			candidates = append(candidates, trigger)
		}
	}
	return candidates
}

// authorOf returns who makes the request that changes record; nil for a guest, or where
// there is no request.
func (t *triggers) authorOf(record *core.Record) *core.Record {
	author, _ := t.authors.Load(record)
	auth, _ := author.(*core.Record)
	return auth
}

// isWanted reports whether anybody could get the message, without a query where the
// topic needs none.
func (t *triggers) isWanted(trigger *trigger, record *core.Record) bool {
	if trigger.topic.hasRelations() {
		return t.notifier.IsPrefixWanted(trigger.topic.prefix())
	}
	topic, err := trigger.topic.of(t.app, record)
	return err != nil || topic != "" && t.notifier.IsWanted(topic)
}

// stand puts what fires in a transaction into the queue, until it is known how that ends.
func (t *triggers) stand(tx core.App, firings []*firing) {
	if len(firings) == 0 {
		return
	}
	t.mu.Lock()
	t.queue = append(t.queue, firings...)
	t.mu.Unlock()
	tx.TxInfo().OnComplete(func(txErr error) error {
		t.decide(firings, txErr == nil)
		return nil
	})
}

// firings returns what fires for a record as the database has it now.
func (t *triggers) firings(app core.App, action string, record *core.Record, candidates []*trigger, auth *core.Record) (firings []*firing) {
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

// decide says what became of a transaction.
func (t *triggers) decide(firings []*firing, isCommitted bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range firings {
		if f.state = dropped; isCommitted {
			f.state = committed
		}
	}
	if !t.sending && !t.closed {
		t.sending = true
		go t.send()
	}
}

// send sends what is decided, in order, until nothing is.
func (t *triggers) send() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		f := t.next()
		if f == nil {
			t.sending = false
			t.idle.Broadcast()
			return
		}
		t.mu.Unlock()
		t.fire(f)
		t.mu.Lock()
	}
}

// next takes the next committed firing off the queue; nil where there is none. mu is
// held. That there is an undecided one before it is the matter of a moment: its
// transaction is over, as a later one has begun.
func (t *triggers) next() *firing {
	for len(t.queue) > 0 {
		f := t.queue[0]
		if f.state == undecided {
			left := maxUndecided - time.Since(f.since)
			if left > 0 {
				return t.waitFor(left)
			}
			f.state = dropped
		}
		t.queue[0] = nil
		t.queue = t.queue[1:]
		if f.state == committed {
			return f
		}
	}
	t.queue = nil
	return nil
}

// waitFor sees to it that the queue is looked at again when its head is overdue.
func (t *triggers) waitFor(left time.Duration) *firing {
	if slices.ContainsFunc(t.queue, func(f *firing) bool { return f.state == committed }) && !t.closed {
		time.AfterFunc(left, func() { t.decide(nil, true) })
	}
	return nil
}

// fire sends the message of f.
func (t *triggers) fire(f *firing) {
	trigger := f.trigger
	defer func() {
		if cause := recover(); cause != nil {
			t.app.Logger().Error("Panic in a trigger", slog.String("trigger", trigger.name), slog.Any("cause", cause))
		}
	}()
	switch {
	case f.message.Topic == "":
		if t.compose(t.app, f); f.message.Topic == "" {
			return
		}
	case !t.notifier.IsWanted(f.message.Topic): // any more
		return
	}
	if _, err := t.notifier.Send(context.Background(), f.message); err != nil {
		t.fail(trigger, err)
		return
	}
	t.sent.Add(1)
}

// compose makes the message of f, unless nobody could get it. A failure is noted.
func (t *triggers) compose(app core.App, f *firing) {
	trigger := f.trigger
	topic, err := trigger.topic.of(app, f.record)
	if err != nil {
		t.fail(trigger, err)
		return
	}
	if topic == "" || !t.notifier.IsWanted(topic) {
		return
	}
	data, err := trigger.payloadOf(app, f.action, f.record)
	if err != nil {
		t.fail(trigger, err)
		return
	}
	to := trigger.to
	if trigger.toField != "" {
		relation := f.record.Collection().Fields.GetByName(trigger.toField).(*core.RelationField)
		to.Users = []string{} // nobody, not everybody
		for _, id := range f.record.GetStringSlice(trigger.toField) {
			to.Users = append(to.Users, relation.CollectionId+":"+id)
		}
	}
	f.message = notify.Message{Topic: topic, Data: data, To: to}
}

// fail notes a failure, which never is one of the save.
func (t *triggers) fail(trigger *trigger, err error) {
	t.failed.Add(1)
	t.app.Logger().Error("A trigger failed", slog.String("trigger", trigger.name), slog.String("error", err.Error()))
}

// close waits until what is committed is sent, or timeout is over.
func (t *triggers) close(timeout time.Duration) {
	expired := time.AfterFunc(timeout, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.closed, t.queue = true, nil
		t.idle.Broadcast()
	})
	defer expired.Stop()
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.sending {
		t.idle.Wait()
	}
	t.closed, t.queue = true, nil
}
