// Presence in pb_hooks: onNotifyPresence.

package hooks

import (
	"encoding/json/v2"

	"github.com/pocketbase/pocketbase/tools/hook"

	"herald/notify"
)

// jsPresenceEvent is a [PresenceEvent] whose JSON is decoded, as JavaScript wants it.
type jsPresenceEvent struct {
	event *PresenceEvent

	Topic         string
	Join, Update  []map[string]any
	Leave         []string
	Total, Guests int
}

// Next calls the next handler.
func (e *jsPresenceEvent) Next() error { return e.event.Next() }

// jsPresenceHook is [OnPresence] for pb_hooks.
type jsPresenceHook struct{ hook *hook.Hook[*PresenceEvent] }

// BindFunc is called by the jsvm plugin, by name.
func (h jsPresenceHook) BindFunc(handler func(e *jsPresenceEvent) error) string {
	return h.hook.BindFunc(func(e *PresenceEvent) error {
		return handler(&jsPresenceEvent{e, e.Topic, decodeMembers(e.Join), decodeMembers(e.Update), e.Leave, e.Total, e.Guests})
	})
}

func decodeMembers(members []notify.PresenceMember) []map[string]any {
	decoded := make([]map[string]any, len(members))
	for i, member := range members {
		encoded, err := json.Marshal(member)
		if err == nil {
			_ = json.Unmarshal(encoded, &decoded[i]) // what was just encoded
		}
	}
	return decoded
}
