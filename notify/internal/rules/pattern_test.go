package rules

import (
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
	"slices"
	"strings"
	"testing"

	"herald/notify/internal/sets"
)

// FuzzPattern compares which pattern a topic fits, and what its wildcards stand
// for, with net/http's own ServeMux.
func FuzzPattern(f *testing.F) {
	for _, patterns := range []string{
		"news", "chat/{room}", "files/{path...}", "chat/{room}\nchat/42\nchat/{rest...}", "a/{x}/c\na/b/{y}",
		"{$}", "{all...}\n{x}/\n{x}/{y}\na/{$}", "a/\na/b/\na/b/{$}\na/{x}/c/{y...}", "%61/{x}\na%2Fb", "{x}/b/{y}/d\n{x}/{z}/c/{y}",
	} {
		for _, topic := range []string{"news", "chat/42", "chat/42/", "files/a/b", "files/", "files", "a/b/c", "a/b", "a/", "a", "x/b/c/d", "%61/1", "a%2Fb"} {
			f.Add(patterns, topic)
		}
	}
	f.Fuzz(func(t *testing.T, patterns, topic string) {
		mux := http.NewServeMux()
		var tree Tree[*Pattern]
		var all []*Pattern
		var gotPattern string
		var gotValues map[string]string
		for text := range strings.SplitSeq(patterns, "\n") {
			p, err := ParsePattern(text)
			if err != nil || slices.ContainsFunc(all, func(other *Pattern) bool { return other.Conflicts(p) }) {
				continue
			}
			all = append(all, p)
			// what is accepted may be registered, and is found
			mux.HandleFunc("GET /"+text, func(_ http.ResponseWriter, r *http.Request) {
				gotPattern, gotValues = p.Text, map[string]string{}
				for _, name := range p.Names {
					gotValues[name] = r.PathValue(name)
				}
			})
			if !tree.Add(p, p) {
				t.Fatalf("no place for %q among %q", text, patterns)
			}
		}

		clean := path.Clean("/" + topic)
		if strings.HasSuffix(topic, "/") && clean != "/" {
			clean += "/"
		}
		if clean != "/"+topic || topic == "*" {
			return // net/http redirects to the clean path
		}
		request := &http.Request{Method: http.MethodGet, URL: &url.URL{Path: "/" + topic}}
		response := httptest.NewRecorder()
		mux.ServeHTTP(response, request)
		if gotPattern == "" && response.Code != http.StatusNotFound {
			return // nor has a topic another one with a slash behind it
		}
		found, values, isFound := tree.Match(topic)
		switch {
		case !isFound && gotPattern == "":
			return
		case !isFound || found.Text != gotPattern:
			t.Fatalf("%q among %q: found %v, net/http %q", topic, patterns, found, gotPattern)
		}
		got := map[string]string{}
		for i, name := range found.Names {
			got[name] = values[i]
		}
		if !maps.Equal(got, gotValues) {
			t.Fatalf("%q: %v, net/http %v", topic, got, gotValues)
		}
		for _, p := range all {
			if matches := p.Matcher(); p == found && !matches(topic) {
				t.Fatalf("%q does not match %q by itself", topic, p.Text)
			}
		}
		topics := found.Topics(func(name string) sets.Of[string] { return sets.From([]string{gotValues[name]}) })
		if found.wildcards == len(found.Names) && !slices.Equal(topics, []string{topic}) {
			t.Fatalf("%q with %v makes %q, want %q", found.Text, gotValues, topics, topic)
		}
	})
}

func TestMatchUncleanTopics(t *testing.T) {
	for _, test := range []struct {
		pattern, topic string
		values         []string // nil: no match
	}{
		{"a/{x}", "a/", nil},
		{"a/{x}", "a//", nil},
		{"a/{x}/b", "a//b", nil},
		{"a/{x...}", "a//b", []string{"/b"}},
		{"a/{x...}", "a/../b", []string{"../b"}},
		{"a/{x}", "a/..", []string{".."}},
		{"{x...}", "/", []string{"/"}},
		{"{x...}", "/a", []string{"/a"}},
		{"{x}", "/a", nil},
	} {
		p, err := ParsePattern(test.pattern)
		if err != nil {
			t.Fatal(err)
		}
		var tree Tree[*Pattern]
		tree.Add(p, p)
		_, values, isFound := tree.Match(test.topic)
		if isFound != (test.values != nil) || isFound && !slices.Equal(values, test.values) {
			t.Errorf("%q, topic %q: %v %q", test.pattern, test.topic, isFound, values)
		}
	}
}
