package rules

import "strings"

// Tree finds of many patterns the most specific one that a topic fits, and what stands
// there. The zero value is empty. It is not to be changed while it is read.
type Tree[T any] struct{ root node[T] }

// node is a place in the tree: what may follow the segments that lead to it.
type node[T any] struct {
	literals map[string]*node[T]
	single   *node[T]
	// what the patterns that end here stand for, nil without one
	here *T // with the last segment
	end  *T // with a slash behind it
	rest *T // with whatever follows
}

// Add puts value in the place of p; it reports false where one is there already, which then
// stays.
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

// Match returns what stands in the place of the most specific pattern that topic fits, and
// what the pattern's wildcards stand for. Unlike net/http, which redirects to a clean path
// first, it takes "//" and ".." as they are: a topic with an empty segment fits no {name},
// but {name...}.
func (t *Tree[T]) Match(topic string) (value T, values []string, found bool) {
	place, values := t.root.match("/"+topic, nil)
	if place == nil {
		return value, nil, false
	}
	return *place, values, true
}

// match looks for path, a topic behind a slash.
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
