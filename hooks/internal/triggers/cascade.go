// Triggers for records that a cascade deletes. PocketBase deletes a record first and then the
// records that refer to it, so their filters, topics and fields could no longer look at the first
// one. So they are evaluated in advance, called by triggers.go.

package triggers

import (
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"

	"herald/hooks/internal/records"
)

// recordRef identifies a record, wherever it was loaded.
type recordRef struct{ collectionID, id string }

func refOf(record *core.Record) recordRef { return recordRef{record.Collection().Id, record.Id} }

// cascadesTo returns the ids of the collections from which a delete may cascade to a record whose
// deletion a trigger reports.
func cascadesTo(app core.App, byID map[string][]*trigger) map[string]bool {
	cascades := map[string]bool{}
	var add func(collection *core.Collection)
	add = func(collection *core.Collection) {
		for _, field := range collection.Fields {
			relation, ok := field.(*core.RelationField)
			if !ok || !relation.CascadeDelete || cascades[relation.CollectionId] {
				continue
			}
			if target, err := app.FindCachedCollectionByNameOrId(relation.CollectionId); err == nil {
				cascades[target.Id] = true
				add(target)
			}
		}
	}
	for id, triggers := range byID {
		if slices.ContainsFunc(triggers, func(trigger *trigger) bool { return slices.Contains(trigger.events, "delete") }) {
			if collection, err := app.FindCachedCollectionByNameOrId(id); err == nil {
				add(collection)
			}
		}
	}
	return cascades
}

// foresights holds what was evaluated before the first delete of a cascade.
type foresights map[recordRef]*foresight

// foresight is a record as it was, and the firings for its delete.
type foresight struct {
	record  *core.Record
	firings []*firing
}

// foresee records the firings for the delete of e's record and of the records that refer to it.
// They are kept until the transaction is over, whose last part is the cascade.
func (t *Triggers) foresee(e *core.RecordEvent) {
	if !e.App.IsTransactional() {
		return // there is no cascade: PocketBase would start a transaction for it
	}
	isNoted := false
	t.withForesights(e.App, func(noted foresights) { isNoted = noted[refOf(e.Record)] != nil })
	if !isNoted { // otherwise the delete that includes this one has recorded it
		t.foreseeDelete(e.App, records.Stored(e.App, e.Record), t.authorOf(e.Record))
	}
}

func (t *Triggers) withForesights(app core.App, use func(noted foresights)) {
	t.foreseen.With(app.TxInfo(), func(foresights, bool) {}, func(noted *foresights) {
		if *noted == nil {
			*noted = foresights{}
		}
		use(*noted)
	})
}

func (t *Triggers) foreseeDelete(app core.App, record, auth *core.Record) {
	ref, noted := refOf(record), &foresight{record: record}
	isNoted := false
	t.withForesights(app, func(all foresights) {
		if isNoted = all[ref] != nil; !isNoted {
			all[ref] = noted
		}
	})
	if isNoted {
		return
	}
	if candidates := t.candidates(record, "delete"); len(candidates) > 0 {
		noted.firings = t.composed(app, record, candidates, auth)
	}
	known := t.known.Load()
	if !known.cascades[ref.collectionID] {
		return
	}
	references, err := app.FindCachedCollectionReferences(record.Collection())
	if err != nil {
		app.Logger().Error("A trigger cannot find the records that a cascade deletes", "error", err.Error())
		return
	}
	for collection, fields := range references {
		if collection.IsView() || !known.cascades[collection.Id] && len(known.byID[collection.Id]) == 0 {
			continue
		}
		for _, field := range fields {
			relation, ok := field.(*core.RelationField)
			if !ok || !relation.CascadeDelete {
				continue
			}
			others := []*core.Record{}
			if err := app.RecordQuery(collection).AndWhere(leadsTo(collection, relation, record.Id)).All(&others); err != nil {
				app.Logger().Error("A trigger cannot find the records that a cascade deletes", "error", err.Error())
				continue
			}
			for _, other := range others {
				t.foreseeDelete(app, other, auth)
			}
		}
	}
}

// leadsTo is the condition for the records whose relation contains id.
func leadsTo(collection *core.Collection, relation *core.RelationField, id string) dbx.Expression {
	column := fmt.Sprintf("[[%s.%s]]", collection.Name, relation.Name)
	if !relation.IsMultiple() {
		return dbx.NewExp(column+" = {:heraldID}", dbx.Params{"heraldID": id})
	}
	return dbx.NewExp(fmt.Sprintf(
		"EXISTS (SELECT 1 FROM json_each(CASE WHEN json_valid(%[1]s) THEN %[1]s ELSE '[]' END) WHERE value = {:heraldID})", column),
		dbx.Params{"heraldID": id})
}

// composed returns the firings for the delete of record, with their messages.
func (t *Triggers) composed(app core.App, record *core.Record, candidates []*trigger, auth *core.Record) []*firing {
	firings := t.firings(app, "delete", record, candidates, auth)
	for _, f := range firings {
		t.compose(app, f)
	}
	return slices.DeleteFunc(firings, func(f *firing) bool { return f.message.Topic == "" })
}

// firingsOfDelete returns the firings for the delete of a record that still exists.
func (t *Triggers) firingsOfDelete(e *core.RecordEvent, candidates []*trigger, auth *core.Record) []*firing {
	record := records.Stored(e.App, e.Record)
	var noted *foresight
	t.withForesights(e.App, func(all foresights) {
		noted = all[refOf(record)]
		delete(all, refOf(record))
	})
	if noted == nil || !isAsForeseen(noted.record, record) {
		return t.composed(e.App, record, candidates, auth)
	}
	for _, f := range noted.firings {
		f.since = time.Now()
	}
	return noted.firings
}

// isAsForeseen reports whether record is unchanged since, except for what a cascade removes from
// its relations before it deletes it.
func isAsForeseen(before, record *core.Record) bool {
	for _, field := range record.Collection().Fields {
		name := field.GetName()
		if relation, ok := field.(*core.RelationField); ok && relation.CascadeDelete && relation.IsMultiple() {
			had := before.GetStringSlice(name)
			if slices.ContainsFunc(record.GetStringSlice(name), func(id string) bool { return !slices.Contains(had, id) }) {
				return false
			}
			continue
		}
		if _, isUpdated := field.(*core.AutodateField); !isUpdated && !reflect.DeepEqual(before.GetRaw(name), record.GetRaw(name)) {
			return false
		}
	}
	return true
}
