package hooks_test

import (
	"archive/zip"
	"bytes"
	"database/sql"
	"encoding/json/v2"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tests"

	"herald/hooks"
	"herald/internal/pbtest"
	"herald/notify"
)

// withQuery returns the subscription key of topic with a query, as the SDK makes it.
func withQuery(topic, name, value string) string {
	return topic + "?options=" + url.QueryEscape(fmt.Sprintf(`{"query":{%q:%q}}`, name, value))
}

// envelope is a message as subscribers with history get it.
type envelope struct {
	ID    string `json:"id"`
	Topic string `json:"topic"`
	Epoch string `json:"epoch"`
	Seq   int64  `json:"seq"`
	Time  string `json:"time"`
	From  string `json:"from"`
	Data  any    `json:"data"`
	Gap   bool   `json:"gap"`
}

func (e envelope) String() string {
	gap := ""
	if e.Gap {
		gap = " gap"
	}
	return fmt.Sprintf("%d:%v%s", e.Seq, e.Data, gap)
}

func decodeEnvelope(t testing.TB, text string) envelope {
	t.Helper()
	var e envelope
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return e
}

// expectEnvelopes waits for the next messages under key and compares "seq:data".
func expectEnvelopes(t testing.TB, client *pbtest.Subscriber, key string, want ...string) (last envelope) {
	t.Helper()
	for _, w := range want {
		event := client.Next(t)
		if event.Type != key {
			t.Fatalf("got event %q with %s, want %q with %s", event.Type, event.Data, key, w)
		}
		if last = decodeEnvelope(t, event.Data); last.String() != w {
			t.Fatalf("got %s, want %s", last, w)
		}
	}
	return last
}

func mustSendAll(t *testing.T, app core.App, topic string, data ...any) (last notify.Report) {
	t.Helper()
	for _, d := range data {
		last = send(t, app, notify.Message{Topic: topic, Data: d})
	}
	return last
}

// addLog adds a channel log/{name} with the last messages kept, open to all.
func addLog(t testing.TB, app core.App, history int) *core.Record {
	t.Helper()
	return addChannel(t, app, map[string]any{"pattern": "log/{name}", "subscribeRule": "*", "publishRule": "*", "history": history})
}

func TestReplay(t *testing.T) {
	w := newWorld(t)
	addLog(t, w, 5)
	server := pbtest.Serve(t, w)
	epoch := mustSendAll(t, w, "log/first", 1).Epoch
	if epoch == "" {
		t.Fatal("the report has no epoch")
	}
	all := []string{"3:c", "4:d", "5:e", "6:f", "7:g"}
	allAfterGap := append([]string{"3:c gap"}, all[1:]...)
	for i, test := range []struct {
		name, option, value string
		want                []string
		live                string // the first message after these
	}{
		{"since", "since", epoch + ":4", all[2:], "8:live"},
		{"since the oldest that is kept", "since", epoch + ":2", all, "8:live"},
		{"since one that is not kept", "since", epoch + ":1", allAfterGap, "8:live"},
		{"since the last", "since", epoch + ":7", nil, "8:live"},
		{"since one that was never sent", "since", epoch + ":8", allAfterGap, "8:live"},
		{"since another epoch", "since", "other:7", allAfterGap, "8:live"},
		{"rewind", "rewind", "2", all[3:], "8:live"},
		{"rewind more than is kept", "rewind", "50", all, "8:live"},
		{"rewind a minute", "rewind", "1m", all, "8:live"},
		{"rewind no time", "rewind", "0s", nil, "8:live"},
		{"rewind nothing", "rewind", "0", nil, "8:live"},
		{"a topic without messages: rewind", "rewind", "2", nil, "1:live"},
		{"a topic without messages: since", "since", epoch + ":3", nil, "1:live gap"},
		{"no history", "since", epoch + ":3", nil, "0:live"},
	} {
		t.Run(test.name, func(t *testing.T) {
			topic := fmt.Sprint("log/", i)
			switch {
			case test.name == "no history":
				topic = "other"
			case !strings.Contains(test.name, "without messages"):
				mustSendAll(t, w, topic, "a", "b", "c", "d", "e", "f", "g")
			}
			key := withQuery(topic, test.option, test.value)
			client := server.Subscribe(t, nil, key)
			expectEnvelopes(t, client, key, test.want...)
			report := send(t, w, notify.Message{Topic: topic, Data: "live"})
			if report.Matched != 1 || report.Queued != 1 {
				t.Errorf("report %+v", report)
			}
			expectEnvelopes(t, client, key, test.live)
			// what it has is not replayed again when it adds a topic
			client.Set(t, nil, key, "fence")
			mustSend(t, w, "fence", 1)
			client.Expect(t, "fence", "1")
		})
	}
}

// TestReplayKeys: one connection with several keys of a topic, each with its own
// replay, in one order.
func TestReplayKeys(t *testing.T) {
	w := newWorld(t)
	addLog(t, w, 1000)
	server := pbtest.Serve(t, w)
	for i := range 300 { // several pages
		mustSend(t, w, "log/a", i)
	}
	keys := []string{"log/a", withQuery("log/a", "rewind", "1000"), withQuery("log/a", "rewind", "3"), withQuery("log/a", "envelope", "true")}
	client := server.Subscribe(t, nil, keys...)
	got := map[string][]string{}
	for i := range 300 + 3 + 4 {
		if i == 300+3 {
			mustSend(t, w, "log/a", "live")
		}
		event := client.Next(t)
		if event.Type == keys[0] {
			got[event.Type] = append(got[event.Type], event.Data)
			continue
		}
		got[event.Type] = append(got[event.Type], decodeEnvelope(t, event.Data).String())
	}
	all := make([]string, 301)
	for i := range all {
		all[i] = fmt.Sprintf("%d:%d", i+1, i)
	}
	all[300] = "301:live"
	for i, want := range [][]string{{`"live"`}, all, all[297:], all[300:]} {
		if !slices.Equal(got[keys[i]], want) {
			t.Errorf("%s: got %v", keys[i], got[keys[i]])
		}
	}
}

func TestReplayOptions(t *testing.T) {
	w := newWorld(t)
	addLog(t, w, 10)
	addChannel(t, w, map[string]any{"pattern": "secret", "history": 10})
	server := pbtest.Serve(t, w)
	mustSend(t, w, "log/a", 1)
	for value, message := range map[string]string{
		withQuery("log/a", "since", "7"):                       `since: "7" must be of the form EPOCH:SEQ`,
		withQuery("log/a", "since", "x:-1"):                    `since: "x:-1" must be of the form EPOCH:SEQ`,
		withQuery("log/a", "rewind", "soon"):                   `rewind: "soon" must be a number of messages such as 50 or a duration such as 2m`,
		withQuery("log/a", "rewind", "-5"):                     `rewind: "-5" must be a number of messages such as 50 or a duration such as 2m`,
		withQuery("log/a", "rewind", "-5s"):                    `rewind: "-5s" must be a number of messages such as 50 or a duration such as 2m`,
		`log/a?options={"query":{"since":"e:1","rewind":"5"}}`: "since and rewind exclude each other",
	} {
		client := server.Subscribe(t, nil, "@denied", "log/b")
		status, answer := client.Try(t, nil, "@denied", "log/b", value)
		fields, _ := answer.(map[string]any)
		subscriptions, _ := fields["data"].(map[string]any)["subscriptions"].(map[string]any)
		if status != http.StatusBadRequest || !strings.Contains(fmt.Sprint(subscriptions["2"]), "validation_invalid_position") {
			t.Errorf("%s: %d %v", value, status, answer)
		}
		// among others it is left out
		client.Set(t, nil, "@denied", "log/b", "log/c", value)
		want, err := json.Marshal(map[string]any{"topic": "log/a", "status": 400, "message": message}, json.Deterministic(true))
		if err != nil {
			t.Fatal(err)
		}
		event := client.Next(t)
		var got any
		if err := json.Unmarshal([]byte(event.Data), &got); err != nil {
			t.Fatal(err)
		}
		again, err := json.Marshal(got, json.Deterministic(true))
		if err != nil || string(again) != string(want) {
			t.Errorf("announced %s, want %s", again, want)
		}
		mustSend(t, w, "log/c", "fine")
		client.Expect(t, "log/c", `"fine"`)
	}

	// a denied topic is not read
	stats := engine(w).Stats().Replayed
	if status, answer := server.Connect(t).Try(t, w.ann, withQuery("secret", "rewind", "5")); status != http.StatusForbidden {
		t.Errorf("denied: %d %v", status, answer)
	}
	if now := engine(w).Stats().Replayed; now != stats {
		t.Errorf("%d messages were replayed", now-stats)
	}
}

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

// TestReplayWithSmallQueue: a replay ends also where a page, or one message, is larger than
// the queue.
func TestReplayWithSmallQueue(t *testing.T) {
	for name, serve := range map[string]func(testing.TB, core.App) *pbtest.Server{"taken": pbtest.Serve, "HTTP2": pbtest.ServeHTTP2} {
		t.Run(name, func(t *testing.T) {
			app := pbtest.NewApp(t, func(app core.App) {
				hooks.MustRegister(app, nil, hooks.Config{Notify: notify.Config{QueueBytes: 64 << 10}})
			})
			addLog(t, app, 1000)
			server := serve(t, app)
			const large, small = 20, 100
			for range large {
				mustSend(t, app, "log/a", strings.Repeat("y", 250<<10))
			}
			for range small {
				mustSend(t, app, "log/a", strings.Repeat("x", 4000))
			}
			for range 3 {
				client := server.Connect(t)
				key := withQuery("log/a", "rewind", "1000")
				client.Set(t, nil, key)
				for range large + small {
					client.Next(t)
				}
			}
			if ends := engine(app).Stats().Disconnects; ends[notify.ReasonQueueFull] > 0 {
				t.Errorf("disconnects: %v", ends)
			}
		})
	}
}

// TestHistoryRegained: a topic that gets its history back, since a more specific channel
// got another pattern, knows that it has missed something.
func TestHistoryRegained(t *testing.T) {
	w := newWorld(t)
	addLog(t, w, 10)
	server := pbtest.Serve(t, w)
	last := mustSendAll(t, w, "log/a", "a", "b")
	specific := addChannel(t, w, map[string]any{"pattern": "log/a", "subscribeRule": "*"})
	mustSend(t, w, "log/a", "not stored")
	specific.Set("pattern", "log/zzz")
	save(t, w, specific)
	mustSend(t, w, "log/a", "c")
	if p := historyOf(t, server, nil, "log/a", last.Epoch+":2", 0); p.Complete || !slices.Equal(p.list(), []string{"3:c"}) {
		t.Errorf("since 2: %v, complete %v", p.list(), p.Complete)
	}
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

// TestHistoryDamaged: a file that is no database any more stops neither messages nor
// backups, and is kept.
func TestHistoryDamaged(t *testing.T) {
	t.Parallel() // it waits most of the time
	path := func(w *world) string { return filepath.Join(w.DataDir(), "notify_history.db") }
	overwrite := func(t *testing.T, w *world, from int64) {
		t.Helper()
		file, err := os.OpenFile(path(w), os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		info, err := file.Stat()
		if err != nil {
			t.Fatal(err)
		}
		garbage := bytes.Repeat([]byte("garbage!"), int(max(info.Size()-from, 8192))/8)
		if _, err := file.WriteAt(garbage, from); err != nil {
			t.Fatal(err)
		}
	}
	check := func(t *testing.T, w *world, server *pbtest.Server) {
		t.Helper()
		for i := range 2 {
			if err := w.CreateBackup(t.Context(), fmt.Sprint(i, ".zip")); err != nil {
				t.Error(err)
			}
		}
		mustSend(t, w, "log/a", "new")
		page := historyOf(t, server, nil, "log/a", "", 100)
		if got := page.list(); !slices.Equal(got, []string{"1:new"}) {
			t.Errorf("got %v", got)
		}
		if kept, _ := filepath.Glob(path(w) + ".broken-*Z"); len(kept) != 1 {
			t.Errorf("kept: %v", kept)
		}
		if count := engine(w).Stats().StoreDamaged; count != 1 {
			t.Errorf("the stats tell of %d", count)
		}
		waitForLog(t, w, "The history of topics was damaged%")
	}
	t.Run("before the start", func(t *testing.T) {
		w := newWorld(t)
		w.Settings().Logs.MaxDays = 1
		addLog(t, w, 100)
		overwrite(t, w, 0)
		check(t, w, pbtest.Serve(t, w))
	})
	t.Run("without a channel that has history", func(t *testing.T) {
		w := newWorld(t)
		overwrite(t, w, 0)
		if err := w.CreateBackup(t.Context(), "backup.zip"); err != nil {
			t.Error(err)
		}
	})
	t.Run("that cannot be opened", func(t *testing.T) {
		w := newWorld(t)
		w.Settings().Logs.MaxDays = 1
		if err := os.MkdirAll(filepath.Join(path(w), "folder"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := w.CreateBackup(t.Context(), "backup.zip"); err != nil {
			t.Error(err)
		}
		waitForLog(t, w, "A backup is made without the history%")
	})
	for name, find := range map[string]func(t *testing.T, app core.App, server *pbtest.Server){
		"found by a send": func(t *testing.T, app core.App, _ *pbtest.Server) {
			if err := notify.Notify(app, "log/a", 1); !errors.Is(err, notify.ErrHistory) {
				t.Errorf("sent: %v", err)
			}
		},
		"found by a read": func(t *testing.T, app core.App, server *pbtest.Server) {
			if status, answer := server.Do(t, "GET", historyPath("log/a", "", 1000), "", nil); status != http.StatusServiceUnavailable {
				t.Errorf("%d %v", status, answer)
			}
		},
		"found by a backup": func(*testing.T, core.App, *pbtest.Server) {},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			addLog(t, w, 1000)
			pbtest.Serve(t, w)
			for range 200 {
				mustSend(t, w, "log/a", strings.Repeat("x", 1000))
			}
			engine(w).Shutdown(time.Second)
			overwrite(t, w, 8*4096) // the first pages, with the tables' names, are whole
			app, err := tests.NewTestApp(w.DataDir())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(app.Cleanup)
			app.Settings().Logs.MaxDays = 1
			register(app)
			server := pbtest.Serve(t, app)
			find(t, app, server)
			check(t, &world{TestApp: app}, server)
		})
	}
}

// page is the answer of GET /api/notify/history.
type page struct {
	Items    []envelope `json:"items"`
	Epoch    string     `json:"epoch"`
	Head     int64      `json:"head"`
	Complete bool       `json:"complete"`
	Next     string     `json:"next"`
}

func (p page) list() (list []string) {
	for _, item := range p.Items {
		list = append(list, item.String())
	}
	return list
}

func historyPath(topic, since string, limit int) string {
	query := url.Values{"topic": {topic}}
	if since != "" {
		query.Set("since", since)
	}
	if limit != 0 {
		query.Set("limit", strconv.Itoa(limit))
	}
	return "/api/notify/history?" + query.Encode()
}

func historyOf(t testing.TB, server *pbtest.Server, who *core.Record, topic, since string, limit int) page {
	t.Helper()
	status, text := server.DoText(t, "GET", historyPath(topic, since, limit), pbtest.Token(t, who), nil)
	if status != http.StatusOK {
		t.Fatalf("history: %d %s", status, text)
	}
	var p page
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestHistoryRoute(t *testing.T) {
	w := newWorld(t)
	addMembers(t, w)
	addMember(t, w, "42", w.ann)
	addLog(t, w, 10)
	addChannel(t, w, map[string]any{"pattern": "chat/{room}", "subscribeRule": memberRule, "history": 10})
	addChannel(t, w, map[string]any{"pattern": "admin", "history": 10})
	addChannel(t, w, map[string]any{"pattern": "vip", "subscribeRule": `@request.headers.x_vip = "yes"`, "history": 10})
	addChannel(t, w, map[string]any{"pattern": "live", "subscribeRule": "*"})
	server := pbtest.Serve(t, w)
	last := mustSendAll(t, w, "log/a", "a", "b", "c", "d", "e")
	for _, topic := range []string{"chat/42", "admin", "vip"} {
		mustSend(t, w, topic, 1)
	}

	t.Run("pages", func(t *testing.T) {
		var got []string
		pages, since := 0, ""
		for {
			p := historyOf(t, server, nil, "log/a", since, 2)
			got = append(got, p.list()...)
			if p.Epoch != last.Epoch || p.Head != 5 || !p.Complete {
				t.Fatalf("page %+v", p)
			}
			pages++
			if since = p.Next; since == fmt.Sprintf("%s:%d", p.Epoch, p.Head) {
				break
			}
		}
		if pages != 3 || !slices.Equal(got, []string{"1:a", "2:b", "3:c", "4:d", "5:e"}) {
			t.Errorf("%d pages: %v", pages, got)
		}
	})
	t.Run("an envelope", func(t *testing.T) {
		p := historyOf(t, server, nil, "log/a", last.Epoch+":4", 0)
		if len(p.Items) != 1 {
			t.Fatalf("page %+v", p)
		}
		item := p.Items[0]
		sent, err := time.Parse("2006-01-02 15:04:05.000Z", item.Time)
		if err != nil || time.Since(sent).Abs() > time.Minute {
			t.Errorf("time %q", item.Time)
		}
		if item.ID != last.ID || item.Topic != "log/a" || item.Epoch != last.Epoch || item.From != "" {
			t.Errorf("envelope %+v", item)
		}
	})
	t.Run("incomplete", func(t *testing.T) {
		for _, since := range []string{"other:3", last.Epoch + ":6"} {
			if p := historyOf(t, server, nil, "log/a", since, 0); p.Complete || len(p.Items) != 5 {
				t.Errorf("since %s: %+v", since, p)
			}
		}
	})
	t.Run("without history", func(t *testing.T) {
		for topic, complete := range map[string]string{"live": "", "no/channel": ""} {
			if p := historyOf(t, server, nil, topic, complete, 0); p.Epoch != "" || p.Head != 0 || len(p.Items) != 0 || !p.Complete || p.Next != "" {
				t.Errorf("%s: %+v", topic, p)
			}
			if p := historyOf(t, server, nil, topic, "e:1", 0); p.Complete {
				t.Errorf("%s since a position: %+v", topic, p)
			}
		}
	})

	for _, test := range []struct {
		name   string
		who    *core.Record
		path   string
		status int
		want   string
	}{
		{"a member", w.ann, historyPath("chat/42", "", 0), 200, `"seq":1`},
		{"no member", w.bob, historyPath("chat/42", "", 0), 403, "not allowed to listen"},
		{"a guest", nil, historyPath("chat/42", "", 0), 403, "not allowed to listen"},
		{"no room", w.bob, historyPath("chat/43", "", 0), 403, "not allowed to listen"},
		{"a superuser", w.root, historyPath("admin", "", 0), 200, `"seq":1`},
		{"no superuser", w.ann, historyPath("admin", "", 0), 403, "not allowed to listen"},
		{"headers", w.ann, historyPath("vip", "", 0), 403, "not allowed to listen"},
		{"a system topic", w.ann, historyPath("@inbox", "", 0), 403, "not allowed to listen"},
		{"a system topic, superuser", w.root, historyPath("@inbox", "", 0), 400, "validation_reserved_topic"},
		{"record events", w.ann, historyPath("users", "", 0), 403, "not allowed to listen"},
		{"no topic", w.ann, "/api/notify/history", 400, "validation_required"},
		{"a bad topic", w.ann, historyPath("a?b", "", 0), 400, "validation_invalid_topic"},
		{"a bad position", w.ann, historyPath("log/a", "7", 0), 400, "validation_invalid_position"},
		{"a bad rewind", w.ann, "/api/notify/history?topic=log/a&rewind=soon", 400, `"rewind":{"code":"validation_invalid_position"`},
		{"both", w.ann, "/api/notify/history?topic=log/a&rewind=1&since=e:1", 400, "exclude each other"},
		{"rewind", w.ann, "/api/notify/history?topic=log/a&rewind=2", 200, `"next":"` + last.Epoch + `:5"`},
		{"rewind nothing", w.ann, "/api/notify/history?topic=log/a&rewind=0", 200, `{"items":[],`},
		{"a bad limit", w.ann, "/api/notify/history?topic=log/a&limit=many", 400, "validation_invalid_number"},
		{"a large limit", w.ann, historyPath("log/a", "", 1_000_000), 200, `"head":5`},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, text := server.DoText(t, "GET", test.path, pbtest.Token(t, test.who), nil)
			if status != test.status || !strings.Contains(text, test.want) {
				t.Errorf("%d %s", status, text)
			}
		})
	}
	t.Run("the headers of the request", func(t *testing.T) {
		request, err := http.NewRequestWithContext(t.Context(), "GET", server.URL+historyPath("vip", "", 0), nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("X-VIP", "yes")
		response, err := server.Client().Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != http.StatusOK || response.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%d %v", response.StatusCode, response.Header)
		}
	})
	t.Run("strict", func(t *testing.T) {
		app := pbtest.NewApp(t, func(app core.App) {
			hooks.MustRegister(app, nil, hooks.Config{Notify: notify.Config{Strict: true}})
		})
		if status, text := pbtest.Serve(t, app).DoText(t, "GET", historyPath("any", "", 0), "", nil); status != http.StatusForbidden {
			t.Errorf("%d %s", status, text)
		}
	})
}

// TestHistoryReports: what senders are told.
func TestHistoryReports(t *testing.T) {
	w := newWorld(t)
	addLog(t, w, 10)
	server := pbtest.Serve(t, w)
	root := pbtest.Token(t, w.root)
	_, answer := server.Do(t, "POST", "/api/notify", root, `{"topic":"log/a","data":1,"id":"m1"}`)
	first := answer.(map[string]any)
	if first["seq"] != 1.0 || first["epoch"] == "" {
		t.Fatalf("answer %v", answer)
	}
	_, text := server.DoText(t, "POST", publishPath, pbtest.Token(t, w.ann), `{"topic":"log/a","data":2,"id":"m1"}`)
	if want := fmt.Sprintf(`{"id":"m1","topic":"log/a","epoch":%q,"seq":2}`, first["epoch"]); strings.TrimSpace(text) != want {
		t.Errorf("published: %s, want %s", text, want)
	}
	if _, text := server.DoText(t, "POST", "/api/notify", root, `{"topic":"other","data":1}`); strings.Contains(text, "seq") || strings.Contains(text, "epoch") {
		t.Errorf("without history: %s", text)
	}
	p := historyOf(t, server, nil, "log/a", "", 0)
	if len(p.Items) != 2 || p.Items[0].From != "" || p.Items[1].From != pbtest.Ref(w.ann) {
		t.Errorf("history %+v", p)
	}
}

// TestHistoryHandOver: many send while subscribers come, replay, and go: each of
// them gets each message once, in order, from where it began.
func TestHistoryHandOver(t *testing.T) {
	const senders, subscribers, rounds, topics = 4, 8, 10, 2
	w := newWorld(t)
	addLog(t, w, 100_000)
	server := pbtest.Serve(t, w)
	n := engine(w)
	epoch := mustSendAll(t, w, "log/0", 0).Epoch
	mustSendAll(t, w, "log/1", 0)

	stop := make(chan struct{})
	var sending, listening sync.WaitGroup
	var heads [topics]atomic.Int64
	for sender := range senders {
		sending.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(time.Duration(100+sender*37) * time.Microsecond): // the pace; nothing waits for it
				}
				topic := i % topics
				report, err := n.Send(t.Context(), notify.Message{Topic: fmt.Sprint("log/", topic), Data: i})
				if err != nil {
					t.Error(err)
					return
				}
				for head := heads[topic].Load(); head < report.Seq && !heads[topic].CompareAndSwap(head, report.Seq); head = heads[topic].Load() {
				}
			}
		})
	}
	for subscriber := range subscribers {
		listening.Go(func() {
			topic := subscriber % topics
			seen := int64(0)
			for round := range rounds {
				key := withQuery(fmt.Sprint("log/", topic), "since", fmt.Sprintf("%s:%d", epoch, seen))
				client := server.Subscribe(t, nil, key)
				until := heads[topic].Load() + int64(20+10*(round%3))
				for seen < until {
					e := decodeEnvelope(t, client.Next(t).Data)
					if e.Seq != seen+1 || e.Gap {
						t.Errorf("got %v after %d", e, seen)
						return
					}
					seen = e.Seq
				}
				client.Close(t)
			}
		})
	}
	listening.Wait()
	close(stop)
	sending.Wait()
}

// TestReplayToStalled: a client that does not read its replay keeps a part of its
// queue for it and no more, and nobody else waits.
func TestReplayToStalled(t *testing.T) {
	t.Parallel() // it waits most of the time
	w := newWorld(t)
	addLog(t, w, 10_000)
	server := pbtest.Serve(t, w)
	large := strings.Repeat("x", 50_000)
	const count = 200 // 10 MB: more than the sockets' buffers hold
	for range count {
		mustSend(t, w, "log/a", large)
	}
	stalled, lines := open(t, server)
	status, answer := server.Do(t, http.MethodPost, "/api/realtime", "",
		map[string]any{"clientId": stalled, "subscriptions": []string{withQuery("log/a", "rewind", "10000")}})
	if status != http.StatusNoContent {
		t.Fatalf("subscribe: %d %v", status, answer)
	}
	healthy := server.Subscribe(t, nil, "log/b")
	n := engine(w)
	pbtest.WaitFor(t, "the queue is filled as far as it may", func() bool { return n.Stats().QueuedBytes > 256<<10 })
	for i := range 100 {
		mustSend(t, w, "log/b", i)
		healthy.Expect(t, "log/b", fmt.Sprint(i))
	}
	stats := n.Stats()
	if stats.QueuedBytes > 700_000 || stats.Disconnects[notify.ReasonQueueFull] != 0 {
		t.Errorf("stats %+v", stats)
	}
	if _, err := w.SubscriptionsBroker().ClientById(stalled); err != nil {
		t.Fatal("the stalled client was disconnected")
	}
	// it reads at last
	seq := int64(0)
	for seq < count && lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data:")
		if !ok || strings.Contains(data, "clientId") {
			continue
		}
		if seq++; decodeEnvelope(t, data).Seq != seq {
			t.Fatalf("got %.100s, want %d", data, seq)
		}
	}
	if seq < count {
		t.Fatalf("ended after %d: %v", seq, lines.Err())
	}
}

// TestReplayThrownOut: who loses the right in the middle of a replay, or asks for
// the history, gets nothing that was sent after it.
func TestReplayThrownOut(t *testing.T) {
	t.Parallel() // it waits most of the time
	const rounds = 30
	w := newWorld(t)
	addMembers(t, w)
	addChannel(t, w, map[string]any{"pattern": "chat/{room}", "subscribeRule": memberRule, "history": 50})
	server := pbtest.Serve(t, w)
	n := engine(w)
	var head atomic.Int64
	stop := make(chan struct{})
	var sending sync.WaitGroup
	sending.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			report, err := n.Send(t.Context(), notify.Message{Topic: "chat/42", Data: 1})
			if err != nil {
				t.Error(err)
				return
			}
			head.Store(report.Seq)
		}
	})
	defer sending.Wait()
	defer close(stop)
	key := withQuery("chat/42", "rewind", "50")
	for round := range rounds {
		member := addMember(t, w, "42", w.bob)
		client := server.Connect(t)
		var both sync.WaitGroup
		var answer string
		both.Go(func() { client.Try(t, w.bob, "fence", key) })
		both.Go(func() {
			_, answer = server.DoText(t, "GET", historyPath("chat/42", "", 50), pbtest.Token(t, w.bob), nil)
		})
		both.Go(func() {
			if err := w.Delete(member); err != nil {
				t.Error(err)
			}
		})
		both.Wait()
		last := head.Load() + 1 // one may be on its way since before the change
		pbtest.WaitFor(t, "more messages", func() bool { return head.Load() > last+20 })
		mustSend(t, w, "fence", round)
		for {
			event := client.Next(t)
			if event.Type == "fence" {
				break
			}
			if e := decodeEnvelope(t, event.Data); e.Seq > last {
				t.Fatalf("round %d: replayed %d, the last one before the change was %d", round, e.Seq, last)
			}
		}
		var p page
		if err := json.Unmarshal([]byte(answer), &p); err == nil && len(p.Items) > 0 && p.Items[len(p.Items)-1].Seq > last {
			t.Fatalf("round %d: the history had %v, the last one before the change was %d", round, p.Items[len(p.Items)-1], last)
		}
	}
}

// TestHistoryPaused: a topic that had no history for a while says so to those who
// come back.
func TestHistoryPaused(t *testing.T) {
	w := newWorld(t)
	channel := addLog(t, w, 10)
	server := pbtest.Serve(t, w)
	last := mustSendAll(t, w, "log/a", "a", "b")
	live := server.Subscribe(t, nil, "log/a"+withEnvelope)
	set := func(history int) {
		t.Helper()
		channel.Set("history", history)
		save(t, w, channel)
	}
	set(0)
	mustSend(t, w, "log/a", "unstored")
	if e := decodeEnvelope(t, live.Next(t).Data); e.Epoch != "" || e.Seq != 0 || e.Data != "unstored" {
		t.Errorf("envelope %+v", e)
	}
	if p := historyOf(t, server, nil, "log/a", "", 0); len(p.Items) != 0 {
		t.Errorf("without history: %+v", p)
	}
	set(10)
	key := withQuery("log/a", "since", last.Epoch+":2")
	client := server.Subscribe(t, nil, key)
	mustSendAll(t, w, "log/a", "c", "d")
	expectEnvelopes(t, client, key, "3:c gap", "4:d")
	if p := historyOf(t, server, nil, "log/a", last.Epoch+":2", 0); p.Complete || !slices.Equal(p.list(), []string{"3:c", "4:d"}) {
		t.Errorf("since before: %+v", p)
	}
	if p := historyOf(t, server, nil, "log/a", last.Epoch+":3", 0); !p.Complete || !slices.Equal(p.list(), []string{"4:d"}) {
		t.Errorf("since after: %+v", p)
	}
}

// TestHistoryRestart: an application that is started again goes on with the same
// numbers and knows the ids of messages it had before.
func TestHistoryRestart(t *testing.T) {
	dir := t.TempDir()
	run := func(f func(app *tests.TestApp)) {
		app, err := tests.NewTestApp(dir)
		if err != nil {
			t.Fatal(err)
		}
		dir = app.DataDir() // a copy of what was in dir
		register(app)
		f(app)
	}
	var first notify.Report
	app := pbtest.NewApp(t, register)
	addLog(t, app, 10)
	pbtest.Serve(t, app)
	first = send(t, app, notify.Message{Topic: "log/a", Data: "a", ID: "m1"})
	engine(app).Shutdown(time.Second)
	dir = app.DataDir()
	run(func(app *tests.TestApp) {
		t.Cleanup(app.Cleanup)
		pbtest.Serve(t, app)
		again := send(t, app, notify.Message{Topic: "log/a", Data: "a", ID: "m1"})
		if again.Seq != first.Seq || again.ID != "m1" {
			t.Errorf("sent again: %+v, first %+v", again, first)
		}
		// the test kit has copied the folder, which makes it another log
		second := send(t, app, notify.Message{Topic: "log/a", Data: "b", ID: "m2"})
		if second.Seq != 2 || second.Epoch == first.Epoch {
			t.Errorf("second: %+v, first %+v", second, first)
		}
	})
}

// TestHistoryBackup: a backup has a copy of the history that knows it is one, and
// is made while messages go on.
func TestHistoryBackup(t *testing.T) {
	w := newWorld(t)
	if err := w.CreateBackup(t.Context(), "without.zip"); err != nil {
		t.Fatal(err)
	}
	addLog(t, w, 1000)
	server := pbtest.Serve(t, w)
	mustSendAll(t, w, "log/a", "a", "b", "c")
	stop := make(chan struct{})
	var sending sync.WaitGroup
	sending.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				mustSend(t, w, "log/b", 1)
			}
		}
	})
	err := w.CreateBackup(t.Context(), "with.zip")
	close(stop)
	sending.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(w.DataDir(), "*.backup")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	for name, want := range map[string][]string{"without.zip": nil, "with.zip": {"notify_history.db.backup"}} {
		archive, err := zip.OpenReader(filepath.Join(w.DataDir(), core.LocalBackupsDirName, name))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, file := range archive.File {
			if strings.HasPrefix(file.Name, "notify_history") {
				got = append(got, file.Name)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s has %v", name, got)
		}
		archive.Close()
	}

	// restored
	restored := t.TempDir()
	if err := unzip(filepath.Join(w.DataDir(), core.LocalBackupsDirName, "with.zip"), restored); err != nil {
		t.Fatal(err)
	}
	before := historyOf(t, server, nil, "log/a", "", 0)
	app, err := tests.NewTestApp(restored)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(app.Cleanup)
	register(app)
	after := historyOf(t, pbtest.Serve(t, app), nil, "log/a", "", 0)
	if !slices.Equal(after.list(), before.list()) || after.Epoch == before.Epoch || after.Epoch == "" {
		t.Errorf("restored %+v, before %+v", after, before)
	}
}

func unzip(archive, dir string) error {
	reader, err := zip.OpenReader(archive)
	if err != nil {
		return err
	}
	defer reader.Close()
	return os.CopyFS(dir, reader)
}

// holdLog makes the disk of the history slow, for as long as another process's transaction
// holds it: until release is called, or the log gives up after 10 seconds.
func holdLog(t *testing.T, app core.App) (release func()) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(app.DataDir(), "notify_history.db")+"?_pragma=busy_timeout(10000)")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	db.SetMaxOpenConns(1)
	if _, err := db.Exec("BEGIN IMMEDIATE"); err != nil {
		t.Fatal(err)
	}
	return func() {
		if _, err := db.Exec("ROLLBACK"); err != nil {
			t.Error(err)
		}
	}
}

// TestSlowDisk: nobody waits for the disk of the history who does not need it.
func TestSlowDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addLog(t, w, 10)
	server := pbtest.Serve(t, w)
	other := server.Subscribe(t, nil, "other")
	last := mustSendAll(t, w, "log/a", 1, 2)

	release := holdLog(t, w)
	stored := make(chan error, 1)
	go func() { stored <- notify.Notify(w, "log/a", 3) }()

	// a message on another topic, channels that change, also what is kept, a new
	// connection, the check of rights
	for i := range 3 {
		mustSend(t, w, "other", i)
		other.Expect(t, "other", fmt.Sprint(i))
		channel := addChannel(t, w, map[string]any{"pattern": fmt.Sprintf("more%d/{x}", i), "subscribeRule": "*", "history": 5})
		channel.Set("history", 0)
		save(t, w, channel)
		channel.Set("history", 5)
		save(t, w, channel)
		server.Subscribe(t, w.ann, "other", "log/a").Close(t)
		if _, err := engine(w).Recheck(notify.RecheckFilter{}); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-stored:
		t.Fatalf("the disk was not slow: %v", err)
	default:
	}
	release()
	if err := <-stored; err != nil {
		t.Fatal(err)
	}
	if p := historyOf(t, server, nil, "log/a", last.Epoch+":2", 10); len(p.Items) != 1 || !p.Complete {
		t.Errorf("page %v, complete %v", p.list(), p.Complete)
	}

	holdLog(t, w)
	go func() { stored <- notify.Notify(w, "log/a", 4) }()
	pbtest.WaitFor(t, "the message waits", func() bool { return engine(w).Stats().Messages > 0 })
	engine(w).Shutdown(100 * time.Millisecond)
	select {
	case err := <-stored:
		if !errors.Is(err, notify.ErrShutdown) { // it may have come too late
			t.Fatalf("the disk was not slow: %v", err)
		}
	default:
	}
}

// TestHistoryOfConnections: what was sent to a connection, or left it out, is still so when
// the same user comes back with another one.
func TestHistoryOfConnections(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addLog(t, w, 100)
	server := pbtest.Serve(t, w)
	tab := server.Subscribe(t, w.ann, "log/a")
	other := server.Subscribe(t, w.ann, "log/a")
	guest := server.Subscribe(t, nil, "log/a")
	send(t, w, notify.Message{Topic: "log/a", Data: "to the tab", To: notify.Audience{Clients: []string{tab.ID}}})
	send(t, w, notify.Message{Topic: "log/a", Data: "to a guest", To: notify.Audience{Clients: []string{guest.ID}}})
	status, answer := server.Do(t, "POST", publishPath, pbtest.Token(t, w.ann),
		fmt.Sprintf(`{"topic":"log/a","data":"from the tab","self":false,"clientId":%q}`, tab.ID))
	if status != http.StatusOK {
		t.Fatal(status, answer)
	}
	mustSend(t, w, "log/a", "last")
	tab.Expect(t, "log/a", `"to the tab"`)
	tab.Expect(t, "log/a", `"last"`)
	other.Expect(t, "log/a", `"from the tab"`)
	tab.Close(t)

	for _, test := range []struct {
		name string
		who  *core.Record
		ids  string
		want []string
	}{
		{"the tab", w.ann, "x," + tab.ID, []string{"to the tab", "last"}},
		{"another tab", w.ann, other.ID, []string{"from the tab", "last"}},
		{"nobody says", w.ann, "", []string{"from the tab", "last"}},
		{"another user", w.bob, tab.ID, []string{"last"}},
		{"a guest with a user's connection", nil, tab.ID, []string{"last"}},
		{"a guest", nil, guest.ID, []string{"from the tab", "last"}},
		{"many", w.ann, tab.ID + strings.Repeat(",x", 20), []string{"from the tab", "last"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, text := server.DoText(t, "GET", historyPath("log/a", "", 100)+"&clientId="+test.ids, pbtest.Token(t, test.who), nil)
			var p page
			if err := json.Unmarshal([]byte(text), &p); err != nil || status != http.StatusOK {
				t.Fatal(status, text)
			}
			got := []string{}
			for _, item := range p.Items {
				got = append(got, fmt.Sprint(item.Data))
			}
			if !slices.Equal(got, test.want) || !p.Complete {
				t.Errorf("fetched %q, complete %v", got, p.Complete)
			}

			key := "log/a?options=" + url.QueryEscape(fmt.Sprintf(`{"query":{"clientId":%q,"rewind":"100"}}`, test.ids))
			client := server.Subscribe(t, test.who, key)
			for _, want := range test.want {
				if e := decodeEnvelope(t, client.Next(t).Data); e.Data != want {
					t.Errorf("replayed %v, not %q", e.Data, want)
				}
			}
		})
	}
}
