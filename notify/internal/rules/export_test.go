package rules

import "strings"

// IsPrepared reports whether a rule's query is prepared for someone.
func IsPrepared(r *Rule) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.plans {
		if p != nil {
			return true
		}
	}
	return false
}

// IsUnsteady reports whether the query of a rule has to be built each time.
func IsUnsteady(text string) bool {
	return strings.Contains(text, "@now") || strings.Contains(text, "headers") || strings.Contains(text, "~ @request")
}
