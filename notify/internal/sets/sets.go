// Package sets provides a set type.
package sets

// Of is a set. A nil set is empty; Has may be called on it.
type Of[K comparable] map[K]struct{}

// Has reports whether key is in s.
func (s Of[K]) Has(key K) bool { _, ok := s[key]; return ok }

// Add puts key into s.
func (s Of[K]) Add(key K) { s[key] = struct{}{} }

// From returns the set of items, or nil for nil.
func From[K comparable](items []K) Of[K] {
	if items == nil {
		return nil
	}
	s := make(Of[K], len(items))
	for _, item := range items {
		s[item] = struct{}{}
	}
	return s
}
