// Checks that other packages make before they prepare a message. Called by hooks/internal/triggers.

package notify

import "strings"

// CheckTopic reports what makes topic unfit for a custom message, or nil.
func (n *Notifier) CheckTopic(topic string) *FieldError { return n.checkTopic(topic, false) }

// CheckAudience reports what is wrong with an audience, as [Errors], or nil.
func (n *Notifier) CheckAudience(to Audience) error {
	if _, errs := n.compile(to, Except{}); len(errs) > 0 {
		return errs
	}
	return nil
}

// IsWanted reports whether a message on topic would reach anyone, now or later: the topic has
// subscribers or history. It costs no query.
func (n *Notifier) IsWanted(topic string) bool {
	return n.index.hasSubscribers(topic) || n.HasHistory(topic) || len(n.foreignClients()) > 0
}

// HasHistory reports whether messages on topic are stored, so that sending one waits for a disk.
func (n *Notifier) HasHistory(topic string) bool { return n.historyOf(topic).Count > 0 }

// IsPrefixWanted is [Notifier.IsWanted] for any topic that begins with prefix. It
// looks at all topics that have subscribers.
func (n *Notifier) IsPrefixWanted(prefix string) bool {
	if n.channels.Load().hasHistory || len(n.foreignClients()) > 0 {
		return true
	}
	return len(n.index.clientsWhere(func(topic string) bool { return strings.HasPrefix(topic, prefix) })) > 0
}
