// What a user changes about how they are shown. Called by hooks/presence.go.

package notify

import (
	"encoding/json/jsontext"
	"time"
)

// PresenceUpdate is what a user changes about how they are shown on a topic. A nil part stays as it
// is.
type PresenceUpdate struct {
	// Meta is any JSON of at most Config.MaxMeta bytes; null removes it.
	Meta *jsontext.Value
	// Visible false keeps the user out of the list, while they go on listening.
	Visible *bool
	// ClientID is the connection that this comes from. It counts as present again if it had left, or
	// not renewed in time. Empty means all of the user's, but for those that have left.
	ClientID string
}

// SetPresence changes how p is shown on topic. If p is not subscribed yet, the change is kept for a
// moment, for when they are. Guests are only counted: all that they can do is to let a connection
// count again. The error is of type [Errors], with the fields "topic", "meta" and "clientId",
// [ErrForbidden], [ErrGuest], a [*TooManyError], or comes from a query.
func (n *Notifier) SetPresence(p Publisher, topic string, update PresenceUpdate) error {
	settings, err := n.checkPresence(p, topic)
	if err != nil {
		return err
	}
	if p.Auth == nil && (update.Meta != nil || update.Visible != nil) {
		return ErrGuest
	}
	if update.Meta != nil {
		if err := n.checkMeta(*update.Meta); err != nil {
			return Errors{err}
		}
	}
	clients, err := n.attendeesOf(p, update.ClientID)
	if err != nil {
		return err
	}
	if update.Meta != nil || update.Visible != nil {
		if wait := n.buckets.take(bucketKey{"presence " + settings.channelID, p.key()}, metaRate, time.Now()); wait > 0 {
			return &TooManyError{wait}
		}
		var isHidden *bool
		if update.Visible != nil {
			isHidden = new(bool)
			*isHidden = !*update.Visible
		}
		n.presence.rooms.Set(topic, refOf(p.Auth), update.Meta, isHidden)
	}
	n.markAttendances(clients, topic, func(s *subscription) {
		s.attendance.hasLeft = s.attendance.hasLeft && update.ClientID == ""
		if update.Visible != nil {
			s.attendance.wasHidden = false
		}
	})
	return nil
}

func (n *Notifier) checkMeta(meta jsontext.Value) *FieldError {
	if !meta.IsValid() {
		return invalid("meta", ErrInvalidData, "must be JSON")
	}
	if len(meta) > n.config.MaxMeta {
		return invalid("meta", ErrTooLarge, "must be no larger than %d bytes, has %d", n.config.MaxMeta, len(meta))
	}
	return nil
}

// LeavePresence takes a connection of p (empty: all) out of the presence on topic, although it stays
// subscribed, until it calls SetPresence or subscribes anew: at once, or if it has not come back
// after grace (at most 10 seconds), like one that is lost. One that was lost a moment ago does not
// come back. The error is as for SetPresence.
func (n *Notifier) LeavePresence(p Publisher, topic, clientID string, grace time.Duration) error {
	if _, err := n.checkPresence(p, topic); err != nil {
		return err
	}
	if _, err := n.app.SubscriptionsBroker().ClientById(clientID); err != nil && clientID != "" && p.Auth != nil {
		n.presence.rooms.GiveUp(topic, refOf(p.Auth), grace)
		return nil
	}
	clients, err := n.attendeesOf(p, clientID)
	if err != nil {
		return err
	}
	n.markAttendances(clients, topic, func(s *subscription) {
		s.attendance.hasLeft, s.attendance.grace = true, grace
	})
	return nil
}

// checkPresence returns the presence of a topic. It refuses a topic without one as if p may not
// listen to it: comes before everything else that could tell them apart.
func (n *Notifier) checkPresence(p Publisher, topic string) (*presenceSettings, error) {
	if err := n.checkTopic(topic, true); err != nil {
		return nil, Errors{err}
	}
	settings := n.presenceOf(topic)
	if settings == nil {
		return nil, noPresence(p)
	}
	// who is connected may listen: it would have ended otherwise
	if p.Auth == nil || !n.presence.rooms.IsConnected(topic, refOf(p.Auth)) {
		if _, err := n.mayListen(p, topic); err != nil {
			return nil, err
		}
	}
	return settings, nil
}

// noPresence refuses a topic without presence: only superusers may know that this is the reason.
func noPresence(p Publisher) error {
	if p.isSuperuser() {
		return Errors{invalid("topic", ErrNoPresence, "no channel with presence matches it")}
	}
	return ErrForbidden
}

// attendeesOf returns the connections of p: the one with an id, or all.
func (n *Notifier) attendeesOf(p Publisher, clientID string) ([]*Client, error) {
	if clientID == "" {
		if p.Auth == nil {
			return nil, Errors{invalid("clientId", ErrRequired, "cannot be blank")}
		}
		return n.index.clientsOf(refOf(p.Auth)), nil
	}
	client, err := n.OwnClient(p, clientID)
	if err != nil {
		return nil, err
	}
	if own := n.own(client); own != nil {
		return []*Client{own}, nil
	}
	return nil, nil
}

// markAttendances renews the presence of connections that are subscribed to topic, with a change.
func (n *Notifier) markAttendances(clients []*Client, topic string, change func(*subscription)) {
	for _, client := range clients {
		client.attendAgain(func() {
			for _, s := range client.subs {
				if a := s.attendance; s.topic == topic && a != nil {
					a.isOverdue, a.renewed = false, n.conns.ExactNow()
					change(s)
				}
			}
		})
	}
}
