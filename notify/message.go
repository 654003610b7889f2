// A message, and the checks and the encoding before it is sent. Called by send.go.

package notify

import (
	"encoding/json/jsontext"
	"encoding/json/v2"
	"errors"
	"strings"
	"time"
	"unicode"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/types"

	"herald/notify/internal/history"
)

// Message is one custom message.
type Message struct {
	// Topic is the name that clients subscribe to, 1 to [MaxTopicLength] bytes.
	Topic string

	// Data reaches the callback of each subscriber unchanged. It is any value that encoding/json/v2
	// marshals, or a jsontext.Value with JSON that is already encoded. It is encoded once.
	Data any

	// To narrows the subscribers of the topic. The zero value narrows nothing.
	To Audience

	// Except leaves subscribers out.
	Except Except

	// ID makes a retry safe. A message with the ID of one sent within Config.IDWindow is not sent
	// again and gets the Report of the first. At most 255 bytes of printable characters; generated
	// if empty.
	ID string
}

// Report counts what happened to a message. It counts connections: a user with three tabs counts
// three times, a tab that subscribed to the topic twice counts once.
type Report struct {
	ID    string `json:"id"`
	Topic string `json:"topic"`
	// Matched is the number of connections that the message was meant for, the sum of Queued and
	// Dropped.
	Matched int `json:"matched"`
	// Queued is the number of connections that took the message into their queue.
	Queued int `json:"queued"`
	// Dropped is the number of connections whose queue was full. They were disconnected for it.
	Dropped int `json:"dropped"`
	// Epoch and Seq are the message's place in the topic's history; both are empty if the topic has
	// none. If the message is not sent again because it was stored before this process started, the
	// other counts are unknown.
	Epoch string `json:"epoch,omitzero"`
	Seq   int64  `json:"seq,omitzero"`
}

// publication is a checked message, ready for the fan-out.
type publication struct {
	// Data is compact JSON. All recipients share it, and nobody writes to it. If the topic has
	// history, Sender and Audience hold the two fields below as they are stored, and Epoch and Seq
	// are set.
	history.Entry

	sender userRef // the auth record that published it; zero for the server or a guest
	from   string  // the sender as others see it, "users:ID"
	to     *audience
}

// envelope is a message with its metadata, for subscribers that ask for it.
type envelope struct {
	ID    string         `json:"id"`
	Topic string         `json:"topic"`
	Epoch string         `json:"epoch"`
	Seq   int64          `json:"seq"`
	Time  types.DateTime `json:"time"`
	From  *string        `json:"from"`
	Data  jsontext.Value `json:"data"`
	Gap   bool           `json:"gap,omitzero"`
}

// envelope returns the message as JSON in its envelope. gap says that messages before it may be
// missing.
func (p *publication) envelope(gap bool) ([]byte, error) {
	e := envelope{ID: p.ID, Topic: p.Topic, Epoch: p.Epoch, Seq: p.Seq, Data: p.Data, Gap: gap}
	if p.from != "" {
		e.From = &p.from
	}
	var err error
	if e.Time, err = types.ParseDateTime(p.Time); err != nil {
		return nil, err
	}
	return json.Marshal(e, jsontext.PreserveRawStrings(true))
}

// check checks msg and encodes its data. The error is of type [Errors] and names every field that
// is wrong. System messages may use reserved topics.
func (n *Notifier) check(msg Message, system bool) (*publication, error) {
	var errs Errors

	errs.add(n.checkTopic(msg.Topic, system))

	data, err := n.encode(msg.Data)
	errs.add(err)

	to, audienceErrs := n.compile(msg.To, msg.Except)
	errs = append(errs, audienceErrs...)

	if len(errs) > 0 {
		return nil, errs
	}

	id := msg.ID
	if id == "" {
		id = core.GenerateDefaultRandomId()
	}
	return &publication{Entry: history.Entry{ID: id, Topic: msg.Topic, Time: time.Now(), Data: data}, to: to}, nil
}

// encode returns data as compact JSON. It has no line breaks, since one would end the data field of
// the SSE frame. JSON that is already encoded keeps its numbers, its strings and the order of its
// names.
func (n *Notifier) encode(data any) ([]byte, *FieldError) {
	const field = "data"
	if raw, ok := data.(jsontext.Value); ok && len(raw) == 0 {
		return nil, invalid(field, ErrRequired, "cannot be blank")
	}
	// Deterministic sorts map keys; otherwise the same message would look different at every send
	encoded, err := json.Marshal(data, json.Deterministic(true), jsontext.PreserveRawStrings(true))
	if err != nil {
		encoded, err = encodeLeniently(data)
	}
	if err != nil {
		return nil, invalid(field, ErrInvalidData, "must be JSON: %s", jsonReason(err))
	}
	if len(encoded) > n.config.MaxSize {
		return nil, invalid(field, ErrTooLarge, "must be no larger than %d bytes, has %d", n.config.MaxSize, len(encoded))
	}
	return encoded, nil
}

// encodeLeniently is for data that is invalid JSON only because of half an emoji or a duplicate
// name.
func encodeLeniently(data any) ([]byte, error) {
	encoded, err := json.Marshal(data, json.Deterministic(true), jsontext.AllowInvalidUTF8(true), jsontext.AllowDuplicateNames(true))
	if err != nil {
		return nil, err
	}
	return NormalizeJSON(encoded)
}

// jsonReason returns the cause of a JSON error without the names of Go types.
func jsonReason(err error) string {
	var semantic *json.SemanticError
	if errors.As(err, &semantic) && semantic.Err != nil {
		return semantic.Err.Error()
	}
	return err.Error()
}

// checkID reports what is wrong with the id that a sender gave its message.
func checkID(id string) *FieldError {
	const field, maxLength = "id", 255
	if len(id) > maxLength {
		return invalid(field, ErrInvalidID, "must be no longer than %d bytes, has %d", maxLength, len(id))
	}
	if strings.ContainsFunc(id, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return invalid(field, ErrInvalidID, "must contain printable characters only")
	}
	return nil
}
