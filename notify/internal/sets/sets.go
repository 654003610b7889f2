// Package sets has the one type that says whether something is among others.
package sets

// Of is a set. A nil one is empty, and may be asked.
type Of[K comparable] map[K]struct{}

// Has reports whether key is in s.
func (s Of[K]) Has(key K) bool { _, ok := s[key]; return ok }

// Add puts key into s.
func (s Of[K]) Add(key K) { s[key] = struct{}{} }

// From returns the set of items; nil of nil.
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
