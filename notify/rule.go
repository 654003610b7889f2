// The access rules of channels, in PocketBase's rule language. Compiled when a
// channel is saved or loaded (channels.go), asked by access.go. What a rule hangs
// on is in dependency.go.

package notify

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ganigeorgiev/fexpr"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/search"
)

// openRule is the rule that lets everyone pass; an empty one lets superusers.
const openRule = "*"

// rule is a compiled access rule, and what its answer depends on.
type rule struct {
	// filter is the rule as PocketBase's access check takes it: nil is
	// superusers only, "" is everyone.
	filter *string

	looksAtHeaders bool
	// wildcards are those of the pattern whose values it looks at.
	wildcards set[string]
	// authFields are the fields of the auth record that it looks at. Empty:
	// every signed-in user and guest gets the same answer.
	authFields set[string]
	// collections are the others that it looks at, by id.
	collections map[string]*dependency
}

func (r *rule) looksAtAuth() bool { return len(r.authFields) > 0 }

// compileRule reads the rule of a channel, a record of collection, whose
// wildcards have names. field is the rule's own, for the error.
func compileRule(app core.App, collection *core.Collection, field, text string, names []string) (*rule, *FieldError) {
	r := &rule{wildcards: set[string]{}, authFields: set[string]{}, collections: map[string]*dependency{}}
	switch text = strings.TrimSpace(text); text {
	case "":
		return r, nil
	case openRule:
		r.filter = new(string)
		return r, nil
	}
	r.filter = &text
	resolver := &ruleResolver{core.NewRecordFieldResolver(app, collection, nil, true), app, collection, r, names}
	if _, err := search.FilterData(text).BuildExpr(resolver); err != nil {
		return nil, invalid(field, ErrInvalidRule, "does not compile: %s", err)
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
	rule       *rule
	names      []string
}

// Resolve implements [search.FieldResolver].
func (r *ruleResolver) Resolve(field string) (*search.ResolverResult, error) {
	if err := r.note(field); err != nil {
		return nil, err
	}
	return r.RecordFieldResolver.Resolve(field)
}

// pathOf returns the parts of an identifier without their modifiers: of
// "@collection.rooms:alias.name:lower" they are "@collection", "rooms" and "name".
func pathOf(identifier string) []string {
	parts := strings.Split(identifier, ".")
	for i := range parts {
		parts[i], _, _ = strings.Cut(parts[i], ":")
	}
	return parts
}

func (r *ruleResolver) note(field string) error {
	parts := pathOf(field)
	switch {
	case parts[0] == "@request" && len(parts) > 2:
		name := parts[2]
		switch parts[1] {
		case "auth":
			r.rule.authFields[name] = struct{}{}
			r.rule.noteAuthPath(r.app, parts[2:])
		case "headers":
			r.rule.looksAtHeaders = true
		case "query":
			// one that the pattern does not have would always be empty
			if !slices.Contains(r.names, name) {
				return fmt.Errorf("%s: the pattern has no {%s}", field, name)
			}
			r.rule.wildcards[name] = struct{}{}
		case "body":
			return fmt.Errorf("%s: a channel's rules see no body", field)
		}
	case parts[0] == "@collection" && len(parts) > 2:
		collection, err := r.app.FindCachedCollectionByNameOrId(parts[1])
		if err != nil {
			return fmt.Errorf("%s: there is no collection %q", field, parts[1])
		}
		r.rule.dependency(r.app, collection).fields[fieldBehind(parts[2])] = struct{}{}
		r.rule.notePath(r.app, collection, parts[2:])
	default:
		r.rule.notePath(r.app, r.collection, parts)
	}
	return nil
}
