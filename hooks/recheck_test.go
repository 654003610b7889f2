package hooks_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/internal/pbtest"
	"herald/notify"
)

// newRooms is a world with channels whose rules look at other records in every way,
// in all of which Ann and Bob may listen to …/42.
func newRooms(t testing.TB) *world {
	t.Helper()
	w := newWorld(t)
	addMembers(t, w)
	teams := addCollection(t, w, "teams", &core.TextField{Name: "name"})
	pbtest.AddField(t, w, "users", &core.TextField{Name: "role"})
	pbtest.AddField(t, w, "users", &core.RelationField{Name: "team", CollectionId: teams.Id})
	view := core.NewViewCollection("member_view")
	view.ViewQuery = `SELECT id, room, user AS who FROM room_members WHERE muted = FALSE`
	if err := w.Save(view); err != nil {
		t.Fatal(err)
	}
	team := addRecord(t, w, "teams", map[string]any{"name": "42"})
	for _, user := range []**core.Record{&w.ann, &w.bob} {
		fresh, err := w.FindRecordById("users", (*user).Id)
		if err != nil {
			t.Fatal(err)
		}
		fresh.Set("role", "staff")
		fresh.Set("team", team.Id)
		fresh.SetVerified(true)
		save(t, w, fresh)
		*user = fresh
		addMember(t, w, "42", fresh)
	}

	for pattern, rule := range map[string]string{
		"join/{room}":     memberRule,
		"or/{room}":       `@request.auth.role = "none" || (` + memberRule + `)`,
		"alias/{room}":    strings.ReplaceAll(memberRule, "room_members", "room_members:m"),
		"muted/{room}":    memberRule + ` && @collection.room_members.muted ?= false`,
		"back/{room}":     `@request.auth.room_members_via_user.room ?= @request.query.room`,
		"relation/{room}": `@request.auth.team.name = @request.query.room`,
		"view/{room}":     strings.NewReplacer("room_members", "member_view", ".user", ".who").Replace(memberRule),
		"verified/{room}": `@request.auth.verified = true`,
		"role/{room}":     `@request.auth.role = "staff"`,
		"signed-in":       `@request.auth.id != ""`,
		"nobody-else":     `@collection.room_members.user ?!= "" && @collection.room_members.room ?= "42"`,
	} {
		addChannel(t, w, map[string]any{"pattern": pattern, "subscribeRule": rule})
	}
	return w
}

var memberTopics = []string{"join/42", "or/42", "alias/42", "muted/42", "back/42", "view/42"}

// TestThrownOut changes rights in every way and checks that what is sent right
// after the change does not reach who may not have it any more, and does reach
// the others.
func TestThrownOut(t *testing.T) {
	other := []string{"relation/42", "verified/42", "role/42", "signed-in"}
	all := slices.Concat(memberTopics, other)
	membership := func(t *testing.T, w *world, user *core.Record) *core.Record {
		t.Helper()
		record, err := w.FindFirstRecordByData("room_members", "user", user.Id)
		if err != nil {
			t.Fatal(err)
		}
		return record
	}
	update := func(t *testing.T, app core.App, record *core.Record, name string, value any) {
		t.Helper()
		fresh, err := app.FindRecordById(record.Collection(), record.Id)
		if err != nil {
			t.Fatal(err)
		}
		fresh.Set(name, value)
		save(t, app, fresh)
	}
	remove := func(t *testing.T, app core.App, record *core.Record) {
		t.Helper()
		if err := app.Delete(record); err != nil {
			t.Fatal(err)
		}
	}

	for _, test := range []struct {
		name   string
		change func(t *testing.T, w *world, server *pbtest.Server)
		denied []string // to Ann
	}{
		{"membership deleted", func(t *testing.T, w *world, _ *pbtest.Server) {
			remove(t, w, membership(t, w, w.ann))
		}, memberTopics},
		{"membership deleted over HTTP", func(t *testing.T, w *world, server *pbtest.Server) {
			status, answer := server.Do(t, "DELETE", "/api/collections/room_members/records/"+membership(t, w, w.ann).Id, pbtest.Token(t, w.root), nil)
			if status != 204 {
				t.Fatalf("%d %v", status, answer)
			}
		}, memberTopics},
		{"membership deleted in a transaction", func(t *testing.T, w *world, _ *pbtest.Server) {
			record := membership(t, w, w.ann)
			err := w.RunInTransaction(func(tx core.App) error { return tx.Delete(record) })
			if err != nil {
				t.Fatal(err)
			}
		}, memberTopics},
		{"moved to another room", func(t *testing.T, w *world, _ *pbtest.Server) {
			update(t, w, membership(t, w, w.ann), "room", "43")
		}, memberTopics},
		{"membership given away", func(t *testing.T, w *world, _ *pbtest.Server) {
			update(t, w, membership(t, w, w.ann), "user", w.bob.Id)
		}, memberTopics},
		{"muted", func(t *testing.T, w *world, _ *pbtest.Server) {
			update(t, w, membership(t, w, w.ann), "muted", true)
		}, []string{"muted/42", "view/42"}},
		{"another team", func(t *testing.T, w *world, _ *pbtest.Server) {
			update(t, w, w.ann, "team", "")
		}, []string{"relation/42"}},
		{"not verified", func(t *testing.T, w *world, _ *pbtest.Server) {
			update(t, w, w.ann, "verified", false)
		}, []string{"verified/42"}},
		{"another role", func(t *testing.T, w *world, server *pbtest.Server) {
			status, answer := server.Do(t, "PATCH", "/api/collections/users/records/"+w.ann.Id, pbtest.Token(t, w.root), map[string]any{"role": "guest"})
			if status != 200 {
				t.Fatalf("%d %v", status, answer)
			}
		}, []string{"role/42"}},
		{"password changed", func(t *testing.T, w *world, _ *pbtest.Server) {
			update(t, w, w.ann, "password", "another-one-123")
		}, all},
		{"user deleted", func(t *testing.T, w *world, _ *pbtest.Server) {
			remove(t, w, w.ann)
		}, all},
		{"rule changed", func(t *testing.T, w *world, _ *pbtest.Server) {
			channel, err := w.FindFirstRecordByData("notify_channels", "pattern", "role/{room}")
			if err != nil {
				t.Fatal(err)
			}
			update(t, w, channel, "subscribeRule", `@request.auth.id = "`+w.bob.Id+`"`)
		}, []string{"role/42"}},
		{"pattern changed", func(t *testing.T, w *world, _ *pbtest.Server) {
			channel, err := w.FindFirstRecordByData("notify_channels", "pattern", "role/{room}")
			if err != nil {
				t.Fatal(err)
			}
			addChannel(t, w, map[string]any{"pattern": "role/42", "subscribeRule": `@request.auth.id = "` + w.bob.Id + `"`})
			update(t, w, channel, "pattern", "roles/{room}")
		}, []string{"role/42"}},
		{"more specific channel", func(t *testing.T, w *world, _ *pbtest.Server) {
			addChannel(t, w, map[string]any{"pattern": "role/42", "subscribeRule": `@request.auth.id = "` + w.bob.Id + `"`})
		}, []string{"role/42"}},
		{"raw SQL and recheck of the topic", func(t *testing.T, w *world, server *pbtest.Server) {
			if _, err := w.DB().NewQuery("DELETE FROM room_members WHERE user = '" + w.ann.Id + "'").Execute(); err != nil {
				t.Fatal(err)
			}
			status, answer := server.Do(t, "POST", "/api/notify/recheck", pbtest.Token(t, w.root), `{"topic":"join/42"}`)
			if ended, _ := at(answer, "ended"); status != 200 || ended != float64(len(memberTopics)) {
				t.Fatalf("%d %v", status, answer)
			}
		}, memberTopics},
		{"raw SQL and recheck of the user", func(t *testing.T, w *world, server *pbtest.Server) {
			if _, err := w.DB().NewQuery("UPDATE users SET verified = FALSE").Execute(); err != nil {
				t.Fatal(err)
			}
			status, answer := server.Do(t, "POST", "/api/notify/recheck", pbtest.Token(t, w.root), `{"user":"users:`+w.ann.Id+`"}`)
			if ended, _ := at(answer, "ended"); status != 200 || ended != 1.0 {
				t.Fatalf("%d %v", status, answer)
			}
		}, []string{"verified/42"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newRooms(t)
			server := pbtest.Serve(t, w)
			keys := slices.Concat(all, []string{"fence", "@denied"})
			ann := server.Subscribe(t, w.ann, keys...)
			bob := server.Subscribe(t, w.bob, keys...)

			test.change(t, w, server)
			for _, topic := range all {
				mustSend(t, w, topic, "after")
			}
			mustSend(t, w, "fence", "over")

			for _, topic := range all {
				bob.Expect(t, topic, `"after"`)
			}
			left := slices.Clone(test.denied)
			messages := map[string]bool{}
			for len(left) > 0 || !messages["fence"] {
				event := ann.Next(t)
				if event.Type != "@denied" {
					messages[event.Type] = true
					continue
				}
				topic, _ := at(decoded(t, event.Data), "topic")
				i := slices.Index(left, fmt.Sprint(topic))
				if i < 0 || event.Data != denied(fmt.Sprint(topic)) {
					t.Fatalf("got %s", event.Data)
				}
				left = slices.Delete(left, i, i+1)
			}
			for _, topic := range all {
				if messages[topic] == slices.Contains(test.denied, topic) {
					t.Errorf("%s: got a message: %v", topic, messages[topic])
				}
			}
		})
	}
}

// TestThrownOutByOthers: what ends a right is not always a record in which a rule names the user or the room.
func TestThrownOutByOthers(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, rule, topic string
		change            func(t *testing.T, w *world, other *core.Record) error
	}{
		{"without ? beside ?=", `@collection.room_members.user ?= @request.auth.id && @collection.room_members.room = @request.query.room`, "test/42", func(t *testing.T, w *world, _ *core.Record) error {
			addMember(t, w, "43", w.bob)
			return nil
		}},
		{"without ? in a group", `@collection.room_members.user ?= @request.auth.id && (@collection.room_members.room ?= @request.query.room && @collection.room_members.room !~ "3")`, "test/42", func(t *testing.T, w *world, _ *core.Record) error {
			addMember(t, w, "43", w.bob)
			return nil
		}},
		{"one alias of two collections", `@collection.room_members:x.user ?= @request.auth.id && @collection.other:x.room ?= @request.query.room`, "test/42", func(_ *testing.T, w *world, other *core.Record) error {
			other.Set("user", w.bob.Id)
			return w.Save(other)
		}},
		{"several values", `@collection.other.tags ?= @request.query.room`, `test/["a"]`, func(_ *testing.T, w *world, other *core.Record) error {
			other.Set("tags", []string{"b"})
			return w.Save(other)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newRooms(t)
			addCollection(t, w, "other", &core.TextField{Name: "room"}, &core.TextField{Name: "user"}, &core.SelectField{Name: "tags", Values: []string{"a", "b"}, MaxSelect: 2})
			other := addRecord(t, w, "other", map[string]any{"room": "42", "user": w.ann.Id, "tags": []string{"a"}})
			addChannel(t, w, map[string]any{"pattern": "test/{room}", "subscribeRule": test.rule})
			ann := pbtest.Serve(t, w).Subscribe(t, w.ann, test.topic, "join/42", "@denied")
			if err := test.change(t, w, other); err != nil {
				t.Fatal(err)
			}
			mustSend(t, w, test.topic, "after")
			mustSend(t, w, "join/42", "after")
			got := map[string]string{}
			for range 2 {
				event := ann.Next(t)
				got[event.Type] = event.Data
			}
			if topic, _ := at(decoded(t, got["@denied"]), "topic"); topic != test.topic || got["join/42"] != `"after"` {
				t.Errorf("got %v", got)
			}
		})
	}
}

// TestThrownOutSuperuser: a superuser who is gone gets nothing more, from the commit on, where no rule looks at anybody.
func TestThrownOutSuperuser(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	addChannel(t, w, map[string]any{"pattern": "secret/{id}"}) // without a rule: for superusers only
	gone := pbtest.AddAuth(t, w, core.CollectionNameSuperusers, "gone@x.com", nil)
	subscriber := pbtest.Serve(t, w).Subscribe(t, gone, "secret/1", "fence")
	mustSend(t, w, "secret/1", "before")
	subscriber.Expect(t, "secret/1", `"before"`)
	w.OnRecordAfterDeleteSuccess(core.CollectionNameSuperusers).Bind(&hook.Handler[*core.RecordEvent]{
		Priority: -99999, // before PocketBase has ended the connection
		Func: func(e *core.RecordEvent) error {
			mustSend(t, w, "secret/1", "after")
			return e.Next()
		},
	})
	if err := w.Delete(gone); err != nil {
		t.Fatal(err)
	}
	mustSend(t, w, "fence", "over")
	for event := range subscriber.Events() { // it ends if the sign-out finds the message before the check has taken it out
		if event.Type == "fence" {
			return
		}
		t.Errorf("got %s", event.Data)
	}
}

// TestSignOut: a guest's subscribe for the connection of a user ends what only the
// user may have.
func TestSignOut(t *testing.T) {
	w := newRooms(t)
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, w.ann, "join/42", "open", "@denied")
	if status, answer := client.Try(t, nil, "join/42", "open", "@denied"); status != http.StatusNoContent {
		t.Fatalf("%d %v", status, answer)
	}
	client.Expect(t, "@denied", denied("join/42"))
	mustSend(t, w, "join/42", 1)
	if _, err := notify.New(w, notify.Config{}).Send(t.Context(), notify.Message{Topic: "open", Data: 1, To: notify.Audience{Users: []string{pbtest.Ref(w.ann)}}}); err != nil {
		t.Fatal(err)
	}
	mustSend(t, w, "open", 2)
	client.Expect(t, "open", "2")

	// and in again, as somebody else
	client.Set(t, w.bob, "join/42", "open", "@denied")
	mustSend(t, w, "join/42", 3)
	client.Expect(t, "join/42", "3")

	// one user's connection is not another's to have, as in PocketBase
	if status, _ := client.Try(t, w.ann, "open"); status != http.StatusForbidden {
		t.Errorf("status %d", status)
	}
	mustSend(t, w, "join/42", 4)
	client.Expect(t, "join/42", "4")
	for _, body := range []string{``, `{`, `{"clientId":"nope"}`, `{"clientId":7}`, `[]`} {
		if status, answer := server.DoText(t, "POST", "/api/realtime", "", body); status != 400 && status != 404 {
			t.Errorf("%s: %d %v", body, status, answer)
		}
	}
}

// TestPartlyDenied: among allowed topics a denied one breaks nothing.
func TestPartlyDenied(t *testing.T) {
	w := newRooms(t)
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, w.ann, "join/42", "@denied")
	options := "?options=%7B%22query%22%3A%7B%22a%22%3A%22b%22%7D%7D"
	client.Set(t, w.ann, "join/42", "@denied", "join/43", "join/43"+options, "role/42", "nothing/here")
	client.Expect(t, "@denied", denied("join/43"))
	mustSend(t, w, "join/43", 1)
	mustSend(t, w, "role/42", 2)
	mustSend(t, w, "join/42", 3)
	client.Expect(t, "role/42", "2")
	client.Expect(t, "join/42", "3")

	// all of what is new is denied: all stays as it was
	if status, answer := client.Try(t, w.ann, "join/43", "join/44"); status != 403 {
		t.Errorf("%d %v", status, answer)
	}
	mustSend(t, w, "role/42", 4)
	client.Expect(t, "role/42", "4")

	// nothing new: that is no refusal
	client.Set(t, w.ann, "role/42")
	mustSend(t, w, "join/42", 5)
	mustSend(t, w, "role/42", 6)
	client.Expect(t, "role/42", "6")

	// who is not signed in hears the same of what there is and of what there is not
	_, locked := server.Connect(t).Try(t, nil, "join/42")
	_, unknown := server.Connect(t).Try(t, nil, "join/99")
	if a, b := fmt.Sprint(locked), strings.ReplaceAll(fmt.Sprint(unknown), "99", "42"); a != b {
		t.Errorf("%s\n%s", a, b)
	}
}
