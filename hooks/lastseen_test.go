package hooks_test

import (
	"testing"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/pb_migrations"
)

func seenRow(t testing.TB, app core.App, user *core.Record) *core.Record {
	t.Helper()
	record, err := app.FindFirstRecordByData(pb_migrations.LastSeenCollectionID, "user", user.Id)
	if err != nil {
		t.Fatal(err)
	}
	return record
}

// TestLastSeen: what is written when the server stops, and what a crash leaves is corrected.
func TestLastSeen(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(nil))
	saves := 0
	w.OnRecordAfterUpdateSuccess("users").BindFunc(func(e *core.RecordEvent) error { saves++; return e.Next() })
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	ann := server.Subscribe(t, w.ann, "room/1", "room/2")
	watcher.await(t, w.ann)
	ann.Set(t, w.ann, "room/2") // is still present
	server.Subscribe(t, w.bob, "room/1")
	watcher.await(t, w.bob)

	// as at the end of the process
	event := &core.TerminateEvent{App: w}
	if err := w.OnTerminate().Trigger(event, func(e *core.TerminateEvent) error { return nil }); err != nil {
		t.Fatal(err)
	}
	for _, user := range []*core.Record{w.ann, w.bob} {
		if row := seenRow(t, w, user); row.GetBool("online") || row.GetDateTime("at").IsZero() {
			t.Errorf("%v", row)
		}
	}
	if saves > 0 {
		t.Error("a user was saved")
	}

	// a server that is killed leaves somebody online
	_, err := w.NonconcurrentDB().Update(pb_migrations.LastSeenCollectionName, dbx.Params{"online": true, "at": "2020-01-01 00:00:00.000Z"}, dbx.HashExp{"user": w.ann.Id}).Execute()
	if err != nil {
		t.Fatal(err)
	}
	copyOf := t.TempDir()
	if _, err := w.DB().NewQuery("VACUUM INTO {:path}").Bind(dbx.Params{"path": copyOf + "/data.db"}).Execute(); err != nil {
		t.Fatal(err)
	}
	again := pbtest.NewAppFrom(t, pbtest.Folder(copyOf), register)
	pbtest.Serve(t, again)
	if row := seenRow(t, again, w.ann); row.GetBool("online") || row.GetDateTime("at").Time().Year() == 2020 {
		t.Errorf("online %v, at %v", row.GetBool("online"), row.GetDateTime("at"))
	}

	// somebody who is deleted is forgotten
	if err := again.Delete(mustFindRecord(t, again, "users", w.bob.Id)); err != nil {
		t.Fatal(err)
	}
	if _, err := again.FindFirstRecordByData(pb_migrations.LastSeenCollectionID, "user", w.bob.Id); err == nil {
		t.Error("bob is remembered")
	}
}

func mustFindRecord(t testing.TB, app core.App, collection, id string) *core.Record {
	t.Helper()
	record, err := app.FindRecordById(collection, id)
	if err != nil {
		t.Fatal(err)
	}
	return record
}

// TestLastSeenOfDeletedUser: nothing is kept of somebody who is deleted while they are present.
func TestLastSeenOfDeletedUser(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, presenceChannel(nil))
	server := pbtest.Serve(t, w)
	watcher := watch(t, server, nil, "room/1")
	server.Subscribe(t, w.ann, "room/1")
	server.Subscribe(t, w.bob, "room/1")
	watcher.await(t, w.ann, w.bob)
	if err := w.Delete(w.ann); err != nil {
		t.Fatal(err)
	}
	watcher.await(t, w.bob)
	event := &core.TerminateEvent{App: w}
	if err := w.OnTerminate().Trigger(event, func(e *core.TerminateEvent) error { return nil }); err != nil {
		t.Fatal(err)
	}
	seenRow(t, w, w.bob)
	if row, err := w.FindFirstRecordByData(pb_migrations.LastSeenCollectionID, "user", w.ann.Id); err == nil {
		t.Errorf("there is %v", row)
	}
}
