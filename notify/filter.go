// The filter of an audience. audience.go compiles it; send.go resolves it with one query per
// message.

package notify

import (
	"context"
	"encoding/json/v2"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/search"

	"herald/notify/internal/rules"
	"herald/notify/internal/sets"
)

// filterFields lists the names that an audience's filter may use: the auth record's fields and
// @collection.*. There is no request, so @request.* means nothing.
var filterFields = []string{`^\w+[\w\.\:]*$`, `^\@collection\.\w+(\:\w+)?\.[\w\.\:]*\w+$`}

// collectionFilter is the filter of an audience, compiled for one collection.
type collectionFilter struct {
	collection *core.Collection
	expr       dbx.Expression
	resolver   *core.RecordFieldResolver
	// meaning is a hash of the ids of the collections and fields that the filter names. It stays
	// the same as long as the names stand for the same things.
	meaning string
}

// compileFor compiles filter for the records of collection.
func (n *Notifier) compileFor(collection *core.Collection, filter string) (collectionFilter, error) {
	resolver := core.NewRecordFieldResolver(n.app, collection, nil, true)
	resolver.SetAllowedFields(filterFields)
	noting := &meaningResolver{resolver, n.app, collection, sets.Of[string]{}}
	expr, err := search.FilterData(filter).BuildExpr(noting)
	if err != nil {
		return collectionFilter{}, err
	}
	return collectionFilter{collection, expr, resolver, noting.meaning()}, nil
}

// meaningResolver is PocketBase's resolver of the names in a filter. It also records what they
// stand for.
type meaningResolver struct {
	*core.RecordFieldResolver
	app        core.App
	collection *core.Collection
	ids        sets.Of[string] // "PATH=ID"
}

// Resolve implements [search.FieldResolver].
func (r *meaningResolver) Resolve(field string) (*search.ResolverResult, error) {
	parts := rules.PathOf(field)
	collection := r.collection
	if parts[0] == "@collection" && len(parts) > 2 {
		if collection = r.collectionBehind(parts[1]); collection != nil {
			r.note(parts[1], collection)
		}
		parts = parts[2:]
	}
	for _, name := range parts {
		if collection == nil {
			break // a path into JSON, or nothing
		}
		field := collection.Fields.GetByName(name)
		from, via, isBack := strings.Cut(name, "_via_")
		relation, isRelation := field.(*core.RelationField)
		switch before := collection.Id; {
		case isRelation:
			collection = r.collectionBehind(relation.CollectionId)
			r.ids[before+"."+name+"="+relation.Id] = struct{}{}
		case field != nil:
			collection = nil
			r.ids[before+"."+name+"="+field.GetId()] = struct{}{}
		case isBack:
			if collection = r.collectionBehind(from); collection != nil {
				r.note(before+"."+name, collection)
				if field := collection.Fields.GetByName(via); field != nil {
					r.ids[before+"."+name+"="+field.GetId()] = struct{}{}
				}
			}
		default:
			collection = nil
		}
	}
	return r.RecordFieldResolver.Resolve(field)
}

// note records a collection. The creation time is part of the entry because a recreated collection
// has the same id as the earlier one of that name.
func (r *meaningResolver) note(path string, collection *core.Collection) {
	r.ids[path+"="+collection.Id+" "+collection.Created.String()] = struct{}{}
}

func (r *meaningResolver) collectionBehind(nameOrID string) *core.Collection {
	collection, err := r.app.FindCachedCollectionByNameOrId(nameOrID)
	if err != nil {
		return nil
	}
	return collection
}

func (r *meaningResolver) meaning() string {
	hash := fnv.New64a()
	for _, id := range slices.Sorted(maps.Keys(r.ids)) {
		hash.Write([]byte(id + "\n"))
	}
	return strconv.FormatUint(hash.Sum64(), 36)
}

// compileFilter compiles filter for the auth collections that a may match.
//
// If the audience names collections (or users of some), the filter must fit each one. Otherwise it
// must fit at least one: `plan = 'pro'` is about users who have a plan, and must not be refused
// because superusers have none. So the validity of a filter depends on the collections alone, never
// on who happens to be connected.
func (n *Notifier) compileFilter(filter string, a *audience) ([]collectionFilter, *FieldError) {
	const field = "to.filter"
	if len(filter) > search.MaxFilterLength {
		return nil, invalid(field, ErrInvalidFilter, "must be no longer than %d bytes, has %d", search.MaxFilterLength, len(filter))
	}

	collections, err := n.authCollections()
	if err != nil {
		return nil, invalid(field, ErrInvalidFilter, "cannot be checked: %s", err)
	}

	named := a.collections
	if named == nil && a.users != nil {
		named = sets.Of[string]{}
		for ref := range a.users {
			named[ref.collectionID] = struct{}{}
		}
	}

	compiled := []collectionFilter{} // not nil: a filter that fits no collection matches nobody
	var firstMisfit *FieldError
	for _, collection := range collections {
		if named != nil && !named.Has(collection.Id) {
			continue
		}
		one, err := n.compileFor(collection, filter)
		if err == nil {
			compiled = append(compiled, one)
			continue
		}
		misfit := invalid(field, ErrInvalidFilter, "collection %q: %s", collection.Name, err)
		if named != nil {
			return nil, misfit
		}
		if firstMisfit == nil {
			firstMisfit = misfit
		}
	}
	if len(compiled) == 0 && firstMisfit != nil {
		return nil, firstMisfit
	}
	return compiled, nil
}

// resolveFilter sets pub.to.allowed to the connected, subscribed users that match the filter. It
// takes one query over their ids.
func (n *Notifier) resolveFilter(ctx context.Context, pub *publication) error {
	allowed, err := n.filterUsers(ctx, pub.to.filter, n.filterCandidates(pub))
	pub.to.allowed = allowed
	return err
}

// filterUsers returns the candidates (ids by collection id) that match the filter. Only ctx limits
// the time of the query.
func (n *Notifier) filterUsers(ctx context.Context, filters []collectionFilter, candidates map[string]sets.Of[string]) (sets.Of[userRef], error) {
	allowed := sets.Of[userRef]{}
	query, err := n.filterQuery(ctx, filters, candidates)
	if query == nil || err != nil {
		return allowed, err
	}

	var rows []struct {
		Collection string `db:"collection"`
		ID         string `db:"id"`
	}
	if err := query.All(&rows); err != nil {
		return allowed, err
	}
	for _, row := range rows {
		allowed[userRef{row.Collection, row.ID}] = struct{}{}
	}
	return allowed, nil
}

// filterCandidates returns the ids, by collection id, of the users that the
// rest of the audience matches.
func (n *Notifier) filterCandidates(pub *publication) map[string]sets.Of[string] {
	rest := *pub.to
	rest.filtered = false

	candidates := map[string]sets.Of[string]{}
	for _, client := range n.candidates(pub.Topic, false, userRef{}) {
		who := n.identityOf(client)
		if who.isGuest() || !rest.isFor(&reader{who: who, connection: client.Id()}) || len(n.keysOf(client, pub.Topic)) == 0 {
			continue
		}
		ref := who.user
		if candidates[ref.collectionID] == nil {
			candidates[ref.collectionID] = sets.Of[string]{}
		}
		candidates[ref.collectionID][ref.id] = struct{}{}
	}
	return candidates
}

// filterQuery joins the selects of all collections that have candidates into one query. It returns
// nil if there are no candidates.
func (n *Notifier) filterQuery(ctx context.Context, filters []collectionFilter, candidates map[string]sets.Of[string]) (*dbx.Query, error) {
	var selects []*dbx.SelectQuery
	for i, filter := range filters {
		users := candidates[filter.collection.Id]
		if len(users) == 0 {
			continue
		}
		// one JSON parameter: SQLite limits the number of parameters, and
		// their names must differ between the parts of a UNION
		idsJSON, err := json.Marshal(slices.Collect(maps.Keys(users)))
		if err != nil {
			return nil, err
		}
		param := fmt.Sprintf("heraldIDs%d", i)
		name := filter.collection.Name
		query := n.app.ConcurrentDB().
			Select(fmt.Sprintf("('%s') AS [[collection]]", filter.collection.Id), fmt.Sprintf("[[%s.id]]", name)).
			From(name).
			AndWhere(dbx.NewExp(
				fmt.Sprintf("[[%s.id]] IN (SELECT [[value]] FROM json_each({:%s}))", name, param),
				dbx.Params{param: string(idsJSON)},
			)).
			AndWhere(filter.expr)
		if err := filter.resolver.UpdateQuery(query); err != nil {
			return nil, err
		}
		selects = append(selects, query)
	}
	if len(selects) == 0 {
		return nil, nil
	}
	first := selects[0]
	for _, other := range selects[1:] {
		first.UnionAll(other.Build())
	}
	return first.Build().WithContext(ctx), nil
}
