// What triggers need of records that a cascade deletes. PocketBase deletes a record first
// and then those that lead to it: the filter, the topic and the fields of a trigger could
// not look at the first one any more. So they are asked before, called by triggers.go.

package hooks

import (
	"fmt"
	"slices"
	"time"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"
)

// recordRef is a record, wherever it was loaded.
type recordRef struct{ collectionID, id string }

func refOf(record *core.Record) recordRef { return recordRef{record.Collection().Id, record.Id} }

// cascadesTo returns the ids of the collections from which a delete may get to a record of
// which a trigger tells that it is deleted.
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

// foresee notes what fires when record is deleted, and with it those that lead to it, until
// the transaction is over, of which the cascade is the last part.
func (t *triggers) foresee(app core.App, record, auth *core.Record) {
	if !app.IsTransactional() {
		return // there is no cascade: PocketBase makes a transaction for it
	}
	noted := t.foreseeDelete(nil, app, record, auth)
	app.TxInfo().OnComplete(func(error) error {
		for _, ref := range noted {
			t.foreseen.Delete(ref)
		}
		return nil
	})
}

func (t *triggers) foreseeDelete(noted []recordRef, app core.App, record, auth *core.Record) []recordRef {
	ref := refOf(record)
	if _, isNoted := t.foreseen.LoadOrStore(ref, []*firing(nil)); isNoted {
		return noted // by the delete of which this one is a part
	}
	noted = append(noted, ref)
	if candidates := t.candidates(record, "delete"); len(candidates) > 0 {
		t.foreseen.Store(ref, t.composed(app, record, candidates, auth))
	}
	known := t.known.Load()
	if !known.cascades[ref.collectionID] {
		return noted
	}
	references, err := app.FindCachedCollectionReferences(record.Collection())
	if err != nil {
		app.Logger().Error("A trigger cannot find what a delete takes along", "error", err.Error())
		return noted
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
				app.Logger().Error("A trigger cannot find what a delete takes along", "error", err.Error())
				continue
			}
			for _, other := range others {
				noted = t.foreseeDelete(noted, app, other, auth)
			}
		}
	}
	return noted
}

// leadsTo is the condition for the records of which a relation has id.
func leadsTo(collection *core.Collection, relation *core.RelationField, id string) dbx.Expression {
	column := fmt.Sprintf("[[%s.%s]]", collection.Name, relation.Name)
	if !relation.IsMultiple() {
		return dbx.NewExp(column+" = {:heraldID}", dbx.Params{"heraldID": id})
	}
	return dbx.NewExp(fmt.Sprintf(
		"EXISTS (SELECT 1 FROM json_each(CASE WHEN json_valid(%[1]s) THEN %[1]s ELSE '[]' END) WHERE value = {:heraldID})", column),
		dbx.Params{"heraldID": id})
}

// composed returns what fires for the delete of record, with the messages.
func (t *triggers) composed(app core.App, record *core.Record, candidates []*trigger, auth *core.Record) []*firing {
	firings := t.firings(app, "delete", record, candidates, auth)
	for _, f := range firings {
		t.compose(app, f)
	}
	return slices.DeleteFunc(firings, func(f *firing) bool { return f.message.Topic == "" })
}

// firingsOfDelete returns what fires for the delete of a record that is there still.
func (t *triggers) firingsOfDelete(e *core.RecordEvent, candidates []*trigger, auth *core.Record) []*firing {
	if noted, ok := t.foreseen.LoadAndDelete(refOf(e.Record)); ok {
		firings := noted.([]*firing)
		for _, f := range firings {
			f.since = time.Now()
		}
		return firings
	}
	return t.composed(e.App, stored(e), candidates, auth)
}
