package hooks_test

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
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
