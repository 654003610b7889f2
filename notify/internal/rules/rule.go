// Package rules contains the rules of channels and the patterns of their topics: which topics a
// channel covers, who passes a rule, and which records the result depends on. It knows nothing
// about clients or messages.
package rules

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/ganigeorgiev/fexpr"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/search"

	"herald/notify/internal/sets"
)

// openRule is the rule that lets everyone pass; an empty rule lets only superusers pass.
const openRule = "*"

// Rule is a compiled access rule and what its result depends on.
type Rule struct {
	// Filter is the rule as PocketBase's access check takes it: nil means superusers only, "" means
	// everyone.
	Filter *string

	LooksAtHeaders bool
	// Wildcards are the pattern's wildcards whose values the rule looks at.
	Wildcards sets.Of[string]
	// AuthFields are the fields of the auth record that the rule looks at. If it is empty, every
	// signed-in user and guest gets the same result.
	AuthFields sets.Of[string]
	// Collections are the other collections that the rule looks at, by id.
	Collections map[string]*Dependency

	isSteady bool // its query can be prepared

	mu    sync.Mutex     // guards plans
	plans map[kind]*plan // nil for one that cannot be prepared
}

// LooksAtAuth reports whether the result depends on the auth record.
func (r *Rule) LooksAtAuth() bool { return len(r.AuthFields) > 0 }

// Compile compiles a rule of a channel. collection is the collection of channels; names are the
// wildcards of the channel's pattern.
func Compile(app core.App, collection *core.Collection, text string, names []string) (*Rule, error) {
	r := &Rule{Wildcards: sets.Of[string]{}, AuthFields: sets.Of[string]{}, Collections: map[string]*Dependency{}}
	switch text = strings.TrimSpace(text); text {
	case "":
		return r, nil
	case openRule:
		r.Filter = new(string)
		return r, nil
	}
	r.Filter = &text
	resolver := &ruleResolver{core.NewRecordFieldResolver(app, collection, nil, true), app, collection, r, names}
	if _, err := search.FilterData(text).BuildExpr(resolver); err != nil {
		return nil, fmt.Errorf("does not compile: %w", err)
	}
	if groups, err := fexpr.Parse(text); err == nil {
		r.noteUses(app, groups)
		r.isSteady = isSteady(r, collection, groups)
	}
	return r, nil
}

// ruleResolver is PocketBase's resolver of the names in a rule. It also records them.
type ruleResolver struct {
	*core.RecordFieldResolver
	app        core.App
	collection *core.Collection // of the channels
	rule       *Rule
	names      []string
}

// Resolve implements [search.FieldResolver].
func (r *ruleResolver) Resolve(field string) (*search.ResolverResult, error) {
	if err := r.note(field); err != nil {
		return nil, err
	}
	return r.RecordFieldResolver.Resolve(field)
}

// PathOf returns the parts of an identifier without their modifiers:
// "@collection.rooms:alias.name:lower" yields "@collection", "rooms" and "name".
func PathOf(identifier string) []string {
	parts := strings.Split(identifier, ".")
	for i := range parts {
		parts[i], _, _ = strings.Cut(parts[i], ":")
	}
	return parts
}

func (r *ruleResolver) note(field string) error {
	parts := PathOf(field)
	switch {
	case parts[0] == "@request" && len(parts) > 2:
		name := parts[2]
		switch parts[1] {
		case "auth":
			r.rule.AuthFields[name] = struct{}{}
			r.rule.noteAuthPath(r.app, parts[2:])
		case "headers":
			r.rule.LooksAtHeaders = true
		case "query":
			// a wildcard that the pattern lacks would always be empty
			if !slices.Contains(r.names, name) {
				return fmt.Errorf("%s: the pattern has no {%s}", field, name)
			}
			r.rule.Wildcards[name] = struct{}{}
		case "body":
			return fmt.Errorf("%s: a channel's rules see no body", field)
		}
	case parts[0] == "@collection" && len(parts) > 2:
		collection, err := r.app.FindCachedCollectionByNameOrId(parts[1])
		if err != nil {
			return fmt.Errorf("%s: there is no collection %q", field, parts[1])
		}
		r.rule.dependency(r.app, collection).Fields[fieldBehind(parts[2])] = struct{}{}
		r.rule.notePath(r.app, collection, parts[2:])
	default:
		r.rule.notePath(r.app, r.collection, parts)
	}
	return nil
}
