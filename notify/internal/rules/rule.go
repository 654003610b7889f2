// Package rules has the rules of channels and the patterns of their topics: which topics a
// channel is for, who passes a rule, and on which records that depends. It knows neither
// clients nor messages.
package rules

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ganigeorgiev/fexpr"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/search"

	"herald/notify/internal/sets"
)

// openRule is the rule that lets everyone pass; an empty one lets superusers.
const openRule = "*"

// Rule is a compiled access rule, and what its answer depends on.
type Rule struct {
	// Filter is the rule as PocketBase's access check takes it: nil is
	// superusers only, "" is everyone.
	Filter *string

	LooksAtHeaders bool
	// Wildcards are those of the pattern whose values it looks at.
	Wildcards sets.Of[string]
	// AuthFields are the fields of the auth record that it looks at. Empty:
	// every signed-in user and guest gets the same answer.
	AuthFields sets.Of[string]
	// Collections are the others that it looks at, by id.
	Collections map[string]*Dependency
}

// LooksAtAuth reports whether the answer depends on who asks.
func (r *Rule) LooksAtAuth() bool { return len(r.AuthFields) > 0 }

// Compile reads the rule of a channel, a record of collection, whose pattern has wildcards
// with names.
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
	}
	return r, nil
}

// ruleResolver is PocketBase's resolver of the names in a rule that also notes
// them.
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

// PathOf returns the parts of an identifier without their modifiers: of
// "@collection.rooms:alias.name:lower" they are "@collection", "rooms" and "name".
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
			// one that the pattern does not have would always be empty
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
