// $notify: the engine in pb_hooks and JavaScript migrations.

package hooks

import (
	"context"
	_ "embed"
	"encoding/json/v2"
	"errors"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"github.com/dop251/goja"
	validation "github.com/pocketbase/ozzo-validation/v4"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/plugins/jsvm"
	"github.com/pocketbase/pocketbase/tools/hook"
	"github.com/pocketbase/pocketbase/tools/router"

	"herald/hooks/internal/api"
	"herald/notify"
)

// jsTypes are the types, for editors, of what Herald adds to pb_hooks.
//
//go:embed herald_hooks.d.ts
var jsTypes []byte

// jsTypesName is the file that they are written to, beside PocketBase's own types.d.ts.
const jsTypesName = "herald.d.ts"

// bindJS registers PocketBase's jsvm plugin for app, with onNotifyPublish, onNotifyPresence and $notify in each of
// its runtimes. It writes the types into the data directory when the server starts.
func bindJS(app core.App, config jsvm.Config) error {
	app.OnServe().Bind(&hook.Handler[*core.ServeEvent]{
		Id: "heraldTypes",
		Func: func(e *core.ServeEvent) error {
			if err := os.WriteFile(filepath.Join(e.App.DataDir(), jsTypesName), jsTypes, 0o644); err != nil {
				e.App.Logger().Warn("Failed to write the types of $notify", slog.String("error", err.Error()))
			}
			return e.Next()
		},
	})
	onInit := config.OnInit
	config.OnInit = func(vm *goja.Runtime) {
		_ = vm.Set("$notify", jsNotify{app, vm}.object()) // cannot fail in a new runtime
		if onInit != nil {
			onInit(vm)
		}
	}
	return jsvm.Register(newJSApp(app), config)
}

// jsNotify is $notify in one runtime.
type jsNotify struct {
	app core.App
	vm  *goja.Runtime
}

func (j jsNotify) notifier() *notify.Notifier { return notify.New(j.app, notify.Config{}) }

func (j jsNotify) object() map[string]func(goja.FunctionCall) goja.Value {
	return map[string]func(goja.FunctionCall) goja.Value{
		"send": func(call goja.FunctionCall) goja.Value {
			var body api.Message
			j.checkDefined(call.Argument(0))
			j.check(api.DecodeMessage(j.encode(call.Argument(0)), &body))
			report, err := j.notifier().Send(context.Background(), body.Notify())
			j.check(err)
			return j.value(report)
		},
		"topics": func(goja.FunctionCall) goja.Value { return j.value(j.notifier().Topics()) },
		"clients": func(call goja.FunctionCall) goja.Value {
			var filter struct {
				Topic string `json:"topic"`
				User  string `json:"user"`
			}
			if !goja.IsUndefined(call.Argument(0)) {
				j.decode(call.Argument(0), &filter)
			}
			connections, err := j.notifier().Connections(notify.ConnectionFilter(filter))
			j.check(err)
			return j.value(api.Clients(connections))
		},
		"presence": func(call goja.FunctionCall) goja.Value {
			return j.value(j.notifier().Presence(j.text(call.Argument(0)), "", notify.MaxPresencePage))
		},
		"online": func(call goja.FunctionCall) goja.Value {
			return j.vm.ToValue(j.notifier().Online(j.text(call.Argument(0))))
		},
		"disconnect": func(call goja.FunctionCall) goja.Value {
			if id, ok := call.Argument(0).Export().(string); ok {
				if j.notifier().Disconnect(id) {
					return j.vm.ToValue(1)
				}
				return j.vm.ToValue(0)
			}
			var filter struct {
				User string `json:"user"`
			}
			j.decode(call.Argument(0), &filter)
			count, err := j.notifier().DisconnectUser(filter.User)
			j.check(err)
			return j.vm.ToValue(count)
		},
	}
}

// text returns an argument that must be a text.
func (j jsNotify) text(argument goja.Value) string {
	text, ok := argument.Export().(string)
	if !ok {
		panic(j.vm.NewTypeError("$notify: a text is expected"))
	}
	return text
}

// decode decodes an argument like the body of a request. It throws the errors that the API would
// answer.
func (j jsNotify) decode(argument goja.Value, dst any) {
	j.check(api.Decode("Wrong arguments.", j.encode(argument), dst))
}

// encode returns an argument as JSON. JSON.stringify alone turns raw JSON that Go keeps (a record's
// JSON field, as it is or in publicExport) into arrays of bytes.
func (j jsNotify) encode(argument goja.Value) []byte {
	text, err := j.call("stringify", argument, j.vm.ToValue(func(call goja.FunctionCall) goja.Value {
		value := call.Argument(1)
		if raw, ok := rawJSON(value); ok {
			parsed, err := j.call("parse", j.vm.ToValue(raw))
			if err != nil {
				panic(j.vm.NewTypeError(err.Error()))
			}
			return parsed
		}
		return value
	}))
	if err != nil {
		panic(j.vm.NewTypeError(err.Error()))
	}
	if goja.IsUndefined(text) {
		panic(j.vm.NewTypeError("$notify: an object is expected"))
	}
	return api.SoundJSON([]byte(text.String()))
}

// rawJSON returns the text of a value that is JSON kept as bytes in Go: types.JSONRaw,
// json.RawMessage, jsontext.Value.
func rawJSON(value goja.Value) (string, bool) {
	if t := value.ExportType(); t == nil || t.Kind() != reflect.Slice || t.Elem().Kind() != reflect.Uint8 {
		return "", false
	}
	marshaler, ok := value.Export().(json.Marshaler)
	if !ok {
		return "", false
	}
	raw, err := marshaler.MarshalJSON()
	return string(raw), err == nil
}

// checkDefined throws if an audience contains undefined, a function (not called by mistake) or a
// symbol. JSON.stringify omits them, and what remains would be everyone.
func (j jsNotify) checkDefined(message goja.Value) {
	errs := validation.Errors{}
	for name, value := range members(message) {
		if name != "to" && name != "except" {
			continue
		}
		if isLeftOut(value) {
			api.Nest(errs, api.ErrEmptyAudience, []string{name})
			continue
		}
		for part, value := range members(value) {
			if isLeftOut(value) {
				api.Nest(errs, api.ErrEmptyAudience, []string{name, part})
			}
		}
	}
	if len(errs) > 0 {
		j.check(router.NewBadRequestError(api.SendFailed, errs))
	}
}

// isLeftOut reports whether JSON.stringify omits a member with the value.
func isLeftOut(value goja.Value) bool {
	_, isFunction := goja.AssertFunction(value)
	_, isSymbol := value.(*goja.Symbol)
	return goja.IsUndefined(value) || isFunction || isSymbol
}

// members ranges over the properties of a value that is an object.
func members(value goja.Value) iter.Seq2[string, goja.Value] {
	return func(yield func(string, goja.Value) bool) {
		object, ok := value.(*goja.Object)
		if !ok {
			return
		}
		for _, name := range object.Keys() {
			if !yield(name, object.Get(name)) {
				return
			}
		}
	}
}

// value converts v to JavaScript by way of its JSON.
func (j jsNotify) value(v any) goja.Value {
	encoded, err := json.Marshal(v)
	j.check(err)
	value, err := j.call("parse", j.vm.ToValue(string(encoded)))
	j.check(err)
	return value
}

// call calls a function of the runtime's JSON object.
func (j jsNotify) call(name string, arguments ...goja.Value) (goja.Value, error) {
	object := j.vm.Get("JSON").ToObject(j.vm)
	f, ok := goja.AssertFunction(object.Get(name))
	if !ok {
		return nil, errors.New("JSON." + name + " is not a function")
	}
	return f(object, arguments...)
}

// check throws err, unless it is nil, as an Error. Its message names the fields, and its data
// contains them as an HTTP answer would.
func (j jsNotify) check(err error) {
	if err == nil {
		return
	}
	var apiErr *router.ApiError
	if !errors.As(err, &apiErr) {
		apiErr = api.FieldsError(api.SendFailed, err)
	}
	message := apiErr.Message
	var data any // as it would be sent over HTTP
	if encoded, err := json.Marshal(apiErr.Data); err == nil {
		_ = json.Unmarshal(encoded, &data)
	}
	if fields := api.FieldMessages("", data); len(fields) > 0 {
		message = strings.Join(fields, "; ")
	} else if apiErr.Status >= 500 {
		message += " " + err.Error()
	}
	thrown, newErr := j.vm.New(j.vm.Get("Error"), j.vm.ToValue("$notify: "+message))
	if newErr != nil {
		panic(j.vm.NewGoError(err))
	}
	_ = thrown.Set("data", data)
	_ = thrown.Set("status", apiErr.Status)
	panic(thrown)
}
