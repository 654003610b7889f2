// A trigger, checked and compiled from the record that describes it. triggers.go creates one when a
// record is saved or loaded.

package triggers

import (
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/pocketbase/dbx"
	validation "github.com/pocketbase/ozzo-validation/v4"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/picker"
	"github.com/pocketbase/pocketbase/tools/search"

	"herald/hooks/internal/api"
	"herald/notify"
	"herald/pb_migrations"
)

// trigger sends a message for changes of a collection's records. It never changes after creation.
type trigger struct {
	name       string
	collection string // id
	events     []string
	changed    []string // fields; empty means any
	filter     string
	topic      template
	fields     string
	expands    []string
	to         notify.Audience
	toField    string // the relation field with the users; if empty, to applies
}

// template is a topic with {placeholders}.
type template []templatePart

type templatePart struct {
	text     string
	field    string // a placeholder instead of text
	relation string // the single relation that leads to the record with field; empty if the record itself has field
}

// newTrigger compiles record. The errors are by field, or nil if there are none.
func newTrigger(app core.App, notifier *notify.Notifier, record *core.Record) (*trigger, validation.Errors) {
	errs := validation.Errors{}
	fail := func(field, code, format string, args ...any) {
		if errs[field] == nil {
			errs[field] = validation.NewError(code, fmt.Sprintf(format, args...))
		}
	}
	t := &trigger{
		name:   record.GetString("name"),
		events: record.GetStringSlice("events"),
		filter: strings.TrimSpace(record.GetString("filter")),
		fields: strings.TrimSpace(record.GetString("fields")),
	}
	collection, err := app.FindCollectionByNameOrId(record.GetString("collection"))
	switch {
	case err != nil:
		fail("collection", "validation_missing_collection", "there is no collection %q", record.GetString("collection"))
		return nil, errs
	case collection.IsView():
		fail("collection", "validation_view_collection", "%q is a view, and no event reports changes of a view", collection.Name)
		return nil, errs
	case collection.Id == pb_migrations.TriggersCollectionID:
		fail("collection", "validation_invalid_collection", "a trigger cannot watch the triggers")
		return nil, errs
	}
	t.collection = collection.Id

	for _, name := range splitList(record.GetString("changed")) {
		if collection.Fields.GetByName(name) == nil {
			fail("changed", "validation_missing_field", "%q has no field %q", collection.Name, name)
		}
		t.changed = append(t.changed, name)
	}
	if t.filter != "" {
		resolver := core.NewRecordFieldResolver(app, collection, nil, true)
		if _, err := search.FilterData(t.filter).BuildExpr(resolver); err != nil {
			fail("filter", "validation_invalid_filter", "does not compile: %s", err)
		}
	}
	if t.topic, err = parseTemplate(app, collection, record.GetString("topic")); err != nil {
		fail("topic", "validation_invalid_topic", "%s", err)
	} else if err := notifier.CheckTopic(t.topic.example(collection)); err != nil {
		fail("topic", err.Code(), "%s (here with examples in place of the placeholders)", err.Detail)
	}
	if t.expands, err = expandsOf(app, collection, t.fields); err != nil {
		fail("fields", "validation_invalid_fields", "%s", err)
	} else if _, err := picker.Pick(map[string]any{}, t.fields); err != nil {
		fail("fields", "validation_invalid_fields", "%s", err)
	}
	t.compileAudience(app, notifier, collection, strings.TrimSpace(record.GetString("to")), fail)
	if len(errs) > 0 {
		return nil, errs
	}
	return t, nil
}

// compileAudience parses the field "to".
func (t *trigger) compileAudience(app core.App, notifier *notify.Notifier, collection *core.Collection, to string, fail func(field, code, format string, args ...any)) {
	const code = "validation_invalid_audience"
	if to == "" {
		return
	}
	if name, ok := strings.CutPrefix(to, "record:"); ok {
		t.toField = name
		relation, ok := collection.Fields.GetByName(name).(*core.RelationField)
		if !ok {
			fail("to", code, "%q has no relation field %q", collection.Name, name)
			return
		}
		if target, err := app.FindCachedCollectionByNameOrId(relation.CollectionId); err != nil || !target.IsAuth() {
			fail("to", code, "the field %q does not lead to an auth collection", name)
		}
		return
	}
	if err := api.Decode("", []byte(to), &t.to); err != nil {
		detail := `must be record:FIELD or an audience as JSON, such as {"auth": "user"}`
		if field := api.InvalidField(err); field != "" {
			detail += fmt.Sprintf("; %q is unknown or has another type", field)
		}
		fail("to", code, "%s", detail)
		return
	}
	if api.CheckNarrows([]byte(`{"to":`+to+`}`), "to") != nil {
		fail("to", code, `is empty or has an empty part: leave it out to narrow nothing; [] matches nobody`)
		return
	}
	if err := notifier.CheckAudience(t.to); err != nil {
		fail("to", code, "%s", err)
	}
}

func splitList(text string) (items []string) {
	for item := range strings.SplitSeq(text, ",") {
		if item = strings.TrimSpace(item); item != "" {
			items = append(items, item)
		}
	}
	return items
}

// parseTemplate parses a topic with placeholders: {field}, or {relation.field} for a relation to
// one record.
func parseTemplate(app core.App, collection *core.Collection, text string) (template, error) {
	var parts template
	for text != "" {
		before, rest, found := strings.Cut(text, "{")
		if strings.Contains(before, "}") {
			return nil, fmt.Errorf("%q without %q before it", "}", "{")
		}
		if before != "" {
			parts = append(parts, templatePart{text: before})
		}
		if !found {
			break
		}
		path, after, closed := strings.Cut(rest, "}")
		if !closed {
			return nil, fmt.Errorf("%q without %q after it", "{", "}")
		}
		part := templatePart{field: path}
		of := collection
		if relation, field, isPath := strings.Cut(path, "."); isPath {
			part = templatePart{relation: relation, field: field}
			var err error
			if of, err = singleRelation(app, collection, relation); err != nil {
				return nil, err
			}
		}
		switch field := of.Fields.GetByName(part.field); {
		case field == nil:
			return nil, fmt.Errorf("{%s}: %q has no field %q", path, of.Name, part.field)
		case field.GetHidden():
			return nil, fmt.Errorf("{%s}: the field is hidden", path)
		case field.GetName() == core.FieldNameEmail && of.IsAuth():
			return nil, fmt.Errorf("{%s}: an email address must not be part of a topic", path)
		}
		parts = append(parts, part)
		text = after
	}
	return parts, nil
}

func singleRelation(app core.App, collection *core.Collection, name string) (*core.Collection, error) {
	relation, ok := collection.Fields.GetByName(name).(*core.RelationField)
	if !ok {
		return nil, fmt.Errorf("%q has no relation field %q", collection.Name, name)
	}
	if relation.IsMultiple() {
		return nil, fmt.Errorf("the relation %q leads to more than one record", name)
	}
	return app.FindCachedCollectionByNameOrId(relation.CollectionId)
}

// example returns a topic that the template may produce.
func (t template) example(collection *core.Collection) string {
	var topic strings.Builder
	for _, part := range t {
		switch part.field {
		case "":
			topic.WriteString(part.text)
		case core.FieldNameId:
			topic.WriteString("abcdefghijklmno") // an id as PocketBase generates it
		default:
			topic.WriteString("x")
		}
	}
	return topic.String()
}

// hasRelations reports whether producing a topic takes a query.
func (t template) hasRelations() bool {
	return slices.ContainsFunc(t, func(part templatePart) bool { return part.relation != "" })
}

// prefix returns the common beginning of all topics of the template.
func (t template) prefix() string {
	if len(t) > 0 && t[0].field == "" {
		return t[0].text
	}
	return ""
}

// inTopic escapes a value for use in a topic.
var inTopic = strings.NewReplacer("%", "%25", "/", "%2F", "?", "%3F")

// of returns the topic for record, or "" if a placeholder has no value. It escapes "/" in a value,
// so that the author of the record cannot choose another topic.
func (t template) of(app core.App, record *core.Record) (string, error) {
	var topic strings.Builder
	for _, part := range t {
		if part.field == "" {
			topic.WriteString(part.text)
			continue
		}
		from := record
		if part.relation != "" {
			id := record.GetString(part.relation)
			relation, ok := record.Collection().Fields.GetByName(part.relation).(*core.RelationField)
			if id == "" || !ok {
				return "", nil
			}
			var err error
			if from, err = app.FindRecordById(relation.CollectionId, id); err != nil {
				return "", fmt.Errorf("the record that %q leads to: %w", part.relation, err)
			}
		}
		value := from.GetString(part.field)
		if value == "" {
			return "", nil
		}
		topic.WriteString(inTopic.Replace(value))
	}
	return topic.String(), nil
}

// modifiers matches the modifiers of fields, such as ":excerpt(200,true)".
var modifiers = regexp.MustCompile(`:\w+\([^)]*\)`)

// expandsOf returns the relations that fields asks for: "id,expand.owner.name" yields "owner".
func expandsOf(app core.App, collection *core.Collection, fields string) ([]string, error) {
	expands := map[string]bool{}
	for _, path := range splitList(modifiers.ReplaceAllString(fields, "")) {
		of := collection
		var chain []string
		parts := strings.Split(path, ".")
		for len(parts) > 1 && parts[0] == "expand" {
			relation, ok := of.Fields.GetByName(parts[1]).(*core.RelationField)
			if !ok {
				return nil, fmt.Errorf("%q has no relation field %q", of.Name, parts[1])
			}
			chain = append(chain, parts[1])
			var err error
			if of, err = app.FindCachedCollectionByNameOrId(relation.CollectionId); err != nil {
				return nil, err
			}
			parts = parts[2:]
		}
		if len(chain) > 0 {
			expands[strings.Join(chain, ".")] = true
		}
		if len(parts) > 0 && parts[0] != "*" && parts[0] != "collectionId" && parts[0] != "collectionName" && of.Fields.GetByName(parts[0]) == nil {
			return nil, fmt.Errorf("%q has no field %q", of.Name, parts[0])
		}
	}
	return slices.Sorted(maps.Keys(expands)), nil
}

// hasChanged reports whether a field that the trigger watches has changed.
func (t *trigger) hasChanged(before, after *core.Record) bool {
	return len(t.changed) == 0 || slices.ContainsFunc(t.changed, func(name string) bool {
		return !reflect.DeepEqual(before.GetRaw(name), after.GetRaw(name))
	})
}

// passes evaluates the filter for a record as it is in the database now; auth made the change.
func (t *trigger) passes(app core.App, record, auth *core.Record) (bool, error) {
	if t.filter == "" {
		return true, nil
	}
	info := &core.RequestInfo{Context: core.RequestInfoContextDefault, Query: map[string]string{}, Headers: map[string]string{}, Body: map[string]any{}, Auth: auth}
	resolver := core.NewRecordFieldResolver(app, record.Collection(), info, true)
	expr, err := search.FilterData(t.filter).BuildExpr(resolver)
	if err != nil {
		return false, err
	}
	query := app.RecordQuery(record.Collection()).Select("(1)").
		AndWhere(dbx.HashExp{record.Collection().Name + ".id": record.Id}).AndWhere(expr).Limit(1)
	if err := resolver.UpdateQuery(query); err != nil {
		return false, err
	}
	var found []int
	err = query.Column(&found)
	return len(found) > 0, err
}

// payload is the data that subscribers get.
type payload struct {
	Action     string `json:"action"`
	Collection string `json:"collection"`
	Record     any    `json:"record"`
}

// payloadOf returns the payload for record. It never contains hidden fields, nor email addresses
// whose owners do not show them, no matter which fields are requested.
func (t *trigger) payloadOf(app core.App, action string, record *core.Record) (*payload, error) {
	record = record.Fresh() // relations expanded for one trigger must not reach the next one
	if len(t.expands) > 0 {
		for path, err := range app.ExpandRecord(record, t.expands, nil) {
			app.Logger().Debug("A trigger cannot expand", "trigger", t.name, "path", path, "error", err.Error())
		}
	}
	var picked any = record.PublicExport()
	if t.fields != "" {
		var err error
		if picked, err = picker.Pick(picked, t.fields); err != nil {
			return nil, err
		}
	}
	return &payload{action, record.Collection().Name, picked}, nil
}
