package rules

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"herald/notify/internal/sets"
)

// Pattern is the pattern of a channel, in the syntax of net/http's ServeMux: chat/{room},
// files/{path...}.
type Pattern struct {
	Text     string
	segments []segment
	Names    []string // of the wildcards, in order
	// wildcards counts the variable parts: named wildcards and a trailing slash
	wildcards int
}

type segment struct {
	kind segmentKind
	text string // of a literal
	name string // of a wildcard; empty for a trailing slash
}

type segmentKind int

const (
	literal segmentKind = iota
	single              // {name}: one segment that is not empty
	rest                // {name...} or a trailing slash: everything that follows
	end                 // {$}: nothing after a trailing slash
)

// ParsePattern parses text. net/http decides what is valid: text must be the path of one of its
// patterns, without the leading slash.
func ParsePattern(text string) (*Pattern, error) {
	if strings.HasPrefix(text, "/") {
		return nil, errors.New(`must not begin with "/"`)
	}
	if err := register(text); err != nil {
		return nil, err
	}
	p := &Pattern{Text: text}
	for part := range strings.SplitSeq(text, "/") {
		s := segment{text: part}
		switch name, isWildcard := strings.CutPrefix(part, "{"); {
		case part == "": // the last one: net/http refuses others
			s.kind = rest
			p.wildcards++
		case part == "{$}":
			s.kind = end
		case isWildcard:
			s.kind = single
			s.name = strings.TrimSuffix(name, "}")
			if all, ok := strings.CutSuffix(s.name, "..."); ok {
				s.kind, s.name = rest, all
			}
			p.Names = append(p.Names, s.name)
			p.wildcards++
		default:
			if unescaped, err := url.PathUnescape(part); err == nil {
				s.text = unescaped
			}
		}
		p.segments = append(p.segments, s)
	}
	return p, nil
}

// Conflicts reports whether some topics match both p and other although neither is the more
// specific one.
func (p *Pattern) Conflicts(other *Pattern) bool { return register(p.Text, other.Text) != nil }

// Begin returns the text of the first segment; a wildcard is returned as it is written.
func (p *Pattern) Begin() string { return p.segments[0].text }

// Example returns a topic that matches p, with value in place of each wildcard.
func (p *Pattern) Example(value string) string {
	parts := make([]string, len(p.segments))
	for i, s := range p.segments {
		if parts[i] = s.text; s.kind == single || s.kind == rest {
			parts[i] = value
		}
	}
	return strings.Join(parts, "/")
}

// register returns net/http's objection to patterns, worded for the author of the last one.
func register(patterns ...string) (err error) {
	defer func() {
		cause := recover()
		if cause == nil {
			return
		}
		if strings.Contains(fmt.Sprint(cause), "unclean path") {
			err = errors.New(`must not have an empty segment, "." or ".."`)
			return
		}
		err = fmt.Errorf("is not a valid pattern: %v", cause)
		if parsing, ok := cause.(error); ok {
			if inner := errors.Unwrap(parsing); inner != nil {
				_, reason, _ := strings.Cut(inner.Error(), ": ") // after "at offset 4"
				err = fmt.Errorf("is not a valid pattern: %s", reason)
			}
		}
	}()
	mux := http.NewServeMux()
	for _, text := range patterns {
		// with a method: without one, net/http accepts paths that no request can have
		mux.Handle("GET /"+text, http.NotFoundHandler())
	}
	return nil
}

// Matcher returns a function that reports whether a topic matches p.
func (p *Pattern) Matcher() func(topic string) bool {
	var tree Tree[struct{}]
	tree.Add(p, struct{}{})
	return func(topic string) bool {
		_, _, found := tree.Match(topic)
		return found
	}
}

// Topics returns the topics that match p when each wildcard stands for one of its values.
func (p *Pattern) Topics(values func(name string) sets.Of[string]) []string {
	topics := []string{""}
	for i, s := range p.segments {
		options := sets.Of[string]{s.text: {}}
		switch {
		case s.kind == end:
			options = sets.Of[string]{"": {}}
		case s.kind == single, s.kind == rest && s.name != "":
			options = values(s.name)
			if s.kind == single {
				delete(options, "") // {name} never stands for an empty segment
			}
		}
		var longer []string
		for _, topic := range topics {
			for option := range options {
				if i > 0 {
					option = topic + "/" + option
				}
				longer = append(longer, option)
			}
		}
		topics = longer
	}
	return topics
}
