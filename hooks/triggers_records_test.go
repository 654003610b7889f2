package hooks_test

import (
	"encoding/json/v2"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/internal/pbtest"
	"herald/pb_migrations"
)

func TestTriggerRecords(t *testing.T) {
	w := newShop(t)
	view := core.NewViewCollection("order_view")
	view.ViewQuery = "SELECT id, status FROM orders"
	if err := w.Save(view); err != nil {
		t.Fatal(err)
	}
	server := pbtest.Serve(t, w)
	root := pbtest.Token(t, w.root)
	const path = "/api/collections/notify_triggers/records"
	for _, test := range []struct{ field, value, want string }{
		{"name", ``, "cannot be blank"},
		{"collection", `nowhere`, `there is no collection "nowhere"`},
		{"collection", `order_view`, "is a view"},
		{"collection", `notify_triggers`, "cannot watch the triggers"},
		{"events", `["rename"]`, "invalid"},
		{"events", `[]`, "cannot be blank"},
		{"changed", `status, nothing`, `has no field "nothing"`},
		{"filter", `nothing = 1`, "does not compile"},
		{"filter", `status = `, "does not compile"},
		{"topic", `orders/{id}`, "is reserved for the record events"},
		{"topic", `@inbox`, "is reserved for system messages"},
		{"topic", `a?{id}`, `must not contain "?"`},
		{"topic", `order/{id`, `"{" without "}"`},
		{"topic", `order/id}`, `"}" without "{"`},
		{"topic", `order/{nothing}`, `has no field "nothing"`},
		{"topic", `order/{secret}`, "is hidden"},
		{"topic", `order/{owner.email}`, "must not be part of a topic"},
		{"topic", `order/{owner.tokenKey}`, "is hidden"},
		{"topic", `order/{watchers.name}`, "more than one record"},
		{"topic", `order/{status.name}`, `has no relation field "status"`},
		{"fields", `nothing`, `has no field "nothing"`},
		{"fields", `expand.status.name`, `has no relation field "status"`},
		{"fields", `status:nothing(1)`, "invalid"},
		{"to", `record:status`, `has no relation field "status"`},
		{"to", `record:shop`, "does not lead to an auth collection"},
		{"to", `everybody`, "must be record:FIELD or an audience"},
		{"to", `{"user":["users:x"]}`, `"user" is unknown or has another type`},
		{"to", `{"auth":"none"}`, "must be one of"},
		{"to", `{}`, "leave it out to narrow nothing"},
		{"to", `{"users":null}`, "leave it out to narrow nothing"},
		{"to", `{"auth":"user","filter":""}`, "leave it out to narrow nothing"},
		{"to", `{"filter":"nothing = 1"}`, "nothing"},
	} {
		t.Run(test.field+" "+test.value, func(t *testing.T) {
			body := map[string]any{"name": "x", "collection": "orders", "events": []string{"create"}, "topic": "order/{id}", "enabled": true}
			if body[test.field] = any(test.value); strings.HasPrefix(test.value, "[") {
				body[test.field] = decoded(t, test.value)
			}
			status, text := server.DoText(t, "POST", path, root, body)
			message := strings.ToLower(strings.ReplaceAll(text, `\"`, `"`))
			if status != http.StatusBadRequest || !strings.Contains(message, strings.ToLower(test.want)) || !strings.Contains(text, `"`+test.field+`"`) {
				t.Errorf("%d %s", status, text)
			}
			// switched off it may be saved half done, if its fields are filled in
			if body["enabled"] = false; test.field != "name" && test.field != "events" {
				if status, text := server.DoText(t, "POST", path, root, body); status != http.StatusOK {
					t.Errorf("switched off: %d %s", status, text)
				}
			}
		})
	}
	for _, who := range []*core.Record{nil, w.ann} {
		if status, _ := server.Do(t, "GET", path, pbtest.Token(t, who), nil); status != http.StatusForbidden {
			t.Errorf("status %d", status)
		}
	}
}

// TestTriggerSwitchedOff: where what a trigger names is renamed or removed it is
// switched off, and tells why; saves go on.
func TestTriggerSwitchedOff(t *testing.T) {
	for name, change := range map[string]func(w *world) error{
		"a field that is removed": func(w *world) error {
			orders := mustFind(t, w, "orders")
			orders.Fields.RemoveByName("status")
			return w.Save(orders)
		},
		"a field that is renamed": func(w *world) error {
			orders := mustFind(t, w, "orders")
			orders.Fields.GetByName("status").SetName("state")
			return w.Save(orders)
		},
		"a field that is removed, where the triggers are renamed": func(w *world) error {
			triggers := mustFind(t, w, "notify_triggers")
			triggers.Name = "alerts"
			if err := w.Save(triggers); err != nil {
				return err
			}
			orders := mustFind(t, w, "orders")
			orders.Fields.RemoveByName("status")
			return w.Save(orders)
		},
		"a collection that is removed": func(w *world) error { return w.Delete(mustFind(t, w, "orders")) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newShop(t)
			record := addTrigger(t, w, map[string]any{"filter": `status != "draft"`, "topic": "changes"})
			server := pbtest.Serve(t, w)
			server.Subscribe(t, nil, "changes")
			if err := change(w); err != nil {
				t.Fatal(err)
			}
			after, err := w.FindRecordById(pb_migrations.TriggersCollectionID, record.Id)
			if err != nil {
				t.Fatal(err)
			}
			if after.GetBool("enabled") || !strings.HasPrefix(after.GetString("status"), "Switched off: ") {
				t.Errorf("enabled %v, status %q", after.GetBool("enabled"), after.GetString("status"))
			}
			collection, err := w.FindCollectionByNameOrId("orders")
			if err != nil {
				return // it is gone
			}
			save(t, w, core.NewRecord(collection))
		})
	}
}

// TestTriggerRenamed: a trigger follows its collection, and those of its audience, to
// another name, and has nothing to do with the collection that gets the old one.
func TestTriggerRenamed(t *testing.T) {
	w := newShop(t)
	record := addTrigger(t, w, map[string]any{"topic": "changes", "to": `{"users":["users:` + w.ann.Id + `"],"collections":["users"]}`})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, w.ann, "changes", "fence")
	for from, to := range map[string]string{"orders": "sales", "users": "staff"} {
		collection := mustFind(t, w, from)
		collection.Name = to
		if err := w.Save(collection); err != nil {
			t.Fatal(err)
		}
		addCollection(t, w, from, &core.TextField{Name: "status"})
	}
	addRecord(t, w, "orders", map[string]any{"status": "not this"})
	addRecord(t, w, "sales", map[string]any{"status": "paid"})
	if event := client.Next(t); event.Data != `{"action":"create","collection":"sales","record":{"status":"paid"}}` {
		t.Errorf("got %s", event.Data)
	}
	after, err := w.FindRecordById("notify_triggers", record.Id)
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"collections":["staff"],"users":["staff:` + w.ann.Id + `"]}`; after.GetString("collection") != "sales" || after.GetString("to") != want || !after.GetBool("enabled") {
		t.Errorf("%s, %s, %s", after.GetString("collection"), after.GetString("to"), after.GetString("status"))
	}
}

// TestTriggerFailure: a message that cannot be sent is counted, and the save is fine.
func TestTriggerFailure(t *testing.T) {
	w := newShop(t)
	addTrigger(t, w, map[string]any{"topic": "{status}"})
	addChannel(t, w, map[string]any{"pattern": "{any...}", "subscribeRule": "*", "history": 10}) // everything is wanted
	w.Settings().Logs.MaxDays = 1
	server := pbtest.Serve(t, w)
	addOrder(t, w, map[string]any{"status": "@inbox"})
	addOrder(t, w, map[string]any{"status": strings.Repeat("x", 300)})
	addOrder(t, w, map[string]any{"status": "fine"})
	pbtest.WaitFor(t, "it is counted", func() bool {
		_, answer := server.Do(t, "GET", "/api/notify/stats", pbtest.Token(t, w.root), nil)
		stats := answer.(map[string]any)
		return stats["triggerMessages"] == 1.0
	})
	if got := historyOf(t, server, nil, "fine", "", 1); len(got.Items) != 1 {
		t.Errorf("history %+v", got)
	}
}

// TestTriggerUnwanted: a trigger to whose topic nobody listens costs no query.
func TestTriggerUnwanted(t *testing.T) {
	w := newShop(t)
	pbtest.Serve(t, w)
	create := func() int64 {
		queries := pbtest.CountQueries(t, w)
		addOrder(t, w, map[string]any{"status": "x", "owner": w.ann.Id})
		return queries()
	}
	without := create()
	addTrigger(t, w, map[string]any{"topic": "order/{id}", "filter": `owner.name != "x"`, "to": "record:owner"})
	addTrigger(t, w, map[string]any{"topic": "user/{owner.name}"})
	if with := create(); with != without {
		t.Errorf("%d queries, %d without triggers", with, without)
	}
}

// TestTriggerShutdown: what is committed is sent before the server stops.
func TestTriggerShutdown(t *testing.T) {
	w := newShop(t)
	addTrigger(t, w, map[string]any{"topic": "changes"})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, nil, "changes")
	for range 200 {
		addOrder(t, w, map[string]any{"status": "x"})
	}
	event := new(core.TerminateEvent)
	event.App = w
	if err := w.OnTerminate().Trigger(event, func(*core.TerminateEvent) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if got := len(client.ExpectEnd(t)); got != 200 {
		t.Errorf("%d messages", got)
	}
}

// BenchmarkImport measures an import of records while 100 subscribers listen to what a
// trigger sends for each, against one without the trigger, in turns. x-without is the
// time of the former divided by that of the latter.
func BenchmarkImport(b *testing.B) {
	const records = 10_000
	worlds := [2]*world{newShop(b), newShop(b)}
	addTrigger(b, worlds[1], map[string]any{"topic": "changes", "filter": `status = "x"`})
	for _, w := range worlds {
		server := pbtest.Serve(b, w)
		for range 100 {
			client := server.Subscribe(b, nil, "changes")
			go func() {
				for range client.Events() {
				}
			}()
		}
	}
	var took [2]time.Duration
	turns := int64(0)
	for b.Loop() {
		for i, w := range worlds {
			start := time.Now()
			err := w.RunInTransaction(func(tx core.App) error {
				for range records {
					addOrder(b, tx, map[string]any{"status": "x"})
				}
				return nil
			})
			if err != nil {
				b.Fatal(err)
			}
			took[i] += time.Since(start)
			if i == 0 {
				continue
			}
			turns++ // the next turn is not to have what is left of this one
			pbtest.WaitFor(b, "all is sent", func() bool { return engine(w).Stats().Messages >= turns*records })
		}
	}
	b.ReportMetric(took[0].Seconds()/float64(b.N), "s/without")
	b.ReportMetric(took[1].Seconds()/float64(b.N), "s/with")
	b.ReportMetric(float64(took[1])/float64(took[0]), "x-without")
}

// Code of the application may write with the app that it was bound to, and not the
// event's, wherever there is no transaction of its own: a trigger must not make one
// around it.
func TestTriggerLeavesPlainSavesPlain(t *testing.T) {
	t.Parallel()
	w := newShop(t)
	writes := 0
	log := func() {
		writes++
		addRecord(t, w, "shops", map[string]any{"name": fmt.Sprint("log ", writes)}) // w, not e.App
	}
	for _, priority := range []int{-1000, 0, 9999, 100000} {
		onRecord := &hook.Handler[*core.RecordEvent]{Priority: priority, Func: func(e *core.RecordEvent) error {
			log()
			err := e.Next()
			log()
			return err
		}}
		onModel := &hook.Handler[*core.ModelEvent]{Priority: priority, Func: func(e *core.ModelEvent) error {
			log()
			err := e.Next()
			log()
			return err
		}}
		w.OnRecordCreate("orders").Bind(onRecord)
		w.OnRecordUpdate("orders").Bind(onRecord)
		w.OnRecordCreateExecute("orders").Bind(onRecord)
		w.OnRecordUpdateExecute("orders").Bind(onRecord)
		w.OnModelCreateExecute("orders").Bind(onModel)
		w.OnModelUpdateExecute("orders").Bind(onModel)
	}
	addTrigger(t, w, map[string]any{"topic": "changes", "filter": `status != ""`, "changed": "status"})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, nil, "changes")

	order := addOrder(t, w, map[string]any{"status": "open"})
	client.Expect(t, "changes", fired("create", `{"status":"open"}`))
	order.Set("status", "paid")
	save(t, w, order)
	client.Expect(t, "changes", fired("update", `{"status":"paid"}`))
	if status, answer := server.Do(t, "PATCH", "/api/collections/orders/records/"+order.Id, "", `{"status":"api"}`); status != http.StatusOK {
		t.Fatal(status, answer)
	}
	client.Expect(t, "changes", fired("update", `{"status":"api"}`))
	if want := 3 * 3 * 4 * 2; writes != want {
		t.Errorf("the handlers wrote %d times, not %d", writes, want)
	}
}

// TestTriggerFields: what is sent, and what never is.
func TestTriggerFields(t *testing.T) {
	w := newShop(t)
	bob, err := w.FindRecordById("users", w.bob.Id)
	if err != nil {
		t.Fatal(err)
	}
	bob.Set("name", "Bob")
	save(t, w, bob)
	ann, err := w.FindRecordById("users", w.ann.Id)
	if err != nil {
		t.Fatal(err)
	}
	ann.SetEmailVisibility(true)
	save(t, w, ann)
	shop := addRecord(t, w, "shops", map[string]any{"name": "Corner", "margin": "40 %", "keeper": w.bob.Id})
	for _, trigger := range [][2]string{
		{"f/some", "status,total"},
		{"f/expand", "status,expand.shop.name,expand.shop.margin,expand.owner.email,expand.shop.expand.keeper.name,expand.shop.expand.keeper.email"},
		{"f/hidden", "secret,status"},
		{"f/short", "status:excerpt(3)"},
		{"f/dots", "status:excerpt(3,true),total"},
		{"f/all", ""},
	} {
		addTrigger(t, w, map[string]any{"name": trigger[0], "topic": trigger[0], "fields": trigger[1], "events": []string{"create"}})
	}
	server := pbtest.Serve(t, w)
	got := func(topic string) any {
		t.Helper()
		client := server.Subscribe(t, nil, topic)
		addOrder(t, w, map[string]any{"status": "shipped", "total": 3, "secret": "s3cret", "owner": w.ann.Id, "shop": shop.Id})
		var message struct {
			Record any `json:"record"`
		}
		text := client.Next(t).Data
		if err := json.Unmarshal([]byte(text), &message); err != nil {
			t.Fatal(err)
		}
		for _, never := range []string{"s3cret", "40 %", "bob@x.com", "tokenKey", "password"} {
			if strings.Contains(text, never) {
				t.Errorf("%s: %q in %s", topic, never, text)
			}
		}
		return message.Record
	}
	listening := server.Subscribe(t, nil, "f/expand") // what that one expands is not for the others
	all := got("f/all").(map[string]any)
	listening.Next(t)
	if all["expand"] != nil || all["status"] != "shipped" || all["owner"] != w.ann.Id || all["collectionName"] != "orders" {
		t.Errorf("all: %v", all)
	}
	for topic, want := range map[string]string{
		"f/some":   `{"status":"shipped","total":3}`,
		"f/expand": `{"expand":{"owner":{"email":"ann@x.com"},"shop":{"expand":{"keeper":{"name":"Bob"}},"name":"Corner"}},"status":"shipped"}`,
		"f/hidden": `{"status":"shipped"}`,
		"f/short":  `{"status":"shi"}`,
		"f/dots":   `{"status":"shi...","total":3}`,
	} {
		encoded, err := json.Marshal(got(topic), json.Deterministic(true))
		if err != nil || string(encoded) != want {
			t.Errorf("%s: got %s, want %s", topic, encoded, want)
		}
	}
}
