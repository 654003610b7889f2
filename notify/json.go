// Almost valid JSON, as browsers send it. Called by message.go and by hooks/internal/api for the
// bodies of requests.

package notify

import (
	"bytes"
	"cmp"
	"encoding/json/jsontext"
	"errors"
	"io"
	"slices"
)

// NormalizeJSON returns raw as valid JSON. It accepts two things that PocketBase's record API also
// accepts: half a surrogate pair ("hi 😀".slice(0, 4) in JavaScript), which becomes U+FFFD, and
// duplicate names, of which the last member stays. Numbers stay as they are. The error describes
// any other flaw. The time is proportional to the size, no matter how deep the nesting is.
func NormalizeJSON(raw []byte) (jsontext.Value, error) {
	lenient := []jsontext.Options{jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)}
	decoder := jsontext.NewDecoder(bytes.NewReader(raw), lenient...)
	var buffer bytes.Buffer
	encoder := jsontext.NewEncoder(&buffer, lenient...)

	var dropped []span     // members replaced by a later one of the same name
	var open []*openObject // what is being read; nil for a list
	for {
		container, before := decoder.StackIndex(decoder.StackDepth()) // before: the number of its tokens read so far
		isName := container == jsontext.KindBeginObject && before%2 == 0 && decoder.PeekKind() != jsontext.KindEndObject
		token, err := decoder.ReadToken()
		if _, values := decoder.StackIndex(0); err == io.EOF && values == 1 {
			break
		}
		if err != nil {
			return nil, err
		}
		kind := token.Kind()
		if isName {
			object := open[len(open)-1]
			object.name, object.start = token.String(), encoder.OutputOffset()
		}
		if err := encoder.WriteToken(token); err != nil {
			return nil, err
		}
		switch kind {
		case jsontext.KindBeginObject:
			open = append(open, &openObject{members: map[string]span{}})
			continue
		case jsontext.KindBeginArray:
			open = append(open, nil)
			continue
		case jsontext.KindEndObject, jsontext.KindEndArray:
			open = open[:len(open)-1]
		}
		switch n := len(open); {
		case n == 0:
			if _, values := decoder.StackIndex(0); values > 1 {
				return nil, errors.New("more than one value")
			}
		case !isName && open[n-1] != nil:
			object := open[n-1]
			if before, isTwice := object.members[object.name]; isTwice {
				dropped = append(dropped, before)
			}
			object.members[object.name] = span{object.start, encoder.OutputOffset()}
		}
	}
	return without(bytes.TrimSpace(buffer.Bytes()), dropped), nil
}

// span is a part of the output.
type span struct{ start, end int64 }

// openObject is an object that has not been read completely.
type openObject struct {
	members map[string]span
	name    string // of the member that is being read; it begins at start
	start   int64
}

// without returns text without some members. Each includes the comma before it, except the first
// member of an object.
func without(text []byte, members []span) []byte {
	if len(members) == 0 {
		return text
	}
	slices.SortFunc(members, func(a, b span) int { return cmp.Compare(a.start, b.start) })
	out := make([]byte, 0, len(text))
	at := int64(0)
	for _, member := range append(members, span{int64(len(text)), int64(len(text))}) {
		if member.start < at {
			continue // within a member that is already left out
		}
		part := text[at:member.start]
		if len(out) > 0 && out[len(out)-1] == '{' && len(part) > 0 && part[0] == ',' {
			part = part[1:]
		}
		out = append(out, part...)
		at = member.end
	}
	return out
}
