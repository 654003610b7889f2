// Package api contains the bodies of requests and answers, and errors in PocketBase's form, for
// everything that talks to clients: the routes, $notify, triggers and the command line.
package api

import (
	"bytes"
	"encoding/json/jsontext"
	"encoding/json/v2"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strings"

	validation "github.com/pocketbase/ozzo-validation/v4"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/router"

	"herald/notify"
)

const SendFailed = "Failed to send the message."

// ReadBody returns the body of a request. Other code, such as handlers that call RequestInfo, may
// read it again.
func ReadBody(e *core.RequestEvent) ([]byte, error) {
	body, err := io.ReadAll(e.Request.Body)
	if err != nil {
		// larger than PocketBase's body limit, or interrupted
		return nil, router.ToApiError(err)
	}
	if sound := SoundJSON(body); !bytes.Equal(sound, body) {
		e.Request.Body = &router.RereadableReadCloser{ReadCloser: io.NopCloser(bytes.NewReader(sound))}
		return sound, nil
	}
	if rereader, ok := e.Request.Body.(router.Rereader); ok {
		rereader.Reread() // maxBytesReader in PocketBase's apis stays at the end by itself
	}
	return body, nil
}

// SoundJSON returns raw normalized by [notify.NormalizeJSON]. If raw is not JSON even then,
// SoundJSON returns it unchanged, and Decode refuses it.
func SoundJSON(raw []byte) []byte {
	if jsontext.Value(raw).IsValid() {
		return raw
	}
	if normalized, err := notify.NormalizeJSON(raw); err == nil {
		return normalized
	}
	return raw
}

// Decode decodes JSON into dst. A member that dst does not have is an error: if `{"to": {"user":
// […]}}` were taken for "no restriction" because of the missing s, a message meant for one user
// would go to everyone. The error is ready to be answered; failed begins it.
func Decode(failed string, data []byte, dst any) error {
	err := json.Unmarshal(data, dst, json.RejectUnknownMembers(true))
	if err == nil {
		return nil
	}

	var syntax *jsontext.SyntacticError
	if errors.As(err, &syntax) {
		return router.NewBadRequestError("The request body is not valid JSON: "+
			strings.TrimPrefix(syntax.Error(), "jsontext: "), err)
	}
	var semantic *json.SemanticError
	if !errors.As(err, &semantic) || semantic.JSONPointer == "" {
		return router.NewBadRequestError(failed+" A JSON object is expected.", err)
	}
	fieldErr := validation.NewError("validation_invalid_value", "invalid value: expected "+kindOf(semantic.GoType))
	if errors.Is(err, json.ErrUnknownName) {
		fieldErr = validation.NewError("validation_unknown_field", "there is no such field")
	}
	return router.NewBadRequestError(failed, Nest(validation.Errors{}, fieldErr, slices.Collect(semantic.JSONPointer.Tokens())))
}

// kindOf names the kind of JSON value that is decoded into a t.
func kindOf(t reflect.Type) string {
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t == nil {
		return "another JSON type"
	}
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice, reflect.Array:
		return "a list"
	case reflect.Struct, reflect.Map:
		return "an object"
	case reflect.Int, reflect.Int64, reflect.Float64:
		return "a number"
	}
	return "another JSON type"
}

// InvalidField returns the name of the field that an error of [Decode] is about, such as "to.user",
// or "".
func InvalidField(err error) string {
	var path []string
	for fields := router.ToApiError(err).Data; len(fields) == 1; {
		for name, value := range fields {
			path = append(path, name)
			fields, _ = value.(map[string]any)
		}
	}
	return strings.Join(path, ".")
}

// ErrEmptyAudience is for an audience, or a part of one, that is present but empty.
var ErrEmptyAudience = validation.NewError("validation_invalid_audience",
	"must not be empty: leave it out to narrow nothing; [] matches nobody")

// CheckNarrows refuses an audience that is present but empty: null, an empty object or an empty
// text. Such a value comes from an unset variable, and a message meant for one user would go to
// everyone. (An empty list matches nobody.) raw is the JSON of an object that has the fields.
func CheckNarrows(raw []byte, fields ...string) error {
	var object map[string]jsontext.Value
	if json.Unmarshal(raw, &object) != nil {
		return nil // Decode reports it
	}
	errs := validation.Errors{}
	for _, field := range fields {
		value, ok := object[field]
		if !ok {
			continue
		}
		if isEmptyValue(value) {
			Nest(errs, ErrEmptyAudience, []string{field})
			continue
		}
		var parts map[string]jsontext.Value
		if json.Unmarshal(value, &parts) != nil {
			continue // not an object: a list of users is a valid audience, too
		}
		for name, part := range parts {
			if isEmptyValue(part) {
				Nest(errs, ErrEmptyAudience, []string{field, name})
			}
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return router.NewBadRequestError(SendFailed, errs)
}

// isEmptyValue reports whether value is null, {} or a blank text.
func isEmptyValue(value jsontext.Value) bool {
	switch value.Kind() {
	case jsontext.KindNull:
		return true
	case jsontext.KindString:
		var text string
		return json.Unmarshal(value, &text) == nil && strings.TrimSpace(text) == ""
	case jsontext.KindBeginObject:
		var object map[string]jsontext.Value
		return json.Unmarshal(value, &object) == nil && len(object) == 0
	}
	return false
}

// DecodeMessage is Decode for the JSON of a message.
func DecodeMessage(raw []byte, dst any) error {
	if err := CheckNarrows(raw, "to", "except"); err != nil {
		return err
	}
	return Decode(SendFailed, raw, dst)
}

// FieldsError turns notify.Errors into PocketBase's form, with the invalid fields in data. Any
// other error is a server error.
func FieldsError(message string, err error) *router.ApiError {
	if errors.Is(err, notify.ErrShutdown) {
		return router.NewApiError(http.StatusServiceUnavailable, message+" The server is shutting down.", nil)
	}
	if errors.Is(err, notify.ErrHistory) {
		return router.NewApiError(http.StatusServiceUnavailable, message+" The history is not available.", err)
	}
	var fieldErrs notify.Errors
	if !errors.As(err, &fieldErrs) {
		return router.NewInternalServerError(message, err)
	}
	status := http.StatusBadRequest
	data := validation.Errors{}
	for _, fieldErr := range fieldErrs {
		if errors.Is(fieldErr, notify.ErrTooLarge) {
			status = http.StatusRequestEntityTooLarge
		}
		Nest(data, validation.NewError(fieldErr.Code(), fieldErr.Detail), strings.Split(fieldErr.Field, "."))
	}
	return router.NewApiError(status, message, data)
}

// Result is the answer for one part of a request that has many, as in PocketBase's own /api/batch.
type Result struct {
	Status int `json:"status"`
	Body   any `json:"body"`
}

// CheckCount refuses a request with no part in a field, or with more than most. failed begins the
// error, which is ready to be answered.
func CheckCount(failed, field string, count, most int) error {
	switch {
	case count == 0:
		return router.NewBadRequestError(failed, validation.Errors{field: validation.NewError("validation_required", "cannot be blank")})
	case count > most:
		return router.NewBadRequestError(failed, validation.Errors{
			field: validation.NewError("validation_length_too_long", fmt.Sprintf("the length must be no more than %d", most)),
		})
	}
	return nil
}

// InField moves the fields of an answer below path: "topic" becomes "messages.3.topic".
func InField(err error, path ...string) *router.ApiError {
	apiErr := router.ToApiError(err)
	if len(apiErr.Data) == 0 {
		apiErr.Data = map[string]any{"code": "validation_invalid_value", "message": apiErr.Message}
	}
	for i := len(path) - 1; i >= 0; i-- {
		apiErr.Data = map[string]any{path[i]: apiErr.Data}
	}
	return apiErr
}

// Nest puts err into errs at path and returns errs.
func Nest(errs validation.Errors, err error, path []string) validation.Errors {
	if len(path) == 1 {
		errs[path[0]] = err
		return errs
	}
	inner, ok := errs[path[0]].(validation.Errors)
	if !ok {
		inner = validation.Errors{}
		errs[path[0]] = inner
	}
	Nest(inner, err, path[1:])
	return errs
}

// FieldMessages lists the errors in the data of an answer, below path: "to.filter: …".
func FieldMessages(path string, data any) (messages []string) {
	fields, _ := data.(map[string]any)
	if message, ok := fields["message"].(string); ok && path != "" {
		return []string{path + ": " + message}
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		messages = append(messages, FieldMessages(strings.TrimPrefix(path+"."+name, "."), fields[name])...)
	}
	return messages
}
