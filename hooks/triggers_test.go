package hooks_test

import (
	"encoding/json/v2"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/internal/pbtest"
	"herald/pb_migrations"
)

// newShop is a world with orders: who owns them, and of which shop they are.
func newShop(t testing.TB) *world {
	t.Helper()
	w := newWorld(t)
	users := mustFind(t, w, "users")
	shops := addCollection(t, w, "shops", &core.TextField{Name: "name"}, &core.TextField{Name: "margin", Hidden: true},
		&core.RelationField{Name: "keeper", CollectionId: users.Id})
	orders := addCollection(t, w, "orders",
		&core.TextField{Name: "status"},
		&core.NumberField{Name: "total"},
		&core.TextField{Name: "secret", Hidden: true},
		&core.RelationField{Name: "owner", CollectionId: users.Id, CascadeDelete: true},
		&core.RelationField{Name: "watchers", CollectionId: users.Id, MaxSelect: 9},
		&core.RelationField{Name: "shop", CollectionId: shops.Id},
	)
	for _, rule := range []**string{&orders.CreateRule, &orders.UpdateRule, &orders.DeleteRule, &orders.ListRule, &orders.ViewRule} {
		*rule = new(string)
	}
	if err := w.Save(orders); err != nil {
		t.Fatal(err)
	}
	return w
}

// addTrigger adds an enabled trigger of orders.
func addTrigger(t testing.TB, app core.App, values map[string]any) *core.Record {
	t.Helper()
	all := map[string]any{"name": "test", "collection": "orders", "events": []string{"create", "update", "delete"}, "topic": "order/{id}", "fields": "status", "enabled": true}
	for name, value := range values {
		all[name] = value
	}
	return addRecord(t, app, "notify_triggers", all)
}

func addOrder(t testing.TB, app core.App, values map[string]any) *core.Record {
	t.Helper()
	return addRecord(t, app, "orders", values)
}

func fired(action, record string) string {
	return fmt.Sprintf(`{"action":%q,"collection":"orders","record":%s}`, action, record)
}

// TestTriggerActions: create, update and delete, from the server's own code and over
// the API, with the values at that time.
func TestTriggerActions(t *testing.T) {
	w := newShop(t)
	// before the server starts: PocketBase reads its settings at each request, without a lock
	w.Settings().Batch.Enabled = true
	w.Settings().Batch.MaxRequests = 10
	w.Settings().Batch.Timeout = 10
	if err := w.Save(w.Settings()); err != nil {
		t.Fatal(err)
	}
	addTrigger(t, w, map[string]any{"topic": "orders-changed"})
	addTrigger(t, w, map[string]any{"name": "only new", "topic": "new/{status}", "events": []string{"create"}})
	addTrigger(t, w, map[string]any{"name": "off", "topic": "orders-changed", "enabled": false})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, nil, "orders-changed", "new/open")
	order := addOrder(t, w, map[string]any{"status": "open"})
	client.Expect(t, "orders-changed", fired("create", `{"status":"open"}`))
	client.Expect(t, "new/open", fired("create", `{"status":"open"}`))
	order.Set("status", "paid")
	save(t, w, order)
	client.Expect(t, "orders-changed", fired("update", `{"status":"paid"}`))
	order.Set("status", "not saved")
	if err := w.Delete(order); err != nil {
		t.Fatal(err)
	}
	client.Expect(t, "orders-changed", fired("delete", `{"status":"paid"}`))

	// over the API, alone and in a batch
	if status, answer := server.Do(t, "POST", "/api/collections/orders/records", "", `{"status":"api"}`); status != http.StatusOK {
		t.Fatalf("%d %v", status, answer)
	}
	client.Expect(t, "orders-changed", fired("create", `{"status":"api"}`))
	status, answer := server.Do(t, "POST", "/api/batch", "", `{"requests":[
		{"method":"POST","url":"/api/collections/orders/records","body":{"status":"one"}},
		{"method":"POST","url":"/api/collections/orders/records","body":{"status":"two"}}]}`)
	if status != http.StatusOK {
		t.Fatalf("%d %v", status, answer)
	}
	client.Expect(t, "orders-changed", fired("create", `{"status":"one"}`))
	client.Expect(t, "orders-changed", fired("create", `{"status":"two"}`))

	// a batch that fails sends nothing
	if status, _ := server.Do(t, "POST", "/api/batch", "", `{"requests":[
		{"method":"POST","url":"/api/collections/orders/records","body":{"status":"no"}},
		{"method":"POST","url":"/api/collections/nowhere/records","body":{}}]}`); status == http.StatusOK {
		t.Fatal("the batch did not fail")
	}
	addOrder(t, w, map[string]any{"status": "yes"})
	client.Expect(t, "orders-changed", fired("create", `{"status":"yes"}`))
}

func TestTriggerTransactions(t *testing.T) {
	t.Parallel() // it waits most of the time
	w := newShop(t)
	addTrigger(t, w, map[string]any{"topic": "changes"})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, nil, "changes")

	rolledBack := errors.New("no")
	err := w.RunInTransaction(func(tx core.App) error {
		order := addOrder(t, tx, map[string]any{"status": "never"})
		order.Set("status", "never either")
		save(t, tx, order)
		return rolledBack
	})
	if !errors.Is(err, rolledBack) {
		t.Fatal(err)
	}
	err = w.RunInTransaction(func(tx core.App) error {
		order := addOrder(t, tx, map[string]any{"status": "a"})
		order.Set("status", "b")
		save(t, tx, order)
		if err := tx.RunInTransaction(func(inner core.App) error {
			order.Set("status", "c")
			return inner.Save(order)
		}); err != nil {
			return err
		}
		mustSend(t, w, "changes", "before the commit")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	client.Expect(t, "changes", `"before the commit"`)
	client.Expect(t, "changes", fired("create", `{"status":"a"}`))
	client.Expect(t, "changes", fired("update", `{"status":"b"}`))
	client.Expect(t, "changes", fired("update", `{"status":"c"}`))

	// a save that a handler refuses, and one in a transaction that panics
	w.OnRecordUpdate("orders").BindFunc(func(e *core.RecordEvent) error {
		if e.Record.GetString("status") == "refused" {
			return errors.New("refused")
		}
		return e.Next()
	})
	order := addOrder(t, w, map[string]any{"status": "d"})
	order.Set("status", "refused")
	if err := w.Save(order); err == nil {
		t.Fatal("not refused")
	}
	client.Expect(t, "changes", fired("create", `{"status":"d"}`))
	func() {
		defer func() { _ = recover() }()
		_ = w.RunInTransaction(func(tx core.App) error {
			addOrder(t, tx, map[string]any{"status": "lost"})
			panic("in a transaction")
		})
	}()
	addOrder(t, w, map[string]any{"status": "e"})
	client.Expect(t, "changes", fired("create", `{"status":"e"}`)) // a little later
}

// TestTriggerOrder: of concurrent updates of one record the messages come in the order
// of the commits.
func TestTriggerOrder(t *testing.T) {
	t.Run("saves", func(t *testing.T) { testTriggerOrder(t, func(int) bool { return false }) })
	t.Run("transactions", func(t *testing.T) { testTriggerOrder(t, func(int) bool { return true }) })
	t.Run("both", func(t *testing.T) { testTriggerOrder(t, func(writer int) bool { return writer%2 == 0 }) })
}

func testTriggerOrder(t *testing.T, inTransaction func(writer int) bool) {
	const writers, each = 8, 25
	w := newShop(t)
	addTrigger(t, w, map[string]any{"topic": "totals", "fields": "total", "events": []string{"update"}})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, nil, "totals")
	order := addOrder(t, w, nil)
	var wg sync.WaitGroup
	for writer := range writers {
		wg.Go(func() {
			for range each {
				increase := func(app core.App) error {
					record, err := app.FindRecordById("orders", order.Id)
					if err != nil {
						return err
					}
					record.Set("total+", 1)
					return app.Save(record)
				}
				var err error
				if inTransaction(writer) { // within a transaction it reads what was committed last
					err = w.RunInTransaction(increase)
				} else {
					err = increase(w)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	last := ""
	for i := range writers * each {
		last = client.Next(t).Data
		// where each writer has seen the one before, so does a subscriber
		if want := fired("update", fmt.Sprintf(`{"total":%d}`, i+1)); inTransaction(0) && inTransaction(1) && last != want {
			t.Fatalf("got %s, want %s", last, want)
		}
	}
	stored, err := w.FindRecordById("orders", order.Id)
	if err != nil {
		t.Fatal(err)
	}
	if want := fired("update", fmt.Sprintf(`{"total":%v}`, stored.Get("total"))); last != want {
		t.Errorf("the last message was %s, want %s", last, want)
	}
}

func TestTriggerConditions(t *testing.T) {
	w := newShop(t)
	addTrigger(t, w, map[string]any{"topic": "shipped", "events": []string{"update"}, "changed": "status, owner", "filter": `status = "shipped"`})
	addTrigger(t, w, map[string]any{"name": "mine", "topic": "mine", "events": []string{"create", "delete"}, "filter": `owner = @request.auth.id`})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, nil, "shipped", "mine", "fence")
	nothing := func(what string) {
		t.Helper()
		mustSend(t, w, "fence", what)
		client.Expect(t, "fence", fmt.Sprintf("%q", what))
	}
	order := addOrder(t, w, map[string]any{"status": "open", "owner": w.ann.Id})
	update := func(values map[string]any) {
		t.Helper()
		order.Load(values)
		save(t, w, order)
	}
	update(map[string]any{"status": "paid"})
	update(map[string]any{"status": "shipped"})
	client.Expect(t, "shipped", fired("update", `{"status":"shipped"}`))
	update(map[string]any{"total": 5}) // no field that it looks at
	update(map[string]any{"status": "shipped"})
	update(map[string]any{"owner": w.bob.Id})
	client.Expect(t, "shipped", fired("update", `{"status":"shipped"}`))
	nothing("after the updates")

	// who made the change: nobody, somebody else, a superuser, the owner
	body := map[string]any{"status": "new", "owner": w.ann.Id}
	addOrder(t, w, body)
	for _, who := range []*core.Record{nil, w.bob, w.root, w.ann} {
		body["status"] = "by nobody"
		if who != nil {
			body["status"] = "by " + who.Email()
		}
		if status, answer := server.Do(t, "POST", "/api/collections/orders/records", pbtest.Token(t, who), body); status != http.StatusOK {
			t.Fatalf("%d %v", status, answer)
		}
	}
	client.Expect(t, "mine", fired("create", `{"status":"by ann@x.com"}`))
	own, err := w.FindFirstRecordByData("orders", "status", "by ann@x.com")
	if err != nil {
		t.Fatal(err)
	}
	if status, answer := server.Do(t, "DELETE", "/api/collections/orders/records/"+own.Id, pbtest.Token(t, w.ann), nil); status != http.StatusNoContent {
		t.Fatalf("%d %v", status, answer)
	}
	client.Expect(t, "mine", fired("delete", `{"status":"by ann@x.com"}`))
	nothing("after the changes of others")
}

func TestTriggerTopics(t *testing.T) {
	w := newShop(t)
	shop := addRecord(t, w, "shops", map[string]any{"name": "a/b?c%"})
	addTrigger(t, w, map[string]any{"topic": "order/{id}"})
	addTrigger(t, w, map[string]any{"topic": "shop/{shop.name}/{status}"})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, nil, "shop/a%2Fb%3Fc%25/open")
	order := addOrder(t, w, map[string]any{"status": "open", "shop": shop.Id})
	client.Expect(t, "shop/a%2Fb%3Fc%25/open", fired("create", `{"status":"open"}`))
	addOrder(t, w, map[string]any{"status": "open"}) // without a shop there is no topic
	client.Set(t, nil, "order/"+order.Id, "shop/a%2Fb%3Fc%25/open")
	order.Set("status", "x/y")
	save(t, w, order)
	client.Expect(t, "order/"+order.Id, fired("update", `{"status":"x/y"}`))
	order.Set("status", "open")
	order.Set("shop", "")
	save(t, w, order)
	client.Expect(t, "order/"+order.Id, fired("update", `{"status":"open"}`))
}

// TestTriggerAudience: who gets the message, and nobody else.
func TestTriggerAudience(t *testing.T) {
	w := newShop(t)
	for topic, to := range map[string]string{
		"t/owner": "record:owner", "t/watchers": "record:watchers", "t/all": "",
		"t/users": `{"auth":"user"}`, "t/filter": `{"filter":"email = 'bob@x.com'"}`,
	} {
		addTrigger(t, w, map[string]any{"name": topic, "topic": topic, "to": to})
	}
	server := pbtest.Serve(t, w)
	topics := []string{"t/owner", "t/watchers", "t/all", "t/users", "t/filter", "fence"}
	clients := map[string]*pbtest.Subscriber{
		"ann": server.Subscribe(t, w.ann, topics...), "bob": server.Subscribe(t, w.bob, topics...), "guest": server.Subscribe(t, nil, topics...),
	}
	// a log of it all: the triggers send on a goroutine, in order
	done := addTrigger(t, w, map[string]any{"name": "done", "topic": "fence"})
	_ = done
	got := func(values map[string]any) map[string]string {
		t.Helper()
		addOrder(t, w, values)
		result := map[string]string{}
		for name, client := range clients {
			seen := map[string]bool{}
			for {
				event := client.Next(t)
				if event.Type == "fence" {
					break
				}
				seen[strings.TrimPrefix(event.Type, "t/")] = true
			}
			for _, topic := range []string{"all", "filter", "owner", "users", "watchers"} {
				if seen[topic] {
					result[name] += topic + " "
				}
			}
		}
		return result
	}
	for _, test := range []struct {
		values map[string]any
		want   string
	}{
		{map[string]any{}, "map[ann:all users  bob:all filter users  guest:all ]"},
		{map[string]any{"owner": w.ann.Id}, "map[ann:all owner users  bob:all filter users  guest:all ]"},
		{map[string]any{"watchers": []string{w.ann.Id, w.bob.Id}}, "map[ann:all users watchers  bob:all filter users watchers  guest:all ]"},
	} {
		if got := fmt.Sprint(got(test.values)); got != test.want {
			t.Errorf("%v: got %s, want %s", test.values, got, test.want)
		}
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
		{"to", `{"user":["users:x"]}`, "must be record:FIELD or an audience"},
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

// TestTriggerCascade: what a cascade deletes fires, after the commit.
func TestTriggerCascade(t *testing.T) {
	w := newShop(t)
	addTrigger(t, w, map[string]any{"topic": "changes", "events": []string{"delete"}, "filter": `status != "49"`})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, nil, "changes")
	for i := range 50 {
		addOrder(t, w, map[string]any{"status": fmt.Sprint(i), "owner": w.ann.Id})
	}
	if err := w.Delete(w.ann); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for range 49 {
		seen[client.Next(t).Data] = true
	}
	if len(seen) != 49 {
		t.Errorf("%d different messages", len(seen))
	}
}

// TestTriggerCascadeRelations: a delete's filter, topic and fields see the record and those
// that it leads to as they were, also where these go together.
func TestTriggerCascadeRelations(t *testing.T) {
	w := newShop(t)
	orders := mustFind(t, w, "orders")
	orders.Fields.Add(&core.TextField{Name: "code"})
	if err := w.Save(orders); err != nil {
		t.Fatal(err)
	}
	items := addCollection(t, w, "items", &core.TextField{Name: "name"},
		&core.RelationField{Name: "order", CollectionId: orders.Id, CascadeDelete: true})
	addCollection(t, w, "notes", &core.TextField{Name: "text"},
		&core.RelationField{Name: "items", CollectionId: items.Id, CascadeDelete: true, MaxSelect: 9})
	addTrigger(t, w, map[string]any{"name": "items", "collection": "items", "events": []string{"delete"}, "topic": "code/{order.code}",
		"filter": `order.code = "c1" && order.owner.name = "Ann"`, "fields": "name,expand.order.code"})
	addTrigger(t, w, map[string]any{"name": "notes", "collection": "notes", "events": []string{"delete"}, "topic": "urgent",
		"filter": `items.order.code ?= "c1"`, "fields": "text,expand.items.expand.order.code"})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, nil, "code/c1", "urgent")
	fill := func() (order *core.Record) {
		t.Helper()
		for _, code := range []string{"c2", "c1"} {
			order = addOrder(t, w, map[string]any{"code": code, "owner": w.ann.Id})
			item := addRecord(t, w, "items", map[string]any{"name": "bolt", "order": order.Id})
			addRecord(t, w, "notes", map[string]any{"text": "urgent", "items": []string{item.Id}})
		}
		return order
	}
	expect := func() {
		t.Helper()
		want := map[string]string{
			"code/c1": `{"action":"delete","collection":"items","record":{"expand":{"order":{"code":"c1"}},"name":"bolt"}}`,
			"urgent":  `{"action":"delete","collection":"notes","record":{"expand":{"items":[{"expand":{"order":{"code":"c1"}}}]},"text":"urgent"}}`,
		}
		for range 2 {
			event := client.Next(t)
			if event.Data != want[event.Type] {
				t.Errorf("%s got %s", event.Type, event.Data)
			}
			delete(want, event.Type)
		}
	}
	order := fill()
	if err := w.Delete(order); err != nil {
		t.Fatal(err)
	}
	expect()
	order = fill()
	if status, answer := server.Do(t, "DELETE", "/api/collections/orders/records/"+order.Id, "", nil); status != http.StatusNoContent {
		t.Fatal(status, answer)
	}
	expect()
	order = fill()
	rollback := errors.New("rolled back")
	if err := w.RunInTransaction(func(tx core.App) error {
		if err := tx.Delete(order); err != nil {
			return err
		}
		return rollback
	}); err != rollback {
		t.Fatal(err)
	}
	if err := w.RunInTransaction(func(tx core.App) error { return tx.Delete(order) }); err != nil {
		t.Fatal(err)
	}
	expect() // once
	fill()
	if err := w.Delete(w.ann); err != nil { // over three steps
		t.Fatal(err)
	}
	expect()
}

// TestTriggerCascadeStale: what was asked before a cascade is for that cascade, and for the
// record as it was.
func TestTriggerCascadeStale(t *testing.T) {
	w := newShop(t)
	shops, users := mustFind(t, w, "shops"), mustFind(t, w, "users")
	addCollection(t, w, "lines", &core.TextField{Name: "status"}, &core.RelationField{Name: "to", CollectionId: users.Id},
		&core.RelationField{Name: "shops", CollectionId: shops.Id, CascadeDelete: true, MaxSelect: 9})
	addTrigger(t, w, map[string]any{"name": "orders", "topic": "status/{status}", "events": []string{"delete"}})
	addTrigger(t, w, map[string]any{"name": "lines", "collection": "lines", "topic": "gone", "events": []string{"delete"}, "to": "record:to"})
	server := pbtest.Serve(t, w)
	ann, bob := server.Subscribe(t, w.ann, "gone", "status/a", "fence"), server.Subscribe(t, w.bob, "gone", "status/b")

	// it only loses one of its relations first, and is changed before it goes
	a, b := addRecord(t, w, "shops", map[string]any{"name": "a"}), addRecord(t, w, "shops", map[string]any{"name": "b"})
	line := addRecord(t, w, "lines", map[string]any{"status": "for Ann", "to": w.ann.Id, "shops": []string{a.Id, b.Id}})
	if err := w.RunInTransaction(func(tx core.App) error {
		if err := tx.Delete(a); err != nil {
			return err
		}
		line, err := tx.FindRecordById("lines", line.Id)
		if err != nil {
			return err
		}
		line.Load(map[string]any{"to": w.bob.Id, "status": "for Bob"})
		if err := tx.Save(line); err != nil {
			return err
		}
		return tx.Delete(b)
	}); err != nil {
		t.Fatal(err)
	}
	bob.Expect(t, "gone", `{"action":"delete","collection":"lines","record":{"status":"for Bob"}}`)

	// a transaction that panics tells of no end
	order := addOrder(t, w, map[string]any{"status": "a", "owner": w.ann.Id})
	panics := true
	w.OnRecordDelete("orders").BindFunc(func(e *core.RecordEvent) error {
		if panics {
			panic("test")
		}
		return e.Next()
	})
	func() {
		defer func() { _ = recover() }()
		_ = w.Delete(w.ann)
	}()
	panics = false
	order, err := w.FindRecordById("orders", order.Id)
	if err != nil {
		t.Fatal(err)
	}
	order.Set("status", "b")
	save(t, w, order)
	mustSend(t, w, "fence", 1)
	if err := w.Delete(order); err != nil {
		t.Fatal(err)
	}
	bob.Expect(t, "status/b", fired("delete", `{"status":"b"}`))
	ann.Expect(t, "fence", "1") // and nothing else came before it
}

// TestTriggerCascadeAuthor: a cascade has the author of the request, whatever else is
// watched.
func TestTriggerCascadeAuthor(t *testing.T) {
	w := newShop(t)
	shops := mustFind(t, w, "shops")
	shops.DeleteRule = new(string)
	if err := w.Save(shops); err != nil {
		t.Fatal(err)
	}
	addCollection(t, w, "lines", &core.TextField{Name: "status"}, &core.RelationField{Name: "shop", CollectionId: shops.Id, CascadeDelete: true})
	addTrigger(t, w, map[string]any{"collection": "lines", "topic": "gone", "events": []string{"delete"}, "filter": `@request.auth.name = "Ann"`})
	server := pbtest.Serve(t, w)
	client := server.Subscribe(t, nil, "gone")
	for _, who := range []*core.Record{w.bob, w.ann} {
		shop := addRecord(t, w, "shops", map[string]any{"name": "x"})
		addRecord(t, w, "lines", map[string]any{"status": who.GetString("name"), "shop": shop.Id})
		if status, answer := server.Do(t, "DELETE", "/api/collections/shops/records/"+shop.Id, pbtest.Token(t, who), nil); status != http.StatusNoContent {
			t.Fatal(status, answer)
		}
	}
	client.Expect(t, "gone", `{"action":"delete","collection":"lines","record":{"status":"Ann"}}`)
}

// TestTriggerBesideRecordEvents: for the same change, PocketBase tells who may see the
// record, a trigger whom it names.
func TestTriggerBesideRecordEvents(t *testing.T) {
	w := newShop(t)
	orders := mustFind(t, w, "orders")
	rule := `owner = @request.auth.id`
	orders.ListRule, orders.ViewRule = &rule, &rule
	if err := w.Save(orders); err != nil {
		t.Fatal(err)
	}
	addTrigger(t, w, map[string]any{"topic": "order-changed", "to": "record:owner"})
	server := pbtest.Serve(t, w)
	ann := server.Subscribe(t, w.ann, "orders/*", "order-changed", "fence")
	bob := server.Subscribe(t, w.bob, "orders/*", "order-changed", "fence")
	addOrder(t, w, map[string]any{"status": "x", "owner": w.ann.Id})
	got := map[string]bool{ann.Next(t).Type: true, ann.Next(t).Type: true}
	if !got["orders/*"] || !got["order-changed"] {
		t.Errorf("Ann got %v", got)
	}
	mustSend(t, w, "fence", 1)
	bob.Expect(t, "fence", "1")
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
