// Who may listen: what becomes of a request to subscribe, and what a
// subscription was granted for. Called by hooks/subscribe.go and recheck.go.

package notify

import (
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/rules"
)

// DeniedTopic is the system topic on which a client hears of subscriptions that
// it was refused, or that ended.
const DeniedTopic = "@denied"

// grant is the permission of a subscription. The zero value is that of one which
// the server's own code made: it is not asked for.
type grant struct {
	byRule  bool    // the client asked for it, and the rules let it
	never   bool    // it does not hold: the subscription is about to end
	forUser bool    // it holds only for
	user    userRef // the zero userRef being a guest
}

// Denial is a subscription that a client does not get.
type Denial struct {
	Key string
	// Status is 403, or 400 where its options are wrong.
	Status  int
	Message string
}

// DeniedMessage is the same for every reason to forbid: whether a topic exists is
// nobody's business.
const DeniedMessage = "You are not allowed to listen to this topic."

func forbidden(key string) Denial { return Denial{key, http.StatusForbidden, DeniedMessage} }

// Admission is what a request to subscribe comes to.
type Admission struct {
	// Keys are those of the subscription keys that are allowed, in order.
	Keys []string
	// Denied are the others.
	Denied []Denial
	// Refused: all that is newly asked for is denied. Then the request is to
	// have no effect.
	Refused bool

	auth       *core.Record
	grants     map[string]grant
	generation uint64 // of changes, when the decision began
	version    int    // of what the client had then
}

// Admit decides which of the subscription keys client may have as auth. What it
// has already as the same user is not asked for again. It changes nothing:
// [Client.Resubscribe] makes the admission hold. The error is that of a query.
func (n *Notifier) Admit(client subscriptions.Client, auth *core.Record, keys []string) (*Admission, error) {
	a := &Admission{auth: auth, grants: map[string]grant{}, generation: n.changes.current()}
	own := n.own(client)
	var standing map[string]grant
	if own != nil {
		a.version, standing = own.standing(auth)
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
			if _, err := startOf(optionsOf(key)); err != nil {
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

// memo decides on subscriptions, each question once: one query, however many
// connections ask it.
type memo struct {
	n       *Notifier
	answers map[question]answer
	users   map[userRef]foundUser
}

type foundUser struct {
	record *core.Record
	err    error
}

// question is all that an answer depends on.
type question struct {
	topic   string
	user    userRef // zero where the rule does not look at who asks
	headers string  // the key, where it looks at the headers in it
}

type answer struct {
	grant grant
	ok    bool
	err   error
}

func (n *Notifier) newMemo() *memo {
	return &memo{n: n, answers: map[question]answer{}, users: map[userRef]foundUser{}}
}

// decide tells whether auth may subscribe to key.
func (m *memo) decide(key string, auth *core.Record) answer {
	topic := topicOf(key)
	granted := grant{byRule: true}
	if topic == "" || m.n.reserved(topic) != "" {
		// the server's own topics; on records' PocketBase asks their rules
		return answer{grant: granted, ok: true}
	}
	isSuperuser := auth != nil && auth.IsSuperuser()
	channel, values := m.n.channelOf(topic)
	if channel == nil {
		if m.n.config.Strict && isSuperuser {
			granted.forUser, granted.user = true, refOf(auth)
		}
		return answer{grant: granted, ok: isSuperuser || !m.n.config.Strict}
	}

	q := question{topic: topic}
	if granted.forUser = channel.subscribe.LooksAtAuth() || isSuperuser; granted.forUser && auth != nil {
		q.user = refOf(auth)
		granted.user = q.user
	}
	if channel.subscribe.LooksAtHeaders {
		q.headers = key
	}
	if known, ok := m.answers[q]; ok {
		return known
	}
	var headers map[string]string
	if channel.subscribe.LooksAtHeaders {
		headers = optionsOf(key).Headers
	}
	ok, err := m.n.passes(channel, channel.subscribe, values, auth, headers)
	if err != nil {
		m.n.app.Logger().Error("A channel's subscribe rule failed",
			slog.String("pattern", channel.pattern.Text), slog.String("error", err.Error()))
	}
	a := answer{grant: granted, ok: ok && err == nil, err: err}
	m.answers[q] = a
	return a
}

// user returns the auth record as the database has it now; nil, which is a
// guest, where it is gone or its tokens are revoked. A database that does not answer is
// an error, and says nothing of the user.
func (m *memo) user(auth *core.Record) (*core.Record, error) {
	if auth == nil {
		return nil, nil
	}
	ref := refOf(auth)
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
	if found.record == nil || found.record.TokenKey() != auth.TokenKey() {
		return nil, nil
	}
	return found.record, nil
}

// passes asks PocketBase whether somebody passes a rule of channel: one query,
// none where the rule is open or locked. The pattern's values are all there is
// in @request.query: nothing that a client sends is among them.
//
// {name...} may stand for nothing. A rule that looks at it would find that equal to what
// an outer join has where there is no record, and let everybody pass: it is not asked.
func (n *Notifier) passes(c *channel, r *rules.Rule, values map[string]string, auth *core.Record, headers map[string]string) (bool, error) {
	for name := range r.Wildcards {
		if values[name] == "" && (auth == nil || !auth.IsSuperuser()) {
			return false, nil
		}
	}
	return n.app.CanAccessRecord(c.record, &core.RequestInfo{
		Context: core.RequestInfoContextRealtime,
		Method:  "GET",
		Query:   values,
		Headers: headers,
		Body:    map[string]any{},
		Auth:    auth,
	}, r.Filter)
}

// standing returns the grants by which the client has keys already that it asked for, if it
// is auth, and the version of what it has.
func (c *Client) standing(auth *core.Record) (version int, grants map[string]grant) {
	c.subsMu.Lock()
	defer c.subsMu.Unlock()
	if !isSameUser(auth, c.authAt(time.Now())) {
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

// holds reports whether g lets a message through to a client that is auth now.
func (g grant) holds(auth *core.Record) bool {
	switch {
	case g.never:
		return false
	case !g.forUser:
		return true
	case auth == nil:
		return g.user == userRef{}
	}
	return g.user == refOf(auth)
}
