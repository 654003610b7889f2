package hooks_test

import (
	"errors"
	"fmt"
	"net/http"
	"testing"

	"github.com/pocketbase/pocketbase/core"

	"herald/internal/pbtest"
)

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
