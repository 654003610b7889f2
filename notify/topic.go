// Topics and subscription keys: which names are valid and which are reserved. Called by message.go
// and the fan-out.

package notify

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/pocketbase/pocketbase/core"
)

// MaxTopicLength is the maximum length of a topic in bytes.
const MaxTopicLength = 255

// checkTopic reports what makes topic unfit for a custom message.
//
// It refuses line breaks along with the other control characters, because a line break in the event
// field of an SSE frame would start a frame of the sender's making (WHATWG HTML, 9.2.6
// "Interpreting an event stream").
func (n *Notifier) checkTopic(topic string, system bool) *FieldError {
	const field = "topic"
	switch {
	case topic == "":
		return invalid(field, ErrRequired, "cannot be blank")
	case len(topic) > MaxTopicLength:
		return invalid(field, ErrInvalidTopic, "must be no longer than %d bytes, has %d", MaxTopicLength, len(topic))
	case !utf8.ValidString(topic):
		return invalid(field, ErrInvalidTopic, "must be valid UTF-8")
	case strings.ContainsFunc(topic, unicode.IsControl):
		return invalid(field, ErrInvalidTopic, "%q must not contain control characters", topic)
	case strings.Contains(topic, "?"):
		return invalid(field, ErrInvalidTopic, `%q must not contain "?", which begins a subscription's options`, topic)
	}
	if system {
		return nil
	}
	if reason := n.reserved(topic); reason != "" {
		return invalid(field, ErrReservedTopic, "%q is reserved %s", topic, reason)
	}
	return nil
}

// reserved returns what topic is reserved for, or "" if any permitted sender can use it. Reserved
// are the topics on which clients expect events of the server itself: a custom message there would
// pass for one of the server's events.
func (n *Notifier) reserved(topic string) string {
	if topic[0] == '@' {
		return "for system messages"
	}
	if topic == connectName {
		return "for PocketBase's connect event"
	}

	// the topics of record events: see subscriptionRuleMap in PocketBase's
	// apis/realtime.go
	name, id, hasID := strings.Cut(topic, "/")
	collection, err := n.app.FindCachedCollectionByNameOrId(name)
	if err != nil {
		return ""
	}
	if !hasID || id == "*" || canBeRecordID(collection, id) {
		return fmt.Sprintf("for the record events of collection %q", collection.Name)
	}
	return ""
}

// canBeRecordID reports whether a record of collection could have the id, now or later. An
// application with a collection "chat" can still use the topic "chat/42", because no record id is
// that short.
func canBeRecordID(collection *core.Collection, id string) bool {
	field, ok := collection.Fields.GetByName(core.FieldNameId).(*core.TextField)
	if !ok {
		return true
	}
	return field.ValidatePlainValue(id) == nil
}
