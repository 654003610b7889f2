// Parsing of requests, and errors in PocketBase's form. Called by routes.go.

package hooks

import (
	"encoding/json/jsontext"
	"encoding/json/v2"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"

	validation "github.com/pocketbase/ozzo-validation/v4"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/router"

	"herald/notify"
)

const sendFailed = "Failed to send the message."

// readBody returns the body of a request; others, such as handlers that call
// RequestInfo, may read it again.
func readBody(e *core.RequestEvent) ([]byte, error) {
	body, err := io.ReadAll(e.Request.Body)
	if err != nil {
		// too large for PocketBase's body limit, or broken off
		return nil, router.ToApiError(err)
	}
	if rereader, ok := e.Request.Body.(router.Rereader); ok {
		rereader.Reread() // maxBytesReader in PocketBase's apis stays at the end by itself
	}
	return body, nil
}

// decode reads JSON into dst. A member that dst does not have is an error: were
// `{"to": {"user": […]}}` taken for "no restriction" because of the missing s,
// a message meant for one would go to all.
func decode(data []byte, dst any, options ...json.Options) error {
	err := json.Unmarshal(data, dst, append(options, json.RejectUnknownMembers(true))...)
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
		return router.NewBadRequestError("The message must be a JSON object.", err)
	}
	fieldErr := validation.NewError("validation_invalid_value", "invalid value: expected another JSON type")
	if errors.Is(err, json.ErrUnknownName) {
		fieldErr = validation.NewError("validation_unknown_field", "there is no such field")
	}
	return router.NewBadRequestError(sendFailed, nest(validation.Errors{}, fieldErr, slices.Collect(semantic.JSONPointer.Tokens())))
}

// fieldsError turns notify.Errors into PocketBase's form, with the fields at
// fault in data; any other error is the server's.
func fieldsError(message string, err error) *router.ApiError {
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
		nest(data, validation.NewError(fieldErr.Code(), fieldErr.Detail), strings.Split(fieldErr.Field, "."))
	}
	return router.NewApiError(status, message, data)
}

// inField moves the fields of an answer below path: "topic" to "messages.3.topic".
func inField(err error, path ...string) *router.ApiError {
	apiErr := router.ToApiError(err)
	if len(apiErr.Data) == 0 {
		apiErr.Data = map[string]any{"code": "validation_invalid_value", "message": apiErr.Message}
	}
	for i := len(path) - 1; i >= 0; i-- {
		apiErr.Data = map[string]any{path[i]: apiErr.Data}
	}
	return apiErr
}

// nest puts err into errs at path and returns errs.
func nest(errs validation.Errors, err error, path []string) validation.Errors {
	if len(path) == 1 {
		errs[path[0]] = err
		return errs
	}
	inner, ok := errs[path[0]].(validation.Errors)
	if !ok {
		inner = validation.Errors{}
		errs[path[0]] = inner
	}
	nest(inner, err, path[1:])
	return errs
}
