package hooks_test

import (
	"database/sql"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

// TestHistoryAudience: who gets a message later is who would have got it then.
func TestHistoryAudience(t *testing.T) {
	w := newWorld(t)
	pbtest.AddField(t, w, "users", &core.TextField{Name: "plan"})
	ann, err := w.FindRecordById("users", w.ann.Id)
	if err != nil {
		t.Fatal(err)
	}
	ann.Set("plan", "pro")
	save(t, w, ann)
	addLog(t, w, 100)
	server := pbtest.Serve(t, w)
	phone := server.Connect(t)
	users := func(records ...*core.Record) (refs []string) {
		for _, record := range records {
			refs = append(refs, pbtest.Ref(record))
		}
		return refs
	}
	for _, msg := range []notify.Message{
		{Data: "all"},
		{Data: "ann", To: notify.Audience{Users: users(w.ann)}},
		{Data: "not ann", Except: notify.Except{Users: users(w.ann)}},
		{Data: "guests", To: notify.Audience{Auth: notify.AuthGuest}},
		{Data: "users", To: notify.Audience{Auth: notify.AuthUser}},
		{Data: "superusers", To: notify.Audience{Auth: notify.AuthSuperuser}},
		{Data: "pro", To: notify.Audience{Filter: "plan = 'pro'"}},
		{Data: "pro again", To: notify.Audience{Filter: "plan = 'pro'"}},
		{Data: "nobody", To: notify.Audience{Users: []string{}}},
		{Data: "a phone", To: notify.Audience{Clients: []string{phone.ID}}},
		{Data: "not the phone", Except: notify.Except{Clients: []string{phone.ID}}},
		{Data: "collection", To: notify.Audience{Collections: []string{"users"}}},
		{Data: "last"},
	} {
		msg.Topic = "log/a"
		send(t, w, msg)
	}
	key := withQuery("log/a", "rewind", "100")
	for _, test := range []struct {
		name string
		who  *core.Record
		want []string
	}{
		{"guest", nil, []string{"1:all", "3:not ann", "4:guests", "11:not the phone", "13:last"}},
		{"ann", w.ann, []string{"1:all", "2:ann", "5:users", "7:pro", "8:pro again", "11:not the phone", "12:collection", "13:last"}},
		{"bob", w.bob, []string{"1:all", "3:not ann", "5:users", "11:not the phone", "12:collection", "13:last"}},
		{"superuser", w.root, []string{"1:all", "3:not ann", "6:superusers", "11:not the phone", "13:last"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			expectEnvelopes(t, server.Subscribe(t, test.who, key), key, test.want...)
			if got := historyOf(t, server, test.who, "log/a", "", 100).list(); !slices.Equal(got, test.want) {
				t.Errorf("over HTTP: %v", got)
			}
		})
	}
	t.Run("a connection by its id", func(t *testing.T) {
		phone.Set(t, nil, key)
		expectEnvelopes(t, phone, key, "1:all", "3:not ann", "4:guests", "10:a phone", "13:last")
	})
	t.Run("a filter that nobody can read any more", func(t *testing.T) {
		collection := mustFind(t, w, "users")
		collection.Fields.RemoveByName("plan")
		if err := w.Save(collection); err != nil {
			t.Fatal(err)
		}
		want := []string{"1:all", "2:ann", "5:users", "11:not the phone", "12:collection", "13:last"}
		if got := historyOf(t, server, w.ann, "log/a", "", 100).list(); !slices.Equal(got, want) {
			t.Errorf("got %v", got)
		}
	})
}

// TestHistoryRenamed: what is stored is for whom it was sent to, whatever the collections
// are called since.
func TestHistoryRenamed(t *testing.T) {
	w := newWorld(t)
	pbtest.AddField(t, w, "users", &core.TextField{Name: "plan"})
	addCollection(t, w, "teams", &core.TextField{Name: "member"})
	for _, user := range []*core.Record{w.ann, w.bob} {
		user, err := w.FindRecordById("users", user.Id)
		if err != nil {
			t.Fatal(err)
		}
		user.Set("plan", "pro")
		save(t, w, user)
	}
	addRecord(t, w, "teams", map[string]any{"member": w.ann.Id})
	addChannel(t, w, map[string]any{"pattern": "log/{name}", "subscribeRule": "*", "publishRule": "*", "history": 100})
	server := pbtest.Serve(t, w)
	ref := pbtest.Ref(w.ann)
	for _, msg := range []notify.Message{
		{Data: "all"},
		{Data: "ann", To: notify.Audience{Users: []string{ref}}},
		{Data: "not ann", Except: notify.Except{Users: []string{ref}}},
		{Data: "collection", To: notify.Audience{Collections: []string{"users"}}},
		{Data: "pro", To: notify.Audience{Filter: "plan = 'pro'"}},
		{Data: "pro users", To: notify.Audience{Filter: "plan = 'pro'", Collections: []string{"users"}}},
		{Data: "team", To: notify.Audience{Filter: "@collection.teams.member ?= id"}},
	} {
		msg.Topic = "log/a"
		send(t, w, msg)
	}
	if err := publishAs(t, server, w.ann, `{"topic":"log/a","data":"said"}`); err != nil {
		t.Fatal(err)
	}
	expect := func(who *core.Record, complete bool, from string, want ...string) {
		t.Helper()
		page := historyOf(t, server, who, "log/a", "", 100)
		if got := page.list(); !slices.Equal(got, want) || page.Complete != complete {
			t.Errorf("got %v, complete %v; want %v, %v", got, page.Complete, want, complete)
		}
		if last := page.Items[len(page.Items)-1]; last.From != from {
			t.Errorf("from %v, want %s", last.From, from)
		}
		key := withQuery("log/a", "rewind", "100")
		client := server.Subscribe(t, who, key)
		gaps := 0
		for _, item := range want {
			got, isAfterGap := strings.CutSuffix(decodeEnvelope(t, client.Next(t).Data).String(), " gap")
			if got != item {
				t.Errorf("replayed %s, want %s", got, item)
			}
			if isAfterGap {
				gaps++
			}
		}
		if gaps > 0 == complete {
			t.Errorf("%d gaps", gaps)
		}
	}
	rename := func(name, to string) {
		t.Helper()
		collection := mustFind(t, w, name)
		collection.Name = to
		if err := w.Save(collection); err != nil {
			t.Fatal(err)
		}
	}
	anns := []string{"1:all", "2:ann", "4:collection", "5:pro", "6:pro users", "7:team", "8:said"}
	expect(w.ann, true, ref, anns...)

	// another collection under the old name: none of it is for its members
	rename("users", "members")
	others := core.NewAuthCollection("users")
	others.Fields.Add(&core.TextField{Name: "plan"})
	if err := w.Save(others); err != nil {
		t.Fatal(err)
	}
	carl := pbtest.AddAuth(t, w, "users", "carl@x.com", map[string]any{"plan": "pro"})
	ann, err := w.FindRecordById("members", w.ann.Id)
	if err != nil {
		t.Fatal(err)
	}
	from := "members:" + w.ann.Id
	expect(ann, true, from, anns...)
	expect(carl, true, from, "1:all", "3:not ann", "8:said")

	// a name in a filter is another's: nobody can tell for whom it was
	rename("teams", "crews")
	addCollection(t, w, "teams", &core.TextField{Name: "member"})
	addRecord(t, w, "teams", map[string]any{"member": w.bob.Id})
	bob, err := w.FindRecordById("members", w.bob.Id)
	if err != nil {
		t.Fatal(err)
	}
	expect(bob, false, from, "1:all", "3:not ann", "4:collection", "5:pro", "6:pro users", "8:said")
	expect(ann, false, from, "1:all", "2:ann", "4:collection", "5:pro", "6:pro users", "8:said")

	// a field is another one's
	members := mustFind(t, w, "members")
	members.Fields.GetByName("plan").SetName("tier")
	members.Fields.Add(&core.TextField{Name: "plan"})
	if err := w.Save(members); err != nil {
		t.Fatal(err)
	}
	if bob, err = w.FindRecordById("members", bob.Id); err != nil {
		t.Fatal(err)
	}
	bob.Set("plan", "pro")
	save(t, w, bob)
	expect(bob, false, from, "1:all", "3:not ann", "4:collection", "8:said")
}

// TestHistoryRecreated: a collection that is made anew has the id of the one of its name
// before it, and is another one all the same.
func TestHistoryRecreated(t *testing.T) {
	w := newWorld(t)
	addLog(t, w, 100)
	before := core.NewAuthCollection("staff")
	if err := w.Save(before); err != nil {
		t.Fatal(err)
	}
	server := pbtest.Serve(t, w)
	for _, to := range []notify.Audience{{Collections: []string{"staff"}}, {Collections: []string{"staff"}, Filter: `email != ""`}, {Filter: `email != ""`}} {
		send(t, w, notify.Message{Topic: "log/a", Data: "secret", To: to})
	}
	if err := w.Delete(before); err != nil {
		t.Fatal(err)
	}
	after := core.NewAuthCollection("staff")
	if err := w.Save(after); err != nil {
		t.Fatal(err)
	}
	if before.Id != after.Id {
		t.Errorf("PocketBase gives other ids now: %s, %s", before.Id, after.Id)
	}
	carl := pbtest.AddAuth(t, w, "staff", "carl@x.com", nil)
	if got := historyOf(t, server, carl, "log/a", "", 100).list(); len(got) > 0 {
		t.Errorf("its members see %v", got)
	}
}

// TestHistoryBackRelation: the field behind a back-relation is part of what a filter means.
func TestHistoryBackRelation(t *testing.T) {
	w := newWorld(t)
	addLog(t, w, 100)
	users := mustFind(t, w, "users")
	posts := addCollection(t, w, "posts", &core.RelationField{Name: "author", CollectionId: users.Id}, &core.RelationField{Name: "reader", CollectionId: users.Id})
	addRecord(t, w, "posts", map[string]any{"author": w.ann.Id, "reader": w.bob.Id})
	server := pbtest.Serve(t, w)
	send(t, w, notify.Message{Topic: "log/a", Data: "x", To: notify.Audience{Filter: `posts_via_author.id ?!= ""`}})
	sees := func(who *core.Record, want ...string) {
		t.Helper()
		if got := historyOf(t, server, who, "log/a", "", 100).list(); !slices.Equal(got, want) {
			t.Errorf("got %v", got)
		}
	}
	sees(w.ann, "1:x")
	sees(w.bob)
	posts.Fields.GetByName("author").SetName("writer")
	posts.Fields.GetByName("reader").SetName("author")
	if err := w.Save(posts); err != nil {
		t.Fatal(err)
	}
	sees(w.ann)
	sees(w.bob)
}

// TestHistoryFilters: two messages with one filter and other collections are two questions.
func TestHistoryFilters(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{"customers", "clients"} {
		collection := core.NewAuthCollection(name)
		collection.Fields.Add(&core.TextField{Name: "plan"})
		if err := w.Save(collection); err != nil {
			t.Fatal(err)
		}
	}
	carl := pbtest.AddAuth(t, w, "customers", "carl@x.com", map[string]any{"plan": "pro"})
	addLog(t, w, 100)
	server := pbtest.Serve(t, w)
	for _, to := range []notify.Audience{
		{Filter: "plan = 'pro'", Collections: []string{"clients"}},
		{Filter: "plan = 'pro'"},
		{Filter: "plan = 'pro'", Collections: []string{"customers"}},
	} {
		send(t, w, notify.Message{Topic: "log/a", Data: "x", To: to})
	}
	if got := historyOf(t, server, carl, "log/a", "", 100).list(); !slices.Equal(got, []string{"2:x", "3:x"}) {
		t.Errorf("got %v", got)
	}
}

// TestHistoryMigration: what an older version has stored by name is stored by id.
func TestHistoryMigration(t *testing.T) {
	w := newWorld(t)
	addLog(t, w, 100)
	later := core.NewAuthCollection("later")
	if err := w.Save(later); err != nil {
		t.Fatal(err)
	}
	dora := pbtest.AddAuth(t, w, "later", "dora@x.com", nil)
	db, err := sql.Open("sqlite", filepath.Join(w.DataDir(), "notify_history.db"))
	if err != nil {
		t.Fatal(err)
	}
	ref := pbtest.Ref(w.ann)
	old := `
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE topics (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, head INTEGER NOT NULL DEFAULT 0, lost INTEGER NOT NULL DEFAULT -1) STRICT;
CREATE TABLE messages (topic INTEGER NOT NULL, seq INTEGER NOT NULL, time INTEGER NOT NULL, id TEXT NOT NULL, sender TEXT NOT NULL, audience BLOB, data BLOB NOT NULL, PRIMARY KEY (topic, seq)) STRICT, WITHOUT ROWID;
CREATE TABLE ids (topic INTEGER NOT NULL, key TEXT NOT NULL, seq INTEGER NOT NULL, time INTEGER NOT NULL, PRIMARY KEY (topic, key)) STRICT, WITHOUT ROWID;
INSERT INTO topics (id, name) VALUES (1, 'log/a');`
	now, earlier := time.Now().UnixMilli(), time.Now().Add(-time.Hour).UnixMilli()
	for i, m := range []struct {
		time             int64
		sender, audience any
	}{
		{now, ref, nil},
		{now, "", `{"to":{"auth":"","users":["` + ref + `"],"collections":null,"filter":"","clients":null},"except":{"users":null,"clients":null}}`},
		{now, "", `{"to":{"auth":"user","users":null,"collections":["later"],"filter":"","clients":null},"except":{"users":null,"clients":null}}`},
		{earlier, "", `{"to":{"auth":"","users":["later:` + dora.Id + `"],"collections":null,"filter":"","clients":null},"except":{"users":null,"clients":null}}`},
		{now, "", `{"to":{"auth":"","users":null,"collections":["gone"],"filter":"","clients":null},"except":{"users":null,"clients":null}}`},
		{now, "", `{"to":{"auth":"","users":null,"collections":null,"filter":"verified = false","clients":null},"except":{"users":["` + ref + `"],"clients":null}}`},
		{now, "", `garbage`},
		{now, "later:" + dora.Id, nil},
	} {
		audience := "NULL"
		if m.audience != nil {
			audience = fmt.Sprintf("CAST('%s' AS BLOB)", m.audience)
		}
		old += fmt.Sprintf("INSERT INTO messages VALUES (1, %d, %d, 'm', '%s', %s, CAST('%d' AS BLOB));", i+1, m.time, m.sender, audience, i+1)
	}
	if _, err := db.Exec(old); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	server := pbtest.Serve(t, w)
	collection := mustFind(t, w, "users") // after the start, which has migrated it
	collection.Name = "members"
	if err := w.Save(collection); err != nil {
		t.Fatal(err)
	}
	ann, err := w.FindRecordById("members", w.ann.Id)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		who  *core.Record
		want []string
	}{
		{ann, []string{"1:1", "2:2", "8:8"}},
		{dora, []string{"1:1", "3:3", "6:6", "8:8"}},
		{nil, []string{"1:1", "8:8"}},
	} {
		page := historyOf(t, server, test.who, "log/a", "", 100)
		if got := page.list(); !slices.Equal(got, test.want) || page.Complete {
			t.Errorf("got %v, complete %v; want %v", got, page.Complete, test.want)
		}
		if from := page.Items[0].From; from != "members:"+w.ann.Id {
			t.Errorf("from %v", from)
		}
	}
}
