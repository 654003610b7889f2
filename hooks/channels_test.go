package hooks_test

import (
	"encoding/json/v2"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
	"herald/notify"
)

const memberRule = `@collection.room_members.room ?= @request.query.room && @collection.room_members.user ?= @request.auth.id`

// addChannel adds a channel with the values of its fields.
func addChannel(t testing.TB, app core.App, values map[string]any) *core.Record {
	t.Helper()
	return addRecord(t, app, "notify_channels", values)
}

func addRecord(t testing.TB, app core.App, collectionName string, values map[string]any) *core.Record {
	t.Helper()
	collection, err := app.FindCollectionByNameOrId(collectionName)
	if err != nil {
		t.Fatal(err)
	}
	record := core.NewRecord(collection)
	record.Load(values)
	save(t, app, record)
	return record
}

func addCollection(t testing.TB, app core.App, name string, fields ...core.Field) *core.Collection {
	t.Helper()
	collection := core.NewBaseCollection(name)
	collection.Fields.Add(fields...)
	if err := app.Save(collection); err != nil {
		t.Fatal(err)
	}
	return collection
}

// addMembers adds the collection of who is in which room.
func addMembers(t testing.TB, app core.App) {
	t.Helper()
	users, err := app.FindCollectionByNameOrId("users")
	if err != nil {
		t.Fatal(err)
	}
	addCollection(t, app, "room_members",
		&core.TextField{Name: "room"},
		&core.RelationField{Name: "user", CollectionId: users.Id, CascadeDelete: true},
		&core.BoolField{Name: "muted"},
	)
}

func addMember(t testing.TB, app core.App, room string, user *core.Record) *core.Record {
	t.Helper()
	return addRecord(t, app, "room_members", map[string]any{"room": room, "user": user.Id})
}

// mustSend sends data from the server's own code.
func mustSend(t testing.TB, app core.App, topic string, data any) {
	t.Helper()
	if err := notify.Notify(app, topic, data); err != nil {
		t.Fatal(err)
	}
}

// TestAccess tries every kind of user with every kind of rule: who may listen, who
// may publish, and what reaches whom.
func TestAccess(t *testing.T) {
	w := newWorld(t)
	addMembers(t, w)
	addMember(t, w, "42", w.ann)
	w.ann.SetVerified(true)
	save(t, w, w.ann)
	w.bob.SetVerified(true)
	save(t, w, w.bob)
	eve := pbtest.AddAuth(t, w, "users", "eve@x.com", nil) // not verified
	const all = "guest ann bob eve root"
	who := []struct {
		name string
		auth *core.Record
	}{{"guest", nil}, {"ann", w.ann}, {"bob", w.bob}, {"eve", eve}, {"root", w.root}}

	rules := []struct{ pattern, rule, topic, allowed string }{
		{"locked/{x}", "", "locked/1", "root"},
		{"open/{x}", "*", "open/1", all},
		{"open-too/{x}", " * ", "open-too/1", all},
		{"auth/{x}", `@request.auth.id != ""`, "auth/1", "ann bob eve root"},
		{"verified/{x}", `@request.auth.verified = true`, "verified/1", "ann bob root"},
		{"owner/{id}", `@request.query.id = @request.auth.id`, "owner/" + w.ann.Id, "ann root"},
		{"member/{room}", memberRule, "member/42", "ann root"},
		{"no-member/{room}", memberRule, "no-member/43", "root"},
		{"own-field/{x}", `rateLimit = 7 && @request.auth.id = "` + w.bob.Id + `"`, "own-field/1", "bob root"},
		{"own-field-off/{x}", `rateLimit = 8`, "own-field-off/1", "root"},
		{"files/{path...}", `@request.query.path ~ "public/%"`, "files/public/a/b.txt", all},
		{"guests/{x}", `@request.auth.id = ""`, "guests/1", "guest root"},
		{"collection/{x}", `@request.auth.collectionName = "users"`, "collection/1", "ann bob eve root"},
	}
	for _, r := range rules {
		addChannel(t, w, map[string]any{
			"pattern": "s/" + r.pattern, "subscribeRule": r.rule, "publishRule": `@request.auth.id = "nobody"`, "rateLimit": 7,
		})
		addChannel(t, w, map[string]any{
			"pattern": "p/" + r.pattern, "subscribeRule": "*", "publishRule": r.rule, "rateLimit": 7,
		})
	}
	rules = append(rules, struct{ pattern, rule, topic, allowed string }{"", "no channel", "none/1", all})
	server := pbtest.Serve(t, w)

	for _, r := range rules {
		for _, user := range who {
			t.Run(r.topic+" "+user.name, func(t *testing.T) {
				allowed := strings.Contains(" "+r.allowed+" ", " "+user.name+" ")
				topic := "s/" + r.topic
				client := server.Subscribe(t, user.auth, "fence")
				status, answer := client.Try(t, user.auth, "fence", topic)
				if allowed && status != http.StatusNoContent {
					t.Errorf("subscribe: %d %v", status, answer)
				}
				if !allowed {
					message, _ := at(answer, "message")
					code, _ := at(answer, "data.subscriptions.1.code")
					if status != http.StatusForbidden || !strings.Contains(fmt.Sprint(message), topic) || code != "validation_topic_forbidden" {
						t.Errorf("subscribe: %d %v", status, answer)
					}
				}
				mustSend(t, w, topic, "secret")
				mustSend(t, w, "fence", "over")
				if allowed {
					client.Expect(t, topic, `"secret"`)
				}
				client.Expect(t, "fence", `"over"`)

				topic = "p/" + r.topic
				if r.pattern == "" {
					allowed = user.name == "root" // without a channel only superusers send
				}
				listener := server.Subscribe(t, w.root, topic+"?options=%7B%22query%22%3A%7B%22envelope%22%3A%22true%22%7D%7D", "fence")
				status, answer = server.Do(t, "POST", "/api/notify/publish", pbtest.Token(t, user.auth),
					map[string]any{"topic": topic, "data": "hello"})
				if want := map[bool]int{true: 200, false: 403}[allowed]; status != want {
					t.Errorf("publish: %d %v, want %d", status, answer, want)
				}
				mustSend(t, w, "fence", "over")
				if allowed {
					from, _ := at(decoded(t, listener.Next(t).Data), "from")
					if want := refOrNil(user.auth); from != want {
						t.Errorf("from %v, want %v", from, want)
					}
				}
				listener.Expect(t, "fence", `"over"`)
			})
		}
	}
}

func refOrNil(record *core.Record) any {
	if record == nil {
		return nil
	}
	return pbtest.Ref(record)
}

// TestAccessValues: nothing that a client sends can stand for the pattern's values.
func TestAccessValues(t *testing.T) {
	w := newWorld(t)
	addMembers(t, w)
	addMember(t, w, "42", w.ann)
	addChannel(t, w, map[string]any{"pattern": "chat/{room}", "subscribeRule": memberRule, "publishRule": memberRule})
	addChannel(t, w, map[string]any{"pattern": "header/{x}", "subscribeRule": `@request.headers.x_key = "open"`})
	server := pbtest.Serve(t, w)
	client := server.Connect(t)

	options := func(json string) string {
		return "?options=" + strings.NewReplacer(`"`, "%22", "{", "%7B", "}", "%7D").Replace(json)
	}
	for _, key := range []string{
		"chat/43" + options(`{"query":{"room":"42"}}`),
		"chat/43?room=42",
		"chat/43?options=%7B%22query%22%3A%7B%22room%22%3A%2242%22%7D%7D&room=42",
		"chat/43" + options(`{"query":{"room":42},"headers":{"x_key":"open"}}`),
		"chat/42/" + options(`{}`), "chat//42", "/chat/42", "chat/42 ", "Chat/42/..", "chat/%34%32", "chat/42\x00",
		"header/1", "header/1" + options(`{"headers":{"x_key":"closed"}}`), "header/1" + options(`{"query":{"x_key":"open"}}`),
	} {
		status, answer := client.Try(t, w.ann, key)
		// those which are another topic, without a channel, are open as in PocketBase
		if topic, _, _ := strings.Cut(key, "?"); !strings.HasPrefix(topic, "chat/4") && !strings.HasPrefix(topic, "header/") {
			continue
		} else if strings.Count(topic, "/") > 1 {
			continue
		}
		if status != http.StatusForbidden {
			t.Errorf("%q: %d %v", key, status, answer)
		}
	}
	client.Set(t, w.ann, "chat/42"+options(`{"query":{"room":"43"}}`), "header/1"+options(`{"headers":{"X-Key":"open"}}`))

	// the same in the query of the request itself
	if status, answer := server.Do(t, "POST", "/api/notify/publish?room=42", pbtest.Token(t, w.ann), `{"topic":"chat/43","data":1}`); status != 403 {
		t.Errorf("publish: %d %v", status, answer)
	}
}

// TestChannelRecords: the errors that the dashboard shows for a channel that is wrong.
func TestChannelRecords(t *testing.T) {
	w := newWorld(t)
	addMembers(t, w)
	addChannel(t, w, map[string]any{"pattern": "taken/{id}"})
	server := pbtest.Serve(t, w)
	const path = "/api/collections/notify_channels/records"

	for _, test := range []struct{ field, value, want string }{
		{"pattern", ``, "cannot be blank"},
		{"pattern", `/chat`, "must not begin with"},
		{"pattern", `chat/{`, "bad wildcard segment"},
		{"pattern", `chat/{}`, "empty wildcard"},
		{"pattern", `chat/{room}/{room}`, "duplicate wildcard"},
		{"pattern", `chat/{room...}/x`, "wildcard"},
		{"pattern", `chat/a{room}`, "wildcard"},
		{"pattern", `chat/{1a}`, "wildcard"},
		{"pattern", `chat//x`, "empty segment"},
		{"pattern", `chat/./x`, "empty segment"},
		{"pattern", `chat/../x`, "empty segment"},
		{"pattern", `@inbox`, "must not begin with"},
		{"pattern", `@presence/{x}`, "must not begin with"},
		{"pattern", `chat/{history}`, "number"},
		{"pattern", `taken/{other}`, "conflicts with"},
		{"pattern", `{x}/1`, "conflicts with"},
		{"pattern", strings.Repeat("x", 256), "255"},
		{"subscribeRule", `zzz = 1`, "does not compile"},
		{"subscribeRule", `@request.auth.id =`, "does not compile"},
		{"subscribeRule", `* || id = 1`, "does not compile"},
		{"subscribeRule", `@request.query.other = 1`, "the pattern has no {other}"},
		{"subscribeRule", `@collection.nope.id = 1`, `there is no collection`},
		{"subscribeRule", `@collection.room_members.nope = 1`, "does not compile"},
		{"subscribeRule", `@request.body.x = 1`, "see no body"},
		{"publishRule", `@request.query.other = 1`, "the pattern has no {other}"},
		{"publishRule", `zzz = 1`, "does not compile"},
		{"presenceRule", `zzz = 1`, "does not compile"},
		{"history", `-1`, "0"},
		{"historyTTL", `-1`, "0"},
		{"rateLimit", `-0.5`, "0"},
		{"maxSize", `-1`, "0"},
		{"maxSize", `1.5`, "decimal"},
	} {
		body := map[string]any{"pattern": "ok/{id}"}
		body[test.field] = test.value
		status, answer := server.Do(t, "POST", path, pbtest.Token(t, w.root), body)
		message, _ := at(answer, "data."+test.field+".message")
		if status != 400 || !strings.Contains(strings.ToLower(fmt.Sprint(message)), test.want) {
			t.Errorf("%s %q: %d %v, want %q", test.field, test.value, status, answer, test.want)
		}
	}

	// all that is wrong at once, PocketBase's own checks among it
	status, answer := server.Do(t, "POST", path, pbtest.Token(t, w.root),
		map[string]any{"pattern": "taken/{other}", "subscribeRule": "zzz = 1", "publishRule": "yyy = 1", "maxSize": -1})
	for _, field := range []string{"pattern", "subscribeRule", "publishRule", "maxSize"} {
		if _, ok := at(answer, "data."+field+".code"); !ok {
			t.Errorf("%s is missing in %d %v", field, status, answer)
		}
	}

	// one that is right, and changes of it
	status, answer = server.Do(t, "POST", path, pbtest.Token(t, w.root), map[string]any{
		"pattern": "ok/{room}", "subscribeRule": memberRule, "publishRule": `@request.auth.id != "" && @now > "2020-01-01"`, "presenceRule": "*",
	})
	if status != 200 {
		t.Fatalf("%d %v", status, answer)
	}
	id, _ := at(answer, "id")
	for _, change := range []struct {
		body   map[string]any
		status int
	}{
		{map[string]any{"publishRule": ""}, 200}, // itself is no conflict
		{map[string]any{"pattern": "ok/{other}"}, 400},
		{map[string]any{"pattern": "ok/{room}/x"}, 200},
		{map[string]any{"subscribeRule": "zzz"}, 400},
	} {
		if status, answer := server.Do(t, "PATCH", path+"/"+fmt.Sprint(id), pbtest.Token(t, w.root), change.body); status != change.status {
			t.Errorf("%v: %d %v", change.body, status, answer)
		}
	}

	// superusers only
	for who, auth := range map[string]*core.Record{"guest": nil, "user": w.ann} {
		for _, request := range []struct{ method, path string }{{"GET", path}, {"POST", path}, {"PATCH", path + "/" + fmt.Sprint(id)}, {"DELETE", path + "/" + fmt.Sprint(id)}} {
			if status, answer := server.Do(t, request.method, request.path, pbtest.Token(t, auth), map[string]any{"pattern": "mine"}); status != 403 {
				t.Errorf("%s %s: %d %v", who, request.method, status, answer)
			}
		}
	}
}

// TestMostSpecificChannel: which channel counts, and that a change counts at once.
func TestMostSpecificChannel(t *testing.T) {
	w := newWorld(t)
	server := pbtest.Serve(t, w)
	may := func(topic string) bool {
		t.Helper()
		status, _ := server.Connect(t).Try(t, w.ann, topic)
		return status == http.StatusNoContent
	}
	if !may("chat/42/x") {
		t.Error("without a channel anyone may listen")
	}
	wide := addChannel(t, w, map[string]any{"pattern": "chat/{path...}"})
	if may("chat/42/x") {
		t.Error("a new channel has no effect")
	}
	narrow := addChannel(t, w, map[string]any{"pattern": "chat/{room}/x", "subscribeRule": "*"})
	if !may("chat/42/x") || may("chat/42/y") {
		t.Error("the most specific channel does not win")
	}
	narrow.Set("subscribeRule", `@request.query.room = "42"`)
	save(t, w, narrow)
	if !may("chat/42/x") || may("chat/43/x") {
		t.Error("a changed rule has no effect")
	}
	if err := w.Delete(narrow); err != nil {
		t.Fatal(err)
	}
	if may("chat/42/x") {
		t.Error("a deleted channel still counts")
	}
	err := w.RunInTransaction(func(tx core.App) error {
		wide, err := tx.FindRecordById("notify_channels", wide.Id)
		if err != nil {
			return err
		}
		if err := tx.Delete(wide); err != nil {
			return err
		}
		addChannel(t, tx, map[string]any{"pattern": "chat/{path...}", "subscribeRule": "*"}) // no conflict with what is gone
		return fmt.Errorf("rolled back")
	})
	if err == nil || may("chat/42/x") {
		t.Error("a channel that was rolled back counts")
	}
}

// TestEmptyWildcard: {name...} that stands for nothing is not the same as a record that is
// not there.
func TestEmptyWildcard(t *testing.T) {
	w := newWorld(t)
	addMembers(t, w) // of which there are none
	rule := strings.ReplaceAll(memberRule, "query.room", "query.p")
	addChannel(t, w, map[string]any{
		"pattern": "path/{p...}", "subscribeRule": rule, "publishRule": rule, "history": 10, "presence": true, "presenceRule": rule,
	})
	addChannel(t, w, map[string]any{"pattern": "open/{p...}", "subscribeRule": `@request.query.p != "secret"`})
	server := pbtest.Serve(t, w)
	for topic, want := range map[string]int{"path/": 403, "path//": 403, "path/a//": 403, "path/a/b": 403, "open/": 403, "open/x": 204} {
		for _, who := range []*core.Record{nil, w.ann} {
			if status, _ := server.Connect(t).Try(t, who, topic); status != want {
				t.Errorf("subscribe to %q: %d, want %d", topic, status, want)
			}
			if status, _ := server.Do(t, "GET", historyPath(topic, "", 10), pbtest.Token(t, who), nil); status != 403 && want == 403 {
				t.Errorf("history of %q: %d", topic, status)
			}
			_, pages := server.DoText(t, "POST", "/api/notify/history", pbtest.Token(t, who), map[string]any{"topics": []any{map[string]any{"topic": topic}}})
			if !strings.Contains(pages, `"status":403`) && want == 403 {
				t.Errorf("history of %q among several: %s", topic, pages)
			}
			if status, _ := server.Do(t, "GET", "/api/notify/presence?topic="+topic, pbtest.Token(t, who), nil); status != 403 && want == 403 {
				t.Errorf("presence on %q: %d", topic, status)
			}
			present := map[string]any{"topic": topic, "visible": true}
			if status, answer := server.Do(t, "PUT", "/api/notify/presence", pbtest.Token(t, who), present); status != 403 {
				t.Errorf("visible on %q: %d %v", topic, status, answer)
			}
			if status, _ := server.Do(t, "POST", publishPath, pbtest.Token(t, who), map[string]any{"topic": topic, "data": 1}); status != 403 {
				t.Errorf("publish to %q: %d", topic, status)
			}
		}
		server.Connect(t).Set(t, w.root, topic)
	}
	// a membership without a room lets nobody in either
	addMember(t, w, "", w.ann)
	if status, _ := server.Connect(t).Try(t, w.ann, "path/"); status != 403 {
		t.Errorf("with an empty membership: %d", status)
	}
}

func denied(topic string) string {
	return fmt.Sprintf(`{"topic":%q,"status":403,"message":%q}`, topic, notify.DeniedMessage)
}

// decoded reads JSON.
func decoded(t testing.TB, text string) any {
	t.Helper()
	var value any
	if err := json.Unmarshal([]byte(text), &value); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return value
}
