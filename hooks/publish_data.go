// A client's published data in a form that handlers can change: lists that JavaScript can change in
// place, and numbers that stay as exact as received.

package hooks

import (
	"encoding/json/jsontext"
	"encoding/json/v2"
	"errors"
	"strconv"

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
	return json.Marshal(withNumbers(from, to), json.Deterministic(true))
}

// withNumbers is keepNumbers for decoded values; it changes to.
func withNumbers(from, to any) any {
	switch to := to.(type) {
	case map[string]any:
		from, _ := from.(map[string]any)
		for name, value := range to {
			to[name] = withNumbers(from[name], value)
		}
	case []any:
		from, _ := from.([]any)
		for i := range min(len(from), len(to)) {
			to[i] = withNumbers(from[i], to[i])
		}
	case jsontext.Value:
		number, ok := from.(jsontext.Value)
		if ok && float(number) == float(to) {
			return number
		}
	}
	return to
}

func float(number jsontext.Value) float64 {
	f, _ := strconv.ParseFloat(string(number), 64)
	return f
}
