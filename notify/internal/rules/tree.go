package rules

import "strings"

// Tree holds many patterns and finds the most specific one that a topic matches, with its value.
// The zero value is empty. A Tree must not be changed while it is read.
type Tree[T any] struct{ root node[T] }

// node is a place in the tree: what may follow the segments that lead to it.
type node[T any] struct {
	literals map[string]*node[T]
	single   *node[T]
	// the values of the patterns that end here, or nil
	here *T // with the last segment
	end  *T // with a slash after it
	rest *T // with whatever follows
}

// Add puts value in the place of p. It returns false, and changes nothing, if the place is taken.
func (t *Tree[T]) Add(p *Pattern, value T) bool {
	n := &t.root
	place := &n.here
	for _, s := range p.segments {
		switch s.kind {
		case literal:
			next := n.literals[s.text]
			if next == nil {
				next = &node[T]{}
				if n.literals == nil {
					n.literals = map[string]*node[T]{}
				}
				n.literals[s.text] = next
			}
			n, place = next, &next.here
		case single:
			if n.single == nil {
				n.single = &node[T]{}
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
	*place = &value
	return true
}

// Match returns the value of the most specific pattern that topic matches, and the values of the
// pattern's wildcards. Unlike net/http, which first redirects to a clean path, it takes "//" and
// ".." as they are. A topic with an empty segment does not match {name}, but does match {name...}.
func (t *Tree[T]) Match(topic string) (value T, values []string, found bool) {
	place, values := t.root.match("/"+topic, nil)
	if place == nil {
		return value, nil, false
	}
	return *place, values, true
}

// match looks up path, which is a topic after a slash.
func (n *node[T]) match(path string, values []string) (*T, []string) {
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
