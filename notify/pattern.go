// Patterns of channels, in the syntax of net/http's ServeMux, and which of them
// a topic belongs to. Called by channels.go.

package notify

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
)

// pattern is that of a channel: chat/{room}, files/{path...}.
type pattern struct {
	text     string
	segments []segment
	names    []string // of the wildcards, in order
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

// parsePattern reads text. What is a pattern, net/http says: text is the path of
// one of its patterns, without the slash at the beginning.
func parsePattern(text string) (*pattern, error) {
	if strings.HasPrefix(text, "/") {
		return nil, errors.New(`must not begin with "/"`)
	}
	if err := register(text); err != nil {
		return nil, err
	}
	p := &pattern{text: text}
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
			p.names = append(p.names, s.name)
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

// conflicts reports whether there are topics that fit both p and other, neither
// of which is the more specific one for all of them.
func (p *pattern) conflicts(other *pattern) bool { return register(p.text, other.text) != nil }

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

// node is a place in the tree of all patterns: what may follow the segments that
// lead to it.
type node struct {
	literals map[string]*node
	single   *node
	// the channels of the patterns that end here, nil without one
	here *channel // with the last segment
	end  *channel // with a slash behind it
	rest *channel // with whatever follows
}

// add adds the channel; it reports false where one has the same place already,
// which then stays.
func (n *node) add(c *channel) bool {
	place := &n.here
	for _, s := range c.pattern.segments {
		switch s.kind {
		case literal:
			next := n.literals[s.text]
			if next == nil {
				next = &node{}
				if n.literals == nil {
					n.literals = map[string]*node{}
				}
				n.literals[s.text] = next
			}
			n, place = next, &next.here
		case single:
			if n.single == nil {
				n.single = &node{}
			}
			n, place = n.single, &n.single.here
		case rest:
			place = &n.rest
		case end:
			place = &n.end
		}
	}
	if *place != nil {
		return false
	}
	*place = c
	return true
}

// match returns the channel with the most specific pattern that path fits, and
// what its wildcards stand for. path is a topic behind a slash. Unlike net/http,
// which redirects to a clean path first, it takes "//" and ".." as they are:
// a topic with an empty segment fits no {name}, but {name...}.
func (n *node) match(path string, values []string) (*channel, []string) {
	switch path {
	case "":
		return n.here, values
	case "/":
		if n.end != nil {
			return n.end, values
		}
	default:
		text, behind := path[1:], ""
		if i := strings.IndexByte(text, '/'); i >= 0 {
			text, behind = text[:i], text[i:]
		}
		if next := n.literals[text]; next != nil {
			if found, all := next.match(behind, values); found != nil {
				return found, all
			}
		}
		if n.single != nil && text != "" {
			if found, all := n.single.match(behind, append(values, text)); found != nil {
				return found, all
			}
		}
	}
	return n.rest, append(values, path[1:])
}

// matcher returns a function that reports whether a topic fits p.
func (p *pattern) matcher() func(topic string) bool {
	var root node
	root.add(&channel{pattern: p})
	return func(topic string) bool {
		found, _ := root.match("/"+topic, nil)
		return found != nil
	}
}

// topics returns the topics that p fits where each wildcard stands for one of its
// values.
func (p *pattern) topics(values func(name string) set[string]) []string {
	topics := []string{""}
	for i, s := range p.segments {
		options := set[string]{s.text: {}}
		switch {
		case s.kind == end:
			options = set[string]{"": {}}
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
