// Channels: the rules of a topic. hooks/channels.go sets them from the records of a collection;
// they are looked up for each subscription, publish and message.

package notify

import (
	"log/slog"
	"maps"
	"math"
	"strings"
	"time"

	"github.com/pocketbase/pocketbase/core"

	"herald/notify/internal/history"
	"herald/notify/internal/rules"
	"herald/notify/internal/sets"
)

// The fields of a channel's record.
const (
	channelPattern        = "pattern"
	channelSubscribeRule  = "subscribeRule"
	channelPublishRule    = "publishRule"
	channelPresence       = "presence"
	channelPresenceRule   = "presenceRule"
	channelPresenceFields = "presenceFields"
	channelPresenceLimit  = "presenceLimit"
	channelPresenceTTL    = "presenceTTL"
	channelRateLimit      = "rateLimit"
	channelMaxSize        = "maxSize"
	channelHistory        = "history"
	channelHistoryTTL     = "historyTTL"
)

// channel gives the topics that match its pattern their rules. It never changes after creation.
type channel struct {
	record    *core.Record
	pattern   *rules.Pattern
	subscribe *rules.Rule
	publish   *rules.Rule
	presence  *presenceSettings // nil without presence
	rateLimit float64           // publishes per second of one client; 0 means no limit
	maxSize   int               // of a publish's data, in bytes
	history   history.Retention
}

// maxTTL is the longest historyTTL: a century, which does not overflow a time.Duration.
const maxTTL = 100 * 365 * 24 * time.Hour

// newChannel compiles a channel's record. If a rule does not compile, the channel is returned as
// well, and that rule lets only superusers pass.
func newChannel(app core.App, record *core.Record) (*channel, Errors) {
	var errs Errors
	p, err := rules.ParsePattern(record.GetString(channelPattern))
	if err != nil {
		return nil, append(errs, invalid(channelPattern, ErrInvalidPattern, "%s", err))
	}
	for _, name := range p.Names {
		// PocketBase compares the value as a number if the collection has a number field of that
		// name (resolveStaticRequestField in core): 1e1 and 10 would be the same room
		if _, isNumber := record.Collection().Fields.GetByName(name).(*core.NumberField); isNumber {
			errs.add(invalid(channelPattern, ErrInvalidPattern, "must not use the name {%s}, which is a number field of the channel", name))
		}
	}
	if strings.HasPrefix(p.Begin(), "@") {
		errs.add(invalid(channelPattern, ErrInvalidPattern, `must not begin with "@", which is reserved for the server's own topics`))
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
	watch := compile(channelPresenceRule)
	settings, err := newPresenceSettings(record, watch)
	if err != nil {
		errs.add(invalid(channelPresenceFields, ErrInvalidFields, "%s", err))
	}
	if record.GetBool(channelPresence) {
		c.presence = settings
	}
	if c.maxSize <= 0 {
		c.maxSize = math.MaxInt // the engine's own limit applies
	}
	return c, errs
}

// CheckChannel reports what is wrong with a channel's record, given all other channels. app may be
// the app of a transaction.
func (n *Notifier) CheckChannel(app core.App, record *core.Record, others []*core.Record) Errors {
	c, errs := newChannel(app, record)
	if c == nil {
		return errs
	}
	if c.presence != nil {
		if name := n.unknownField(c.presence.fields); name != "" {
			errs.add(invalid(channelPresenceFields, ErrInvalidFields, "no auth collection has a field %q that may be shown", name))
		}
	}
	for _, other := range others {
		if other.Id == record.Id {
			continue
		}
		if p, err := rules.ParsePattern(other.GetString(channelPattern)); err == nil && c.pattern.Conflicts(p) {
			errs.add(invalid(channelPattern, ErrInvalidPattern,
				"conflicts with %q: some topics match both, and neither is more specific", p.Text))
		}
	}
	return errs
}

// ReservedByRecords returns the reason if some topics that match a channel's pattern are reserved
// for record events, as with orders/{id} beside a collection "orders". The channel does not apply
// to those topics. It returns "" if there are none.
func (n *Notifier) ReservedByRecords(patternText string) string {
	p, err := rules.ParsePattern(patternText)
	if err != nil {
		return ""
	}
	return n.reserved(p.Example("abcdefghijklmno")) // an id as PocketBase generates it
}

// channels is the set of all channels at one time.
type channels struct {
	tree rules.Tree[*channel]
	all  []*channel

	hasHistory  bool // at least one channel has history
	hasPresence bool // at least one channel has presence

	// what all rules about listening and watching together look at
	authFields  sets.Of[string]
	collections map[string]sets.Of[string] // fields by collection id
}

// SetChannels replaces the channels with those of records. If two have the same place, the first
// one wins. It does not recheck any client: see [Notifier.ChangeOfChannel].
func (n *Notifier) SetChannels(records []*core.Record) {
	next := &channels{authFields: sets.Of[string]{}, collections: map[string]sets.Of[string]{}}
	for _, record := range records {
		c, errs := newChannel(n.app, record)
		for _, err := range errs {
			// possible if a collection was renamed or removed since
			n.app.Logger().Error("Invalid channel; a rule that does not compile lets only superusers pass",
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
		next.hasPresence = next.hasPresence || c.presence != nil
		for _, rule := range c.listening() {
			next.look(rule.Rule)
		}
	}
	n.activate(next)
	n.attendAll()
}

// look notes what a rule looks at.
func (set *channels) look(rule *rules.Rule) {
	maps.Copy(set.authFields, rule.AuthFields)
	if rule.LooksAtAuth() {
		set.authFields[core.FieldNameTokenKey] = struct{}{} // a change revokes all tokens
	}
	for id, d := range rule.Collections {
		if set.collections[id] == nil {
			set.collections[id] = sets.Of[string]{}
		}
		maps.Copy(set.collections[id], d.Fields)
	}
}

// authFieldsOf returns the fields of collection's records that the rights of these records, as users, depend on.
func (set *channels) authFieldsOf(collection *core.Collection) sets.Of[string] {
	switch {
	case !collection.IsAuth():
		return nil
	case len(set.authFields) == 0 && collection.Name == core.CollectionNameSuperusers:
		return sets.Of[string]{core.FieldNameTokenKey: {}} // they may what no rule allows
	}
	return set.authFields
}

// listeningRule is a rule about who gets what is sent on the topics that begin with prefix and
// continue as the channel's.
type listeningRule struct {
	*rules.Rule
	prefix string
}

// listening returns the rules on which subscriptions depend.
func (c *channel) listening() []listeningRule {
	all := []listeningRule{{c.subscribe, ""}}
	if c.presence != nil {
		all = append(all, listeningRule{c.presence.rule, PresencePrefix})
	}
	return all
}

// topics returns a function that reports whether a topic is one that the rule is about.
func (r listeningRule) topics(p *rules.Pattern) func(topic string) bool {
	matches := p.Matcher()
	return func(topic string) bool {
		rest, ok := strings.CutPrefix(topic, r.prefix)
		return ok && matches(rest)
	}
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
	leaving := map[string]bool{} // the channels of before, less those of next, and whether they had history
	for _, c := range before.all {
		leaving[c.pattern.Text] = c.history.Count > 0
	}
	regains := len(next.all) != len(before.all)
	isAgain := false // some topics may have had history before
	for _, c := range next.all {
		had, known := leaving[c.pattern.Text]
		delete(leaving, c.pattern.Text)
		// another pattern may take a topic, or leave it to one with history
		regains = regains || !known || c.history.Count > 0 && !had
		isAgain = isAgain || c.history.Count > 0 && !had && n.hadHistory.Has(c.pattern.Text)
	}
	if !regains {
		n.channels.Store(next)
		return
	}
	for _, had := range leaving {
		isAgain = isAgain || !had // it may have kept its topics from one with history
	}
	n.sending.Lock() // what is sent without being stored is in the queues
	lapse := n.history.Lapsed(func(topic string) bool {
		return before.historyOf(topic).Count == 0 && next.historyOf(topic).Count > 0
	}, isAgain)
	n.channels.Store(next)
	n.sending.Unlock()
	n.history.NoteLater(lapse)
}

// unknownChannels stands for the channels before any were set: what topics had then is unknown.
var unknownChannels = &channels{}

// historyOf returns the retention of topic, which must not be a reserved one.
func (set *channels) historyOf(topic string) history.Retention {
	if !set.hasHistory {
		return history.Retention{}
	}
	if c, _, found := set.tree.Match(topic); found {
		return c.history
	}
	return history.Retention{}
}

// historyOf returns the retention of topic.
func (n *Notifier) historyOf(topic string) history.Retention {
	keep := n.channels.Load().historyOf(topic)
	if keep.Count > 0 && n.reserved(topic) != "" {
		return history.Retention{}
	}
	return keep
}

// isRestricted reports whether only some clients may listen to topic.
func (n *Notifier) isRestricted(topic string) bool {
	if strings.HasPrefix(topic, PresencePrefix) {
		return true
	}
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

// channelOf returns the channel of topic and the values of its pattern's wildcards. It returns nil
// if there is no channel, or if the topic is the server's own.
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
