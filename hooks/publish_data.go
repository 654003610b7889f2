// A client's published data in a form that handlers can change: lists that JavaScript can change in
// place, and numbers that stay as exact as received.

package hooks

import (
	"encoding/json/jsontext"
	"encoding/json/v2"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/pocketbase/pocketbase/tools/hook"
)

// jsPublishHook is [OnPublish] for pb_hooks.
type jsPublishHook struct{ hook *hook.Hook[*PublishEvent] }

// BindFunc is called by the jsvm plugin, by name.
func (h jsPublishHook) BindFunc(handler func(e *PublishEvent) error) string {
	return h.hook.BindFunc(func(e *PublishEvent) error {
		e.Data = growable(e.Data)
		e.inJS = true
		return handler(e)
	})
}

// Next calls the next handler.
func (e *PublishEvent) Next() error {
	if e.inJS {
		e.Data = plain(e.Data)
		e.inJS = false
	}
	return e.Event.Next()
}

// growable replaces each []any in data with a *[]any. In goja, push changes a *[]any, but has no
// effect on a []any.
func growable(data any) any {
	switch data := data.(type) {
	case map[string]any:
		for name, value := range data {
			data[name] = growable(value)
		}
	case []any:
		for i, value := range data {
			data[i] = growable(value)
		}
		return &data
	}
	return data
}

// plain undoes growable.
func plain(data any) any {
	switch data := data.(type) {
	case map[string]any:
		for name, value := range data {
			data[name] = plain(value)
		}
	case *[]any:
		return plain(*data)
	case []any:
		for i, value := range data {
			data[i] = plain(value)
		}
	}
	return data
}

// keepNumbers returns changed with the numbers of original that are equal as float64. Handlers see
// float64, so changing one value would round large integers beside it.
func keepNumbers(original, changed jsontext.Value) (jsontext.Value, error) {
	var from, to any
	exact := json.WithUnmarshalers(json.UnmarshalFromFunc(func(decoder *jsontext.Decoder, value *any) error {
		if decoder.PeekKind() == jsontext.KindNumber {
			*value = jsontext.Value(nil)
		}
		return errors.ErrUnsupported // continue in the usual way
	}))
	if err := errors.Join(json.Unmarshal(original, &from, exact), json.Unmarshal(changed, &to, exact)); err != nil {
		return nil, err
	}
	n := longNumbers{all: map[float64]jsontext.Value{}, moved: map[float64][]jsontext.Value{}}
	to = n.inPlace(from, to)
	return json.Marshal(n.elsewhere(to, n.all), json.Deterministic(true))
}

// longNumbers holds the integers of the original that a float64 may round, by that float64.
type longNumbers struct {
	all   map[float64]jsontext.Value
	moved map[float64][]jsontext.Value // those that are not found in their place, in order
}

// keptNumber is a number as the original has it.
type keptNumber struct{ jsontext.Value }

// inPlace returns to with the numbers of from that are still in their place. In a list of another
// length they have an order, but no places.
func (n longNumbers) inPlace(from, to any) any {
	switch from := from.(type) {
	case map[string]any:
		to, _ := to.(map[string]any)
		for _, name := range slices.Sorted(maps.Keys(from)) {
			if value := n.inPlace(from[name], to[name]); to[name] != nil {
				to[name] = value
			}
		}
	case []any:
		list, isList := to.([]any)
		switch {
		case isList && len(list) == len(from):
			for i, value := range from {
				list[i] = n.inPlace(value, list[i])
			}
		case isList:
			own := longNumbers{all: n.all, moved: map[float64][]jsontext.Value{}}
			for _, value := range from {
				own.inPlace(value, nil)
			}
			to = own.elsewhere(to, nil)
			for f, moved := range own.moved {
				n.moved[f] = append(n.moved[f], moved...)
			}
		default:
			for _, value := range from {
				n.inPlace(value, nil)
			}
		}
	case jsontext.Value:
		f, isLong := float(from), isLongInteger(from)
		if isLong {
			n.all[f] = from
		}
		if to, ok := to.(jsontext.Value); ok && isUnchanged(to, f) {
			return keptNumber{from}
		}
		if isLong {
			n.moved[f] = append(n.moved[f], from)
		}
	}
	return to
}

// elsewhere returns to with the numbers that were moved, or are copies of those in all.
func (n longNumbers) elsewhere(to any, all map[float64]jsontext.Value) any {
	switch to := to.(type) {
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(to)) {
			to[name] = n.elsewhere(to[name], all)
		}
	case []any:
		for i, value := range to {
			to[i] = n.elsewhere(value, all)
		}
	case jsontext.Value:
		f := float(to)
		if !isUnchanged(to, f) {
			return to
		}
		if moved := n.moved[f]; len(moved) > 0 {
			n.moved[f] = moved[1:]
			return keptNumber{moved[0]}
		}
		if number, ok := all[f]; ok {
			return keptNumber{number}
		}
	}
	return to
}

// isLongInteger reports whether number is an integer that a float64, which holds 15 digits, may be unable to tell
// from others. It leaves out those with many more digits than ids of 64 bits have: one of them might be put in the
// places of many numbers, which would make a large message of a small one.
func isLongInteger(number jsontext.Value) bool {
	return len(number) > 15 && len(number) <= 24 && !strings.ContainsAny(string(number), ".eE")
}

// isUnchanged reports whether number is what a handler leaves of one that is f. One that is not may be
// an exact integer of the handler's own.
func isUnchanged(number jsontext.Value, f float64) bool { return string(number) == string(shortest(f)) }

// shortest returns f as JSON.
func shortest(f float64) jsontext.Value {
	text, _ := json.Marshal(f) // fails for infinities, which no data has
	return text
}

func float(number jsontext.Value) float64 {
	f, _ := strconv.ParseFloat(string(number), 64)
	return f
}
