// The errors of a message. The checks in message.go, topic.go, audience.go and filter.go create
// them; hooks/internal/api turns them into answers.

package notify

import (
	"errors"
	"fmt"
	"strings"

	"herald/notify/internal/history"
)

// The kinds of errors of a message, for errors.Is. Each has the stable code that the HTTP API
// answers with.
var (
	ErrRequired        error = &kind{"validation_required", "a required field is missing"}
	ErrInvalidTopic    error = &kind{"validation_invalid_topic", "invalid topic"}
	ErrReservedTopic   error = &kind{"validation_reserved_topic", "reserved topic"}
	ErrInvalidData     error = &kind{"validation_invalid_json", "data is not JSON"}
	ErrTooLarge        error = &kind{"validation_too_large", "message too large"}
	ErrInvalidID       error = &kind{"validation_invalid_id", "invalid message id"}
	ErrInvalidAudience error = &kind{"validation_invalid_audience", "invalid audience"}
	ErrInvalidFilter   error = &kind{"validation_invalid_filter", "invalid filter"}
	ErrInvalidClient   error = &kind{"validation_invalid_client", "invalid client id"}
	ErrInvalidPattern  error = &kind{"validation_invalid_pattern", "invalid pattern"}
	ErrInvalidStart    error = &kind{"validation_invalid_position", "invalid position"}
	ErrOutOfRange      error = &kind{"validation_out_of_range", "out of range"}
	ErrInvalidFields   error = &kind{"validation_invalid_fields", "invalid fields"}
	ErrInvalidRule     error = &kind{"validation_invalid_rule", "invalid rule"}
	ErrNoPresence      error = &kind{"validation_no_presence", "no presence"}
)

// ErrGuest refuses what only signed-in users can do.
var ErrGuest = errors.New("guests are only counted")

// ErrForbidden refuses a client's message. It is the same whether a rule, a reserved name or a
// missing channel forbids the message.
var ErrForbidden = errors.New("not allowed to publish to this topic")

// ErrShutdown refuses a message because the server is stopping. A retry reaches its successor.
var ErrShutdown = history.ErrClosed

// ErrHistory refuses a message, or a request for missed ones, because the history cannot be written
// or read, for example because the disk is full. The refused message reached nobody. A retry may
// succeed.
var ErrHistory = history.ErrUnavailable

// kind is the comparable identity behind the exported Err… values.
type kind struct{ code, text string }

func (k *kind) Error() string { return k.text }

// FieldError says which field of a [Message] is wrong and why.
type FieldError struct {
	// Field is the JSON path of the field: "topic", "to.filter", "to.users.2".
	Field string
	// Detail is a sentence without its subject, such as `must not contain "?"`.
	Detail string

	kind *kind
}

func invalid(field string, err error, format string, args ...any) *FieldError {
	return &FieldError{Field: field, Detail: fmt.Sprintf(format, args...), kind: err.(*kind)}
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Detail }

// Unwrap returns the Err… value of this package for this kind of error.
func (e *FieldError) Unwrap() error { return e.kind }

// Code returns the stable code of this kind of error, e.g. "validation_invalid_topic".
func (e *FieldError) Code() string { return e.kind.code }

// Errors lists every field that is wrong with one message. [Notifier.Send] returns it when it
// refuses a message; nothing of that message was sent.
type Errors []*FieldError

func (e Errors) Error() string {
	parts := make([]string, len(e))
	for i, fieldErr := range e {
		parts[i] = fieldErr.Error()
	}
	return "invalid message: " + strings.Join(parts, "; ")
}

// Unwrap makes errors.Is find the kinds of all fields.
func (e Errors) Unwrap() []error {
	errs := make([]error, len(e))
	for i, fieldErr := range e {
		errs[i] = fieldErr
	}
	return errs
}

// add appends err unless it is nil.
func (e *Errors) add(err *FieldError) {
	if err != nil {
		*e = append(*e, err)
	}
}
