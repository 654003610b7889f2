// Last seen: the collection "notify_last_seen" says when each user was last present on a topic with
// presence. It is written in one transaction now and then, and when the server stops.

package hooks

import (
	"encoding/json/v2"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/pocketbase/pocketbase/tools/types"

	"herald/pb_migrations"
)

// lastSeenEvery is how often changes are written. Only tests change it.
var lastSeenEvery = 30 * time.Second

// lastSeen collects who has come and left. Users are known by their record id, which is unique over
// all auth collections, so that renaming a collection changes nothing.
type lastSeen struct {
	app core.App

	mu      sync.Mutex           // guards the fields below
	topics  map[string]int       // on how many each user is present
	changed map[string]seen      // since the last write, by user
	deleted map[string]time.Time // users who were deleted a moment ago, and when: changes about them may still arrive
	timer   *time.Timer          // runs while somebody is present or something has changed
	closed  bool

	writing sync.Mutex // held while changes are written, so that the last one wins
}

// seen is when a user was last present, and whether they are.
type seen struct {
	at       int64 // Unix milliseconds
	isOnline bool
}

func newLastSeen(app core.App) *lastSeen {
	return &lastSeen{app: app, topics: map[string]int{}, changed: map[string]seen{}, deleted: map[string]time.Time{}}
}

// bind makes it correct what a crash has left behind, and write at the end.
func (l *lastSeen) bind() {
	l.app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldLastSeen",
		Func: func(e *core.ServeEvent) error {
			if err := l.putRight(); err != nil {
				e.App.Logger().Error("Failed to correct who is online", slog.String("error", err.Error()))
			}
			return e.Next()
		},
	})
	l.app.OnTerminate().Bind(&hook.Handler[*core.TerminateEvent]{
		Id: "heraldLastSeen",
		Func: func(e *core.TerminateEvent) error {
			l.close()
			return e.Next()
		},
	})
	l.app.OnRecordAfterCreateSuccess().Bind(&hook.Handler[*core.RecordEvent]{
		Id: "heraldLastSeen",
		Func: func(e *core.RecordEvent) error {
			if e.Record.Collection().IsAuth() { // with the id of one that was deleted, as by an import
				l.mu.Lock()
				delete(l.deleted, e.Record.Id)
				l.mu.Unlock()
			}
			return e.Next()
		},
	})
	l.app.OnRecordAfterDeleteSuccess().Bind(&hook.Handler[*core.RecordEvent]{
		Id: "heraldLastSeen",
		Func: func(e *core.RecordEvent) error {
			if e.Record.Collection().IsAuth() {
				if err := l.forget(e.App, e.Record.Id); err != nil {
					e.App.Logger().Error("Failed to forget when a user was last seen", slog.String("error", err.Error()))
				}
			}
			return e.Next()
		},
	})
}

// forget forgets a user, who is gone.
func (l *lastSeen) forget(app core.App, user string) error {
	l.writing.Lock() // what is being written may be about the user
	defer l.writing.Unlock()
	l.mu.Lock()
	delete(l.topics, user)
	delete(l.changed, user)
	l.deleted[user] = time.Now()
	l.writeLater()
	l.mu.Unlock()
	table, ok := l.table()
	if !ok {
		return nil
	}
	_, err := app.NonconcurrentDB().Delete(table, dbx.HashExp{"user": user}).Execute()
	return err
}

// note notes which users have come to and left a topic. A user in both lists has a new name.
func (l *lastSeen) note(join, leave []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now().UnixMilli()
	for _, user := range leave {
		if l.topics[user] == 0 {
			continue
		}
		if l.topics[user]--; l.topics[user] == 0 {
			delete(l.topics, user)
			l.changed[user] = seen{now, false}
		}
	}
	for _, user := range join {
		if _, isDeleted := l.deleted[user]; isDeleted {
			continue
		}
		if l.topics[user]++; l.topics[user] == 1 {
			l.changed[user] = seen{now, true}
		}
	}
	l.writeLater()
}

// writeLater starts the timer if there will be something to write. mu is held.
func (l *lastSeen) writeLater() {
	if l.timer == nil && !l.closed && len(l.topics)+len(l.changed)+len(l.deleted) > 0 {
		l.timer = time.AfterFunc(lastSeenEvery, func() {
			l.write()
			l.mu.Lock()
			defer l.mu.Unlock()
			l.timer = nil
			l.writeLater()
		})
	}
}

// recordID returns the record id of "COLLECTION:RECORD_ID".
func recordID(user string) string {
	_, id, _ := strings.Cut(user, ":")
	return id
}

// table returns the name of the collection's table; false if the collection is gone.
func (l *lastSeen) table() (string, bool) {
	collection, err := l.app.FindCachedCollectionByNameOrId(pb_migrations.LastSeenCollectionID)
	if err != nil {
		return "", false
	}
	return collection.Name, true
}

// write writes what has changed, in one transaction. If that fails, it is tried again with what
// changes next.
func (l *lastSeen) write() {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	changed := l.changed
	l.changed = map[string]seen{}
	maps.DeleteFunc(l.deleted, func(_ string, at time.Time) bool { return time.Since(at) > lastSeenEvery })
	isNeeded := len(changed)+len(l.topics) > 0
	l.mu.Unlock()

	table, ok := l.table()
	if !ok || !isNeeded {
		return
	}
	err := l.app.RunInTransaction(func(tx core.App) error {
		for user, s := range changed {
			if err := saveSeen(tx, table, user, s); err != nil {
				return err
			}
		}
		return saveAlive(tx)
	})
	if err == nil {
		return
	}
	l.app.Logger().Error("Failed to write when users were last seen", slog.String("error", err.Error()))
	l.mu.Lock()
	defer l.mu.Unlock()
	for user, s := range changed {
		if _, isNewer := l.changed[user]; !isNewer {
			l.changed[user] = s
		}
	}
}

// saveSeen writes a row. It bypasses the record's events: nothing about the user's rights changes.
func saveSeen(tx core.App, table, user string, s seen) error {
	at, err := types.ParseDateTime(time.UnixMilli(s.at))
	if err != nil {
		return err
	}
	_, err = tx.DB().NewQuery("INSERT INTO {{" + table + "}} ([[id]], [[user]], [[at]], [[online]]) VALUES ({:id}, {:user}, {:at}, {:online}) " +
		"ON CONFLICT ([[user]]) DO UPDATE SET [[at]] = excluded.[[at]], [[online]] = excluded.[[online]]").
		Bind(dbx.Params{"id": core.GenerateDefaultRandomId(), "user": user, "at": at.String(), "online": s.isOnline}).Execute()
	return err
}

// saveAlive records that the server is running.
func saveAlive(tx core.App) error {
	now := types.NowDateTime()
	value, err := json.Marshal(now)
	if err != nil {
		return err
	}
	_, err = tx.DB().NewQuery("INSERT INTO _params (id, value, created, updated) VALUES ({:id}, {:value}, {:now}, {:now}) " +
		"ON CONFLICT (id) DO UPDATE SET value = excluded.value, updated = excluded.updated").
		Bind(dbx.Params{"id": pb_migrations.LastSeenParam, "value": string(value), "now": now.String()}).Execute()
	return err
}

// putRight corrects the rows of users who were online when the server died: they were last seen when
// it was last known to run.
func (l *lastSeen) putRight() error {
	table, ok := l.table()
	if !ok {
		return nil
	}
	var alive string
	_ = l.app.DB().Select("updated").From("_params").Where(dbx.HashExp{"id": pb_migrations.LastSeenParam}).Row(&alive) // none: they keep their time
	_, err := l.app.NonconcurrentDB().NewQuery("UPDATE {{" + table + "}} SET [[online]] = FALSE, [[at]] = MAX([[at]], {:alive}) WHERE [[online]] = TRUE").
		Bind(dbx.Params{"alive": alive}).Execute()
	return err
}

// close writes that all who are present now have left.
func (l *lastSeen) close() {
	l.mu.Lock()
	if l.timer != nil {
		l.timer.Stop()
	}
	l.closed = true
	now := time.Now().UnixMilli()
	for user := range l.topics {
		l.changed[user] = seen{now, false}
	}
	l.topics = map[string]int{}
	isChanged := len(l.changed) > 0
	l.mu.Unlock()
	if isChanged {
		l.write()
	}
}
