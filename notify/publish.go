// Messages of clients: whether one may publish, and how often. Called by
// hooks/publish.go.

package notify

import (
	"context"
	"crypto/sha256"
	"encoding/json/v2"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pocketbase/pocketbase/apis"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/subscriptions"
	"golang.org/x/time/rate"
)

// TooManyError refuses a message of a client that has published too often.
type TooManyError struct {
	RetryAfter time.Duration
}

func (e *TooManyError) Error() string {
	return fmt.Sprintf("too many messages, retry after %s", e.RetryAfter)
}

// MayPublish returns nil where the publisher may send data of size bytes to topic
// now. The error is of type [Errors] for a topic that is none and for data that is
// too large, [ErrForbidden] or a [*TooManyError]; any other is that of a query. It
// also returns the record of the topic's channel, nil where it has none, as it can
// for superusers, to whom neither rules nor limits apply.
//
// A nil error counts as one message in the channel's rate limit.
func (n *Notifier) MayPublish(p Publisher, topic string, size int) (*core.Record, error) {
	if err := n.checkTopic(topic, false); err != nil && (!errors.Is(err, ErrReservedTopic) || p.isSuperuser()) {
		return nil, Errors{err}
	}
	c, values := n.channelOf(topic)
	switch {
	case c == nil && p.isSuperuser():
		return nil, nil
	case c == nil:
		return nil, ErrForbidden
	}
	allowed, err := n.passes(c, c.publish, values, p.Auth, p.Headers)
	switch {
	case err != nil:
		return nil, fmt.Errorf("ask the publish rule of %q: %w", c.pattern.Text, err)
	case !allowed:
		return nil, ErrForbidden
	case p.isSuperuser():
		return c.record, nil
	case size > c.maxSize:
		return nil, Errors{invalid("data", ErrTooLarge, "must be no larger than %d bytes, has %d", c.maxSize, size)}
	}
	if wait := n.buckets.take(bucketKey{c.record.Id, p.key()}, c.rateLimit, time.Now()); wait > 0 {
		return nil, &TooManyError{wait}
	}
	return c.record, nil
}

// SendFrom is [Notifier.Send] for a message of a client. Who sent it is in its
// envelope, and its ID is that publisher's own: a guest's that of whoever has the same
// address and sends the same data. Whether it may is for the caller to ask: see
// [Notifier.MayPublish].
func (n *Notifier) SendFrom(ctx context.Context, p Publisher, msg Message) (Report, error) {
	sender := p.key()
	if p.Auth == nil { // others may have the address, and the ID
		data, _ := json.Marshal(msg.Data, json.Deterministic(true)) // an error is Send's to tell
		sender = fmt.Sprintf("%s\x00%x", sender, sha256.Sum256(data))
	}
	if !p.isSuperuser() {
		msg.Except.Users = n.withoutUnknown(msg.Except.Users)
	}
	return n.acceptOnce(ctx, msg, p.key(), sender+"\x00", func() (*publication, error) {
		pub, err := n.check(msg, false)
		if err == nil && p.Auth != nil {
			pub.sender = refOf(p.Auth)
			pub.from = n.nameOf(pub.sender)
		}
		return pub, err
	})
}

// withoutUnknown leaves out users of what is no auth collection: they listen to nothing, and
// which collections there are is not for a client to find out.
func (n *Notifier) withoutUnknown(users []string) []string {
	return slices.DeleteFunc(slices.Clone(users), func(user string) bool {
		name, id, ok := strings.Cut(user, ":")
		if !ok || name == "" || id == "" {
			return false // which is told
		}
		_, err := n.authCollection("", name)
		return err != nil
	})
}

// OwnClient returns the realtime client with id if it is the publisher's. The
// error is of type [Errors], with the field "clientId", and the same whether there
// is no such client or it is somebody else's.
func (n *Notifier) OwnClient(p Publisher, id string) (subscriptions.Client, error) {
	client, err := n.app.SubscriptionsBroker().ClientById(id)
	if err == nil && isSameUser(p.Auth, n.authOf(client)) {
		if ip, _ := client.Get(apis.RealtimeClientIPKey).(string); p.Auth != nil || ip == p.IP {
			return client, nil
		}
	}
	return nil, Errors{invalid("clientId", ErrInvalidClient, "must be the id of your own realtime connection")}
}

// buckets are the token buckets of the channels' rate limits. One that is full
// again is the same as none, and freed.
type buckets struct {
	mu       sync.Mutex // guards what follows
	byClient map[bucketKey]*bucket
	timer    *time.Timer // runs while there are any
}

type bucketKey struct{ channelID, publisher string }

type bucket struct {
	limiter *rate.Limiter
	full    time.Time // when it is full again
}

// freeBucketsEvery is how often buckets are looked through.
const freeBucketsEvery = 10 * time.Second

// take takes one token of a client, or returns how long it has to wait for it.
// perSecond 0 is no limit. A client may use what it gets a second at once.
func (b *buckets) take(key bucketKey, perSecond float64, now time.Time) (wait time.Duration) {
	if perSecond <= 0 {
		return 0
	}
	limit, burst := rate.Limit(perSecond), max(1, int(math.Ceil(perSecond)))
	b.mu.Lock()
	defer b.mu.Unlock()
	own := b.byClient[key]
	if own == nil {
		own = &bucket{limiter: rate.NewLimiter(limit, burst)}
		b.byClient[key] = own
		if b.timer == nil {
			b.timer = time.AfterFunc(freeBucketsEvery, b.tick)
		}
	}
	if own.limiter.Limit() != limit { // the channel has changed
		own.limiter.SetLimitAt(now, limit)
		own.limiter.SetBurstAt(now, burst)
	}
	if reservation := own.limiter.ReserveN(now, 1); reservation.DelayFrom(now) > 0 {
		wait = reservation.DelayFrom(now)
		reservation.CancelAt(now)
	}
	missing := float64(burst) - own.limiter.TokensAt(now)
	own.full = now.Add(time.Duration(missing / perSecond * float64(time.Second)))
	return wait
}

func (b *buckets) tick() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.timer == nil {
		return // stopped
	}
	b.free(time.Now())
	if len(b.byClient) == 0 {
		b.timer = nil
		return
	}
	b.timer.Reset(freeBucketsEvery)
}

// free drops the buckets that are full. mu is held.
func (b *buckets) free(now time.Time) {
	for key, own := range b.byClient {
		if !own.full.After(now) {
			delete(b.byClient, key)
		}
	}
}

func (b *buckets) stop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.timer != nil {
		b.timer.Stop()
		b.timer = nil
	}
}
