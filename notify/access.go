// Who may subscribe: decisions on requests to subscribe, and the grants of subscriptions. Called by
// hooks/subscribe.go and recheck.go.

package notify

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/rules"
)

// DeniedTopic is the system topic that tells a client which subscriptions were refused or ended.
const DeniedTopic = "@denied"

// grant is the permission of a subscription. The zero value is for a subscription that the server's
// own code made; no rule is evaluated for it.
type grant struct {
	byRule  bool    // the client asked for it, and the rules let it
	never   bool    // it does not hold: the subscription is about to end
	forUser bool    // it holds only for
	user    userRef // the zero userRef being a guest
}

// Denial is a subscription that a client does not get.
type Denial struct {
	Key string
	// Status is 403, or 400 if the key's options are wrong.
	Status  int
	Message string
}

// DeniedMessage is the same for every reason, so that it does not reveal whether a topic exists.
const DeniedMessage = "You are not allowed to listen to this topic."

func forbidden(key string) Denial { return Denial{key, http.StatusForbidden, DeniedMessage} }

// Admission is the decision on a request to subscribe.
type Admission struct {
	// Keys are the allowed subscription keys, in order.
	Keys []string
	// Denied are the other keys.
	Denied []Denial
	// Refused says that every newly requested key is denied. Then the request must have no effect.
	Refused bool

	who        *identity
	grants     map[string]grant
	place      uint64 // of the request, see order
	generation uint64 // of changes, when the decision began
	version    int    // of the client's subscriptions at that time
}

// Admit decides which of the subscription keys client may have as auth. Keys that it already has as
// the same user are not decided again. Admit changes nothing; [Client.Resubscribe] puts the
// admission into effect. ctx is the request's: see [Notifier.Arrived]. An error comes from a query.
func (n *Notifier) Admit(ctx context.Context, client subscriptions.Client, auth *core.Record, keys []string) (*Admission, error) {
	a := &Admission{who: identityOf(auth, 0), grants: map[string]grant{}, place: placeOf(ctx), generation: n.changes.current()}
	own := n.own(client)
	var standing map[string]grant
	if own != nil {
		a.version, standing = own.standing(a.who.user)
	}
	memo := n.newMemo()
	asked, granted := 0, 0
	for _, key := range keys {
		has := client.HasSubscription(key)
		g, ok := standing[key]
		if !ok {
			decision := memo.decide(key, auth)
			if decision.err != nil {
				return nil, decision.err
			}
			g, ok = decision.grant, decision.ok
		}
		if !has {
			asked++
		}
		if !ok {
			a.Denied = append(a.Denied, forbidden(key))
			continue
		}
		if strings.Contains(key, "?") {
			if err := checkOptions(optionsOf(key)); err != nil {
				a.Denied = append(a.Denied, Denial{key, http.StatusBadRequest, err.Error()})
				continue
			}
		}
		if !has {
			granted++
		}
		a.Keys = append(a.Keys, key)
		a.grants[key] = g
	}
	a.Refused = asked > 0 && granted == 0
	return a, nil
}

// memo decides on subscriptions, each question once: one query, however many connections share the
// question.
type memo struct {
	n       *Notifier
	answers map[question]answer
	users   map[userRef]foundUser
}

type foundUser struct {
	record *core.Record
	err    error
}

// question is everything that an answer depends on.
type question struct {
	topic   string
	user    userRef // zero if the rule does not look at the auth record
	headers string  // their source, if the rule looks at headers
}

type answer struct {
	grant grant
	ok    bool
	err   error
}

func (n *Notifier) newMemo() *memo {
	return &memo{n: n, answers: map[question]answer{}, users: map[userRef]foundUser{}}
}

// decide reports whether auth may subscribe to key.
func (m *memo) decide(key string, auth *core.Record) answer {
	topic := topicOf(key)
	headers := func() map[string]string { return optionsOf(key).Headers }
	if target, isWatch := strings.CutPrefix(topic, PresencePrefix); isWatch {
		return m.mayWatch(target, auth, key, headers)
	}
	if topic == "" || m.n.reserved(topic) != "" {
		// the server's own topics; PocketBase evaluates the rules for topics of records
		return answer{grant: grant{byRule: true}, ok: true}
	}
	return m.mayListen(topic, auth, key, headers)
}

// mayListen reports whether auth may have the messages of a topic that is not reserved. headers
// returns those that rules see, and source identifies them.
func (m *memo) mayListen(topic string, auth *core.Record, source string, headers func() map[string]string) answer {
	granted, who := grant{byRule: true}, identityOf(auth, 0)
	channel, values := m.n.channelOf(topic)
	if channel == nil {
		if m.n.config.Strict && who.isSuperuser {
			granted.forUser, granted.user = true, who.user
		}
		return answer{grant: granted, ok: who.isSuperuser || !m.n.config.Strict}
	}

	return m.evaluate(question{topic: topic}, channel, channel.subscribe, values, auth, source, headers)
}

// mayWatch is mayListen for who is present on topic. Where nobody is told, nobody may watch.
func (m *memo) mayWatch(topic string, auth *core.Record, source string, headers func() map[string]string) answer {
	channel, values := m.n.channelOf(topic)
	if channel == nil || channel.presence == nil {
		return answer{grant: grant{byRule: true}}
	}
	return m.evaluate(question{topic: PresencePrefix + topic}, channel, channel.presence.rule, values, auth, source, headers)
}

// evaluate answers q by a rule of channel.
func (m *memo) evaluate(q question, channel *channel, rule *rules.Rule, values map[string]string, auth *core.Record, source string, headers func() map[string]string) answer {
	granted, who := grant{byRule: true}, identityOf(auth, 0)
	if granted.forUser = rule.LooksAtAuth() || who.isSuperuser; granted.forUser {
		granted.user = who.user
	}
	q.user = granted.user
	if rule.LooksAtHeaders {
		q.headers = source
	}
	if known, ok := m.answers[q]; ok {
		return known
	}
	ok, err := m.n.passes(channel, rule, values, auth, headers)
	if err != nil {
		err = fmt.Errorf("evaluate a rule of %q: %w", channel.pattern.Text, err)
		m.n.app.Logger().Error("A channel's rule failed",
			slog.String("pattern", channel.pattern.Text), slog.String("topic", q.topic), slog.String("error", err.Error()))
	}
	a := answer{grant: granted, ok: ok && err == nil, err: err}
	m.answers[q] = a
	return a
}

// user returns the auth record of who as it is in the database now. It returns nil, which is a guest, if
// the record is gone or its tokens are revoked. If the database does not answer, that is an error
// and says nothing about the user.
func (m *memo) user(who *identity) (*core.Record, error) {
	if who.isGuest() {
		return nil, nil
	}
	ref := who.user
	found, known := m.users[ref]
	if !known {
		found.record, found.err = m.n.app.FindRecordById(ref.collectionID, ref.id)
		if errors.Is(found.err, sql.ErrNoRows) {
			found.err = nil
		}
		if found.err != nil {
			found.err = fmt.Errorf("look up the user of a connection: %w", found.err)
			m.n.app.Logger().Error("Failed to check rights again", slog.String("error", found.err.Error()))
		}
		m.users[ref] = found
	}
	if found.err != nil {
		return nil, found.err
	}
	if found.record == nil || found.record.TokenKey() != who.tokenKey {
		return nil, nil
	}
	return found.record, nil
}

// passes evaluates a rule of channel with PocketBase's query. It takes one query, or none if the rule is
// open or locked. @request.query contains only the pattern's values and nothing that a client
// sends. headers is called only for a rule that looks at them.
//
// {name...} may stand for nothing. A rule that looks at such a value would find it equal to what an
// outer join yields for a missing record, and let everyone pass. So it is not evaluated; only
// superusers pass.
func (n *Notifier) passes(c *channel, r *rules.Rule, values map[string]string, auth *core.Record, headers func() map[string]string) (bool, error) {
	for name := range r.Wildcards {
		if values[name] == "" && (auth == nil || !auth.IsSuperuser()) {
			return false, nil
		}
	}
	var shown map[string]string
	if r.LooksAtHeaders {
		shown = headers()
	}
	return n.statements.Passes(r, c.record, auth, values, shown)
}

// standing returns the grants of the keys that the client has already asked for, if the client is
// user, and the version of its subscriptions.
func (c *Client) standing(user userRef) (version int, grants map[string]grant) {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	if c.identity().user != user {
		return c.version, nil
	}
	grants = map[string]grant{}
	for name, key := range c.knownKeys() {
		if key.grant.byRule {
			grants[name] = key.grant
		}
	}
	return c.version, grants
}

// holds reports whether g lets a message through to a client who is now who.
func (g *grant) holds(who *identity) bool {
	return !g.never && (!g.forUser || g.user == who.user)
}
