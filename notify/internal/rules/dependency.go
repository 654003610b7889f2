package rules

import (
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/ganigeorgiev/fexpr"
	"github.com/pocketbase/pocketbase/core"

	"herald/notify/internal/sets"
)

// Dependency is how the result of a rule depends on the records of one collection.
type Dependency struct {
	// Fields are the fields that the rule looks at.
	Fields sets.Of[string]
	// Uses are the roles in which a record appears in the rule, as a joined row. A zero use
	// concerns every subscriber of the channel's topics.
	Uses []use
}

// use is what a rule requires of a record in each place where it looks at one, so that no other
// record matters. For `@collection.members.user ?= @request.auth.id && @collection.members.room ?=
// @request.query.room`, only records with the user's id in "user" and the room's in "room" matter.
type use struct {
	user      string            // a field with ids of users, or empty
	wildcards map[string]string // wildcard name to the field that must have its value
}

// AnyField, as a field name, stands for all fields.
const AnyField = "*"

// fieldBehind returns the field of a collection that name in a path stands for. A change of any
// field may affect a back-relation such as "members_via_user".
func fieldBehind(name string) string {
	if strings.Contains(name, "_via_") {
		return AnyField
	}
	return name
}

// dependency returns how the rule depends on collection.
func (r *Rule) dependency(app core.App, collection *core.Collection) *Dependency {
	d := r.Collections[collection.Id]
	if d == nil {
		d = &Dependency{Fields: sets.Of[string]{}}
		r.Collections[collection.Id] = d
		if collection.IsView() {
			r.noteView(app, collection)
		}
	}
	return d
}

// words finds possible table names in SQL.
var words = regexp.MustCompile(`\w+`)

// noteView records the collections that a view takes its records from, because no event reports
// changes of a view's records.
func (r *Rule) noteView(app core.App, view *core.Collection) {
	for _, word := range words.FindAllString(view.ViewQuery, -1) {
		collection, err := app.FindCachedCollectionByNameOrId(word)
		if err != nil || collection.Id == view.Id {
			continue
		}
		d := r.dependency(app, collection)
		d.Fields[AnyField] = struct{}{}
		d.Uses = append(d.Uses, use{})
	}
}

// notePath records the collections behind the relations of path, which begins with a field of
// collection.
func (r *Rule) notePath(app core.App, collection *core.Collection, path []string) {
	for i, name := range path[:len(path)-1] {
		if from, via, isBack := strings.Cut(name, "_via_"); isBack {
			next, err := app.FindCachedCollectionByNameOrId(from)
			if err != nil {
				return
			}
			d := r.dependency(app, next)
			d.Fields[via] = struct{}{}
			collection = next
		} else {
			relation, ok := collection.Fields.GetByName(name).(*core.RelationField)
			if !ok {
				return // a path into JSON
			}
			next, err := app.FindCachedCollectionByNameOrId(relation.CollectionId)
			if err != nil {
				return
			}
			collection = next
		}
		d := r.dependency(app, collection)
		d.Fields[fieldBehind(path[i+1])] = struct{}{}
		d.Uses = append(d.Uses, use{}) // through other records: the affected clients are unknown
	}
}

// noteAuthPath records the collections behind the relations of path, which begins with a field of
// the auth record, in any auth collection.
func (r *Rule) noteAuthPath(app core.App, path []string) {
	if len(path) < 2 {
		return
	}
	collections, err := app.FindAllCollections(core.CollectionTypeAuth)
	if err != nil {
		return
	}
	for _, collection := range collections {
		r.notePath(app, collection, path)
	}
}

// noteUses records the roles of joined records (@collection.…) in the parsed rule.
func (r *Rule) noteUses(app core.App, groups []fexpr.ExprGroup) {
	uses := map[string]*use{} // by the name of the join, "members" or "members:alias"
	findUses(app, groups, nil, uses)
	named := map[string]int{}
	for join := range uses {
		_, alias, _ := strings.Cut(join, ":")
		named[alias]++
	}
	for join, u := range uses {
		name, alias, _ := strings.Cut(join, ":")
		collection, err := app.FindCachedCollectionByNameOrId(name)
		if err != nil {
			continue
		}
		d := r.dependency(app, collection)
		d.Uses = append(d.Uses, *u)
		if alias != "" && named[alias] > 1 {
			// PocketBase takes all fields of both from one of them
			d.Fields[AnyField] = struct{}{}
			d.Uses = append(d.Uses, use{})
		}
	}
}

// findUses adds to uses what groups require of each join. given holds the conditions that all
// groups are ANDed with.
//
// Conditions with "?=" on one join apply to one row of it, so a row that fails one of them does not
// matter. "=" and all others without "?" apply to all rows (PocketBase's multi-match): they restrict
// nothing, and every row matters to them, whatever is required beside them.
func findUses(app core.App, groups []fexpr.ExprGroup, given []binding, uses map[string]*use) {
	for start := 0; start < len(groups); {
		end := start + 1
		for end < len(groups) && groups[end].Join != fexpr.JoinOr { // AND binds more tightly
			end++
		}
		all := groups[start:end]
		start = end

		bindings := slices.Clone(given)
		for _, group := range all {
			if expr, ok := group.Item.(fexpr.Expr); ok && expr.Op == fexpr.SignAnyEq {
				bindings = appendBinding(app, bindings, expr.Left, expr.Right)
				bindings = appendBinding(app, bindings, expr.Right, expr.Left)
			}
		}
		for _, group := range all {
			switch item := group.Item.(type) {
			case fexpr.Expr:
				restrictions := bindings
				if !isAnyMatch(item.Op) {
					restrictions = nil
				}
				for _, join := range append(joinsIn(item.Left), joinsIn(item.Right)...) {
					narrow(uses, join, restrictions)
				}
			case fexpr.ExprGroup:
				findUses(app, []fexpr.ExprGroup{item}, bindings, uses)
			case []fexpr.ExprGroup:
				findUses(app, item, bindings, uses)
			}
		}
	}
}

// isAnyMatch reports whether one row that passes is enough.
func isAnyMatch(op fexpr.SignOp) bool { return strings.HasPrefix(string(op), "?") }

// binding is a condition: a field of a join equals the id of the user or the value of a wildcard.
type binding struct {
	join, field string
	wildcard    string // empty for the user
}

func appendBinding(app core.App, bindings []binding, of, to fexpr.Token) []binding {
	parts := strings.Split(of.Literal, ".")
	if of.Type != fexpr.TokenIdentifier || to.Type != fexpr.TokenIdentifier || len(parts) != 3 || parts[0] != "@collection" {
		return bindings
	}
	name, _, _ := strings.Cut(parts[1], ":")
	collection, err := app.FindCachedCollectionByNameOrId(name)
	if err != nil || !hasTexts(collection.Fields.GetByName(parts[2])) {
		return bindings
	}
	b := binding{join: parts[1], field: parts[2]}
	wildcard, isQuery := strings.CutPrefix(to.Literal, "@request.query.")
	switch {
	case to.Literal == "@request.auth.id":
	case isQuery && !strings.ContainsAny(wildcard, ".:"):
		b.wildcard = wildcard
	default:
		return bindings
	}
	return append(bindings, b)
}

// hasTexts reports whether field is compared as text, so that equal values are the same text. One of several values is
// not: PocketBase compares the JSON of all.
func hasTexts(field core.Field) bool {
	switch field := field.(type) {
	case *core.TextField:
		return true
	case *core.RelationField:
		return !field.IsMultiple()
	case *core.SelectField:
		return !field.IsMultiple()
	}
	return false
}

func joinsIn(token fexpr.Token) []string {
	switch token.Type {
	case fexpr.TokenIdentifier:
		if parts := strings.SplitN(token.Literal, ".", 3); parts[0] == "@collection" && len(parts) == 3 {
			return []string{parts[1]}
		}
	case fexpr.TokenFunction:
		var joins []string
		if args, ok := token.Meta.([]fexpr.Token); ok {
			for _, arg := range args {
				joins = append(joins, joinsIn(arg)...)
			}
		}
		return joins
	}
	return nil
}

// narrow reduces the use of join to what also holds under bindings.
func narrow(uses map[string]*use, join string, bindings []binding) {
	here := &use{wildcards: map[string]string{}}
	for _, b := range bindings {
		switch {
		case b.join != join:
		case b.wildcard != "":
			here.wildcards[b.wildcard] = b.field
		default:
			here.user = b.field
		}
	}
	known := uses[join]
	if known == nil {
		uses[join] = here
		return
	}
	if known.user != here.user {
		known.user = ""
	}
	maps.DeleteFunc(known.wildcards, func(name, field string) bool { return here.wildcards[name] != field })
}

// ChangedFields returns the fields in which two versions of a record differ, or all fields if one
// version is nil, since the record is new or deleted.
func ChangedFields(before, after *core.Record) sets.Of[string] {
	changed := sets.Of[string]{}
	if before == nil || after == nil {
		changed[AnyField] = struct{}{}
		return changed
	}
	for _, field := range after.Collection().Fields {
		if name := field.GetName(); !reflect.DeepEqual(before.GetRaw(name), after.GetRaw(name)) {
			changed[name] = struct{}{}
		}
	}
	return changed
}

// Meets reports whether a changed field is among those that are looked at.
func Meets(lookedAt, changed sets.Of[string]) bool {
	if changed.Has(AnyField) || lookedAt.Has(AnyField) {
		return len(lookedAt) > 0 && len(changed) > 0
	}
	for field := range lookedAt {
		if changed.Has(field) {
			return true
		}
	}
	return false
}

// Concern selects the subscribers of the channel's topics that a change of a record may affect: all
// of them, certain users, or the subscribers of certain topics.
type Concern struct {
	All bool
	// Users are ids of auth records in any collection, because a rule compares only the id. ""
	// stands for guests.
	Users  sets.Of[string]
	Topics sets.Of[string]
}

// Concern returns whom a change of a record may affect through a rule of the channel with pattern
// p. before is nil for a new record, after is nil for a deleted one, and changed are the changed
// fields.
func (d *Dependency) Concern(p *Pattern, before, after *core.Record, changed sets.Of[string]) Concern {
	concern := Concern{Users: sets.Of[string]{}, Topics: sets.Of[string]{}}
	for _, u := range d.Uses {
		switch {
		case u.user != "":
			maps.Copy(concern.Users, differing(u.user, before, after, d.Fields, changed))
		case len(u.wildcards) > 0 && len(u.wildcards) == p.wildcards:
			for _, topic := range p.Topics(func(name string) sets.Of[string] {
				return differing(u.wildcards[name], before, after, d.Fields, changed)
			}) {
				concern.Topics.Add(topic)
			}
		default:
			concern.All = true
		}
	}
	return concern
}

// differing returns the values of a field, before and after. It returns none if the value stays and nothing else that is
// looked at has changed, because nothing has changed for it.
func differing(field string, before, after *core.Record, lookedAt, changed sets.Of[string]) sets.Of[string] {
	values := sets.Of[string]{}
	for _, record := range []*core.Record{before, after} {
		if record == nil {
			// without a row, a rule compares with the empty row of an outer join
			values[""] = struct{}{}
			continue
		}
		values[record.GetString(field)] = struct{}{}
	}
	if before == nil || after == nil || len(values) > 1 {
		return values
	}
	for other := range lookedAt {
		if other == AnyField || other != field && changed.Has(other) {
			return values
		}
	}
	return nil
}
