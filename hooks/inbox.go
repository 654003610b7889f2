// The inbox: users are told about changes in the collection "notifications".

package hooks

import (
	"context"
	"errors"
	"hash/maphash"
	"log/slog"
	"sync"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/pocketbase/pocketbase/tools/types"

	"herald/notify"
	"herald/pb_migrations"
)

// inboxTopic is the system topic that tells a user about changes in the collection "notifications".
// (On "notifications" itself PocketBase sends its own record events.)
const inboxTopic = "@inbox"

// inboxEvent is what subscribers of the inboxTopic get.
type inboxEvent struct {
	Action string         `json:"action"` // "create", "update" or "delete"
	ID     string         `json:"id"`
	Title  string         `json:"title"`
	Body   string         `json:"body"`
	Data   any            `json:"data"`
	Read   types.DateTime `json:"read"`
	Unread int            `json:"unread"` // unread notifications of the user, after the change
}

// inbox tells users about changes to their notifications.
type inbox struct {
	notifier *notify.Notifier

	// locks[h] is held, for the users with hash h, from counting the unread until the message is
	// queued. Otherwise, of two changes, the older count could arrive last and stay.
	locks [64]sync.Mutex
	seed  maphash.Seed
}

// bindInbox binds to the collection by the id from the migration. So it never touches an
// application's own collection "notifications", and a renamed inbox keeps working.
func bindInbox(app core.App, notifier *notify.Notifier) {
	inbox := &inbox{notifier: notifier, seed: maphash.MakeSeed()}

	// The …Success hooks run after the commit, and not at all for a rolled-back transaction.
	for action, success := range map[string]*hook.TaggedHook[*core.RecordEvent]{
		"create": app.OnRecordAfterCreateSuccess(pb_migrations.InboxCollectionID),
		"update": app.OnRecordAfterUpdateSuccess(pb_migrations.InboxCollectionID),
		"delete": app.OnRecordAfterDeleteSuccess(pb_migrations.InboxCollectionID),
	} {
		success.Bind(&hook.Handler[*core.RecordEvent]{
			Id: "heraldInbox",
			Func: func(e *core.RecordEvent) error {
				if err := inbox.announce(e.App, action, e.Record); err != nil {
					// the change itself succeeded and must not appear as failed
					e.App.Logger().Warn("Failed to announce a notification",
						slog.String("id", e.Record.Id), slog.String("error", err.Error()))
				}
				return e.Next()
			},
		})
	}

	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldInboxCheck",
		Func: func(e *core.ServeEvent) error {
			if reason := inboxMissing(e.App); reason != "" {
				e.App.Logger().Warn("Herald's inbox is off: " + reason)
			}
			return e.Next()
		},
	})
}

// inboxMissing returns why there is no inbox, or "" if there is one.
func inboxMissing(app core.App) string {
	if _, err := app.FindCachedCollectionByNameOrId(pb_migrations.InboxCollectionID); err == nil {
		return ""
	}
	if _, err := app.FindCachedCollectionByNameOrId(pb_migrations.InboxCollectionName); err == nil {
		return "the application has a collection \"notifications\" of its own"
	}
	if users, err := app.FindCachedCollectionByNameOrId("users"); err != nil || !users.IsAuth() {
		return "the application has no auth collection \"users\""
	}
	return "its collection \"notifications\" was removed"
}

// announce tells the owner of record, and nobody else, what happened to it. If an update changes
// the owner, the previous owner is told that the notification is gone.
func (i *inbox) announce(app core.App, action string, record *core.Record) error {
	if app.SubscriptionsBroker().TotalClients() == 0 {
		return nil
	}
	if action == "update" {
		before := record.Original()
		if owner := before.GetString("user"); owner != "" && owner != record.GetString("user") {
			if err := i.tell(app, "delete", before); err != nil {
				return err
			}
		}
	}
	return i.tell(app, action, record)
}

func (i *inbox) tell(app core.App, action string, record *core.Record) error {
	field, ok := record.Collection().Fields.GetByName("user").(*core.RelationField)
	if !ok {
		return errors.New(`the field "user" is no longer a relation`)
	}
	owner := record.GetString("user")
	user := field.CollectionId + ":" + owner
	if !i.notifier.HasSubscribers(inboxTopic, user) {
		return nil // saves the query: most users are not connected
	}

	lock := &i.locks[maphash.String(i.seed, owner)%uint64(len(i.locks))]
	lock.Lock()
	defer lock.Unlock()

	unread, err := app.CountRecords(record.Collection(), dbx.HashExp{"user": owner, "read": ""})
	if err != nil {
		return err
	}
	_, err = i.notifier.SendSystem(context.Background(), notify.Message{
		Topic: inboxTopic,
		To:    notify.Audience{Users: []string{user}},
		Data: inboxEvent{
			Action: action,
			ID:     record.Id,
			Title:  record.GetString("title"),
			Body:   record.GetString("body"),
			Data:   record.Get("data"),
			Read:   record.GetDateTime("read"),
			Unread: int(unread),
		},
	})
	return err
}
