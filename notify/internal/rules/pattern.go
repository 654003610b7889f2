package rules

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"herald/notify/internal/sets"
)

// Pattern is that of a channel, in the syntax of net/http's ServeMux: chat/{room}, files/{path...}.
type Pattern struct {
	Text     string
	segments []segment
	Names    []string // of the wildcards, in order
	// wildcards counts what stands for anything: names, and a trailing slash
	wildcards int
}

type segment struct {
	kind segmentKind
	text string // of a literal
	name string // of a wildcard; empty for what is behind a trailing slash
}

type segmentKind int

const (
	literal segmentKind = iota
	single              // {name}: one segment that is not empty
	rest                // {name...}, or a trailing slash: all that follows
	end                 // {$}: nothing behind a trailing slash
)

// ParsePattern reads text. What is a pattern, net/http says: text is the path of
// one of its patterns, without the slash at the beginning.
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

// Conflicts reports whether there are topics that fit both p and other, neither
// of which is the more specific one for all of them.
func (p *Pattern) Conflicts(other *Pattern) bool { return register(p.Text, other.Text) != nil }

// Begin returns the first segment, where that is no wildcard.
func (p *Pattern) Begin() string { return p.segments[0].text }

// Example returns a topic that fits p, with value in the place of each wildcard.
func (p *Pattern) Example(value string) string {
	parts := make([]string, len(p.segments))
	for i, s := range p.segments {
		if parts[i] = s.text; s.kind == single || s.kind == rest {
			parts[i] = value
		}
	}
	return strings.Join(parts, "/")
}

// register returns what net/http says of patterns, in words for the author of
// the last.
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
		err = fmt.Errorf("is no pattern: %v", cause)
		if parsing, ok := cause.(error); ok {
			if inner := errors.Unwrap(parsing); inner != nil {
				_, reason, _ := strings.Cut(inner.Error(), ": ") // behind "at offset 4"
				err = fmt.Errorf("is no pattern: %s", reason)
			}
		}
	}()
	mux := http.NewServeMux()
	for _, text := range patterns {
		// with a method: without one net/http takes paths that no request can have
		mux.Handle("GET /"+text, http.NotFoundHandler())
	}
	return nil
}

// Matcher returns a function that reports whether a topic fits p.
func (p *Pattern) Matcher() func(topic string) bool {
	var tree Tree[struct{}]
	tree.Add(p, struct{}{})
	return func(topic string) bool {
		_, _, found := tree.Match(topic)
		return found
	}
}

// Topics returns the topics that p fits where each wildcard stands for one of its
// values.
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
				delete(options, "") // which it never stands for
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
