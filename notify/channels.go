// Channels: which rules a topic has. Set from the records of a collection by
// hooks/channels.go, asked for each subscription, publish and message.

package notify

import (
	"log/slog"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/notify/internal/history"
	"herald/notify/internal/rules"
	"herald/notify/internal/sets"
)

// The fields of a channel's record.
const (
	channelPattern       = "pattern"
	channelSubscribeRule = "subscribeRule"
	channelPublishRule   = "publishRule"
	channelPresenceRule  = "presenceRule"
	channelRateLimit     = "rateLimit"
	channelMaxSize       = "maxSize"
	channelHistory       = "history"
	channelHistoryTTL    = "historyTTL"
)

// channel gives the topics that match its pattern their rules. It is not changed
// after it was made.
type channel struct {
	record    *core.Record
	pattern   *rules.Pattern
	subscribe *rules.Rule
	publish   *rules.Rule
	rateLimit float64 // publishes a second of one client; 0: no limit
	maxSize   int     // of a publish's data, in bytes
	history   history.Retention
}

// maxTTL is the longest historyTTL: a century, which no time.Duration overflows at.
const maxTTL = 100 * 365 * 24 * time.Hour

// newChannel compiles a channel's record. Where a rule does not compile the
// channel is returned too: that rule then lets nobody but superusers pass.
func newChannel(app core.App, record *core.Record) (*channel, Errors) {
	var errs Errors
	p, err := rules.ParsePattern(record.GetString(channelPattern))
	if err != nil {
		return nil, append(errs, invalid(channelPattern, ErrInvalidPattern, "%s", err))
	}
	for _, name := range p.Names {
		// PocketBase compares the value as a number where the collection has a
		// number of that name (resolveStaticRequestField in core): 1e1 and 10
		// would be the same room
		if _, isNumber := record.Collection().Fields.GetByName(name).(*core.NumberField); isNumber {
			errs.add(invalid(channelPattern, ErrInvalidPattern, "must not call a wildcard {%s}, as a number of the channel is called", name))
		}
	}
	if strings.HasPrefix(p.Begin(), "@") {
		errs.add(invalid(channelPattern, ErrInvalidPattern, `must not begin with "@": these topics are the server's own`))
	}

	compile := func(field string) *rules.Rule {
		compiled, err := rules.Compile(app, record.Collection(), record.GetString(field), p.Names)
		if err != nil {
			errs.add(invalid(field, ErrInvalidRule, "%s", err))
			return &rules.Rule{}
		}
		return compiled
	}
	c := &channel{
		record:    record,
		pattern:   p,
		subscribe: compile(channelSubscribeRule),
		publish:   compile(channelPublishRule),
		rateLimit: record.GetFloat(channelRateLimit),
		maxSize:   record.GetInt(channelMaxSize),
		history: history.Retention{
			Count: int64(record.GetInt(channelHistory)),
			TTL:   time.Duration(min(record.GetFloat(channelHistoryTTL), maxTTL.Seconds())) * time.Second,
		},
	}
	compile(channelPresenceRule)
	if c.maxSize <= 0 {
		c.maxSize = math.MaxInt // the engine's own limit holds
	}
	return c, errs
}

// CheckChannel tells what is wrong with a channel's record, given the other
// channels there are. app may be that of a transaction.
func (n *Notifier) CheckChannel(app core.App, record *core.Record, others []*core.Record) Errors {
	c, errs := newChannel(app, record)
	if c == nil {
		return errs
	}
	for _, other := range others {
		if other.Id == record.Id {
			continue
		}
		if p, err := rules.ParsePattern(other.GetString(channelPattern)); err == nil && c.pattern.Conflicts(p) {
			errs.add(invalid(channelPattern, ErrInvalidPattern,
				"conflicts with %q: there are topics that fit both, and neither is the more specific one", p.Text))
		}
	}
	return errs
}

// ReservedByRecords tells of which collection the record events have some of the topics
// that a channel's pattern fits, as orders/{id} does beside a collection "orders": what
// the channel says does not hold for these. It is empty where there is none.
func (n *Notifier) ReservedByRecords(patternText string) string {
	p, err := rules.ParsePattern(patternText)
	if err != nil {
		return ""
	}
	return n.reserved(p.Example("abcdefghijklmno")) // as PocketBase makes ids
}

// channels are all channels at one time.
type channels struct {
	tree rules.Tree[*channel]
	all  []*channel

	hasHistory bool // one of them

	// what their subscribe rules look at, all taken together
	authFields  sets.Of[string]
	collections map[string]sets.Of[string] // fields by collection id
}

// SetChannels replaces the channels by those of records, of which the first one
// wins where two have the same place. It checks nobody again: see
// [Notifier.BeginChange].
func (n *Notifier) SetChannels(records []*core.Record) {
	next := &channels{authFields: sets.Of[string]{}, collections: map[string]sets.Of[string]{}}
	for _, record := range records {
		c, errs := newChannel(n.app, record)
		for _, err := range errs {
			// possible where a collection was renamed or removed since
			n.app.Logger().Error("A channel is wrong; what its rule says is refused",
				slog.String("pattern", record.GetString(channelPattern)), slog.String("error", err.Error()))
		}
		if c == nil {
			continue
		}
		if !next.tree.Add(c.pattern, c) {
			n.app.Logger().Error("A channel has the same pattern as another one", slog.String("pattern", c.pattern.Text))
			continue
		}
		next.all = append(next.all, c)
		next.hasHistory = next.hasHistory || c.history.Count > 0
		maps.Copy(next.authFields, c.subscribe.AuthFields)
		if c.subscribe.LooksAtAuth() {
			next.authFields[core.FieldNameTokenKey] = struct{}{} // a change revokes all tokens
		}
		for id, d := range c.subscribe.Collections {
			if next.collections[id] == nil {
				next.collections[id] = sets.Of[string]{}
			}
			maps.Copy(next.collections[id], d.Fields)
		}
	}
	n.activate(next)
}

// activate makes the channels count from now on. It is not called concurrently.
func (n *Notifier) activate(next *channels) {
	defer func() {
		for _, c := range next.all {
			if c.history.Count > 0 {
				n.hadHistory.Add(c.pattern.Text)
			}
		}
	}()
	before := n.channels.Load()
	if !next.hasHistory || before == unknownChannels {
		n.channels.Store(next)
		return
	}
	hadHistory := map[string]bool{}
	for _, c := range before.all {
		hadHistory[c.pattern.Text] = c.history.Count > 0
	}
	regains := len(next.all) != len(before.all)
	for _, c := range next.all {
		had, known := hadHistory[c.pattern.Text]
		// another pattern may take a topic, or leave it to one with history
		regains = regains || !known || c.history.Count > 0 && !had
	}
	if !regains {
		n.channels.Store(next)
		return
	}
	isAgain := slices.ContainsFunc(next.all, func(c *channel) bool {
		_, had := n.hadHistory[c.pattern.Text]
		return had && c.history.Count > 0
	})
	n.sending.Lock() // what is sent without being stored is in the queues
	lapse := n.history.Lapsed(func(topic string) bool {
		return before.historyOf(topic).Count == 0 && next.historyOf(topic).Count > 0
	}, isAgain)
	n.channels.Store(next)
	n.sending.Unlock()
	n.history.NoteLater(lapse)
}

// unknownChannels are those before any were set: what topics had then nobody
// knows.
var unknownChannels = &channels{}

// historyOf returns what is kept of topic, which is not a reserved one.
func (set *channels) historyOf(topic string) history.Retention {
	if !set.hasHistory {
		return history.Retention{}
	}
	if c, _, found := set.tree.Match(topic); found {
		return c.history
	}
	return history.Retention{}
}

// historyOf returns what is kept of topic.
func (n *Notifier) historyOf(topic string) history.Retention {
	keep := n.channels.Load().historyOf(topic)
	if keep.Count > 0 && n.reserved(topic) != "" {
		return history.Retention{}
	}
	return keep
}

// isRestricted reports whether not everyone may listen to topic.
func (n *Notifier) isRestricted(topic string) bool {
	set := n.channels.Load()
	if len(set.all) == 0 {
		return n.config.Strict
	}
	c, _, found := set.tree.Match(topic)
	if !found {
		return n.config.Strict
	}
	return c.subscribe.Filter == nil || c.subscribe.LooksAtAuth()
}

// channelOf returns the channel of topic and what the wildcards of its pattern
// stand for; nil where there is none, or the topic is the server's own.
func (n *Notifier) channelOf(topic string) (*channel, map[string]string) {
	set := n.channels.Load()
	if len(set.all) == 0 || topic == "" || n.reserved(topic) != "" {
		return nil, nil
	}
	c, values, found := set.tree.Match(topic)
	if !found {
		return nil, nil
	}
	byName := make(map[string]string, len(c.pattern.Names))
	for i, name := range c.pattern.Names {
		byName[name] = values[i]
	}
	return c, byName
}
