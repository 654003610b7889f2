// Package pb_migrations contains the collections that Herald adds to an application, as migrations
// that are compiled in. It is imported for its side effect.
package pb_migrations

import (
	"fmt"
	"log/slog"

	"github.com/pocketbase/pocketbase/core"
	m "github.com/pocketbase/pocketbase/migrations"
	"github.com/pocketbase/pocketbase/tools/types"
)

// The inbox is recognised by its id, because an application may have its own collection of that
// name.
const (
	InboxCollectionID   = "herald_inbox_01"
	InboxCollectionName = "notifications"
)

func init() {
	m.Register(createInbox, dropInbox)
}

// createInbox adds the collection, unless the application has one of that name or has no users to
// notify.
func createInbox(app core.App) error {
	if _, err := app.FindCollectionByNameOrId(InboxCollectionName); err == nil {
		app.Logger().Warn("No inbox added: the application has its own collection", slog.String("name", InboxCollectionName))
		return nil
	}
	users, err := app.FindCollectionByNameOrId("users")
	if err != nil || !users.IsAuth() {
		app.Logger().Warn(`No inbox added: the application has no auth collection "users"`)
		return nil
	}

	// ids are unique only within a collection. The rule checks the collection as well, because a
	// record of another auth collection may have the user's id.
	owner := fmt.Sprintf("user = @request.auth.id && @request.auth.collectionId = '%s'", users.Id)

	inbox := core.NewBaseCollection(InboxCollectionName, InboxCollectionID)
	inbox.ListRule = types.Pointer(owner)
	inbox.ViewRule = types.Pointer(owner)
	inbox.CreateRule = nil // superusers and the server's own code
	// an owner can mark a notification as read and change nothing else
	inbox.UpdateRule = types.Pointer(owner +
		" && @request.body.user:changed = false && @request.body.title:changed = false" +
		" && @request.body.body:changed = false && @request.body.data:changed = false")
	inbox.DeleteRule = types.Pointer(owner)
	inbox.Fields.Add(
		&core.RelationField{Name: "user", CollectionId: users.Id, MaxSelect: 1, Required: true, CascadeDelete: true, Presentable: true},
		&core.TextField{Name: "title", Presentable: true},
		&core.TextField{Name: "body"},
		&core.JSONField{Name: "data"},
		&core.DateField{Name: "read"},
		&core.AutodateField{Name: "created", OnCreate: true},
	)
	inbox.AddIndex("idx_notifications_user_read", false, "`user`, `read`", "")
	inbox.AddIndex("idx_notifications_user_created", false, "`user`, `created`", "")
	return app.Save(inbox)
}

// dropInbox removes the collection if createInbox created it.
func dropInbox(app core.App) error {
	inbox, err := app.FindCollectionByNameOrId(InboxCollectionID)
	if err != nil {
		return nil
	}
	return app.Delete(inbox)
}
