// JSON that is not quite JSON: what browsers send all the same. Called by message.go
// and by hooks/errors.go for the bodies of requests.

package notify

import (
	"bytes"
	"cmp"
	"encoding/json/jsontext"
	"errors"
	"io"
	"slices"
)

// NormalizeJSON returns raw with what PocketBase's record API takes too, and JSON proper
// does not have: half a surrogate pair ("hi 😀".slice(0, 4) in JavaScript) becomes U+FFFD,
// and of members with one name the last is left. Numbers stay as they are. The error is
// that of any other flaw.
func NormalizeJSON(raw []byte) (jsontext.Value, error) {
	decoder := jsontext.NewDecoder(bytes.NewReader(raw), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
	value, err := normalizeNext(decoder)
	if err != nil {
		return nil, err
	}
	if _, err := decoder.ReadToken(); err != io.EOF {
		return nil, cmp.Or(err, errors.New("more than one value"))
	}
	return value, nil
}

func normalizeNext(decoder *jsontext.Decoder) (jsontext.Value, error) {
	switch kind := decoder.PeekKind(); kind {
	case jsontext.KindBeginObject, jsontext.KindBeginArray:
		return normalizeParts(decoder, kind == jsontext.KindBeginObject)
	case jsontext.KindString:
		token, err := decoder.ReadToken()
		if err != nil {
			return nil, err
		}
		return jsontext.AppendQuote(nil, token.String())
	}
	value, err := decoder.ReadValue()
	return slices.Clone(value), err // the decoder's own until its next call
}

// normalizeParts reads an object or an array.
func normalizeParts(decoder *jsontext.Decoder, isObject bool) (jsontext.Value, error) {
	if _, err := decoder.ReadToken(); err != nil {
		return nil, err
	}
	var names []string
	var values []jsontext.Value
	places := map[string]int{} // of names
	for kind := decoder.PeekKind(); kind != jsontext.KindEndObject && kind != jsontext.KindEndArray; kind = decoder.PeekKind() {
		at := len(values)
		if isObject {
			token, err := decoder.ReadToken()
			if err != nil {
				return nil, err
			}
			name := token.String()
			known := false
			if at, known = places[name]; !known {
				at = len(names)
				places[name] = at
				names = append(names, name)
			}
		}
		value, err := normalizeNext(decoder)
		if err != nil {
			return nil, err
		}
		if at == len(values) {
			values = append(values, value)
		} else {
			values[at] = value
		}
	}
	if _, err := decoder.ReadToken(); err != nil {
		return nil, err
	}
	open, end := byte('['), byte(']')
	if isObject {
		open, end = '{', '}'
	}
	out := jsontext.Value{open}
	for i, value := range values {
		if i > 0 {
			out = append(out, ',')
		}
		if isObject {
			var err error
			if out, err = jsontext.AppendQuote(out, names[i]); err != nil {
				return nil, err
			}
			out = append(out, ':')
		}
		out = append(out, value...)
	}
	return append(out, end), nil
}
