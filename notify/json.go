// JSON that is not quite JSON: what browsers send all the same. Called by message.go
// and by hooks/errors.go for the bodies of requests.

package notify

import (
	"bytes"
	"encoding/json/jsontext"
	"errors"
	"io"
	"slices"
)

// NormalizeJSON returns raw with what PocketBase's record API takes too, and JSON proper
// does not have: half a surrogate pair ("hi 😀".slice(0, 4) in JavaScript) becomes U+FFFD,
// and of members with one name the last is left. Numbers stay as they are. The error is
// that of any other flaw. It takes time in proportion to the size, however deep it is.
func NormalizeJSON(raw []byte) (jsontext.Value, error) {
	lenient := []jsontext.Options{jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)}
	decoder := jsontext.NewDecoder(bytes.NewReader(raw), lenient...)
	var buffer bytes.Buffer
	encoder := jsontext.NewEncoder(&buffer, lenient...)

	var dropped []span       // members of which a later one has the name
	var open []*openedObject // what is being read; nil for a list
	values := 0
	for {
		token, err := decoder.ReadToken()
		if err == io.EOF && values == 1 {
			break
		}
		if err != nil {
			return nil, err
		}
		kind, start := token.Kind(), encoder.OutputOffset()
		isName := false
		if n := len(open); n > 0 && open[n-1] != nil && kind != jsontext.KindEndObject {
			isName = open[n-1].isName()
			if isName {
				open[n-1].begin(token.String(), start)
			}
		}
		if err := encoder.WriteToken(token); err != nil {
			return nil, err
		}
		switch kind {
		case jsontext.KindBeginObject:
			open = append(open, &openedObject{members: map[string]span{}})
			continue
		case jsontext.KindBeginArray:
			open = append(open, nil)
			continue
		case jsontext.KindEndObject, jsontext.KindEndArray:
			open = open[:len(open)-1]
		}
		switch n := len(open); {
		case isName:
		case n == 0:
			values++
			if values > 1 {
				return nil, errors.New("more than one value")
			}
		case open[n-1] != nil:
			if before, isTwice := open[n-1].end(encoder.OutputOffset()); isTwice {
				dropped = append(dropped, before)
			}
		}
	}
	return without(bytes.TrimSpace(buffer.Bytes()), dropped), nil
}

// span is a part of the output.
type span struct{ start, end int64 }

// openedObject is an object of which not all has been read.
type openedObject struct {
	members map[string]span
	name    string // of the member that is being read
	start   int64
	inValue bool
}

func (o *openedObject) isName() bool { return !o.inValue }

func (o *openedObject) begin(name string, start int64) {
	o.name, o.start, o.inValue = name, start, true
}

// end notes the end of a member, and returns the one of that name before it.
func (o *openedObject) end(at int64) (before span, isTwice bool) {
	before, isTwice = o.members[o.name]
	o.members[o.name] = span{o.start, at}
	o.inValue = false
	return before, isTwice
}

// without returns text without some members. Each has the comma before it, but the first
// one of an object.
func without(text []byte, members []span) []byte {
	if len(members) == 0 {
		return text
	}
	slices.SortFunc(members, func(a, b span) int { return int(a.start - b.start) })
	out := make([]byte, 0, len(text))
	at := int64(0)
	for _, member := range append(members, span{int64(len(text)), int64(len(text))}) {
		if member.start < at {
			continue // within one that is left out
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
