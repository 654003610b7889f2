// Messages from clients: whether a client may publish, and how often. Called by hooks/publish.go.

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

// TooManyError refuses a message from a client that has published too often.
type TooManyError struct {
	RetryAfter time.Duration
}

func (e *TooManyError) Error() string {
	return fmt.Sprintf("too many messages, retry after %s", e.RetryAfter)
}

// MayPublish returns nil if the publisher may now send data of size bytes to topic. The error is of
// type [Errors] if the topic is invalid or the data too large, [ErrForbidden] or a [*TooManyError];
// any other error comes from a query. MayPublish also returns the record of the topic's channel. It
// is nil if the topic has none, which is possible only for superusers, since neither rules nor
// limits apply to them.
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
	allowed, err := n.passes(c, c.publish, values, p.Auth, p.headers)
	switch {
	case err != nil:
		return nil, fmt.Errorf("evaluate the publish rule of %q: %w", c.pattern.Text, err)
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

// SendFrom is [Notifier.Send] for a message from a client. The envelope names the sender. The
// message's ID is separate for each publisher; guests share one only if they have the same address
// and send the same data. SendFrom does not check rights; the caller must: see
// [Notifier.MayPublish].
func (n *Notifier) SendFrom(ctx context.Context, p Publisher, msg Message) (Report, error) {
	sender := p.key()
	if p.Auth == nil { // others may have the same address and ID
		data, _ := json.Marshal(msg.Data, json.Deterministic(true)) // Send reports an error
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

// withoutUnknown removes users whose collection is not an auth collection. They have no
// connections, and a client should not be able to find out which collections exist.
func (n *Notifier) withoutUnknown(users []string) []string {
	return slices.DeleteFunc(slices.Clone(users), func(user string) bool {
		name, id, ok := strings.Cut(user, ":")
		if !ok || name == "" || id == "" {
			return false // reported later
		}
		_, err := n.authCollection("", name)
		return err != nil
	})
}

// OwnClient returns the realtime client with id if it belongs to the publisher. The error is of
// type [Errors], with the field "clientId". It is the same whether there is no such client or it
// belongs to another publisher.
func (n *Notifier) OwnClient(p Publisher, id string) (subscriptions.Client, error) {
	client, err := n.app.SubscriptionsBroker().ClientById(id)
	if err == nil && p.identity().user == n.identityOf(client).user {
		if ip, _ := client.Get(apis.RealtimeClientIPKey).(string); p.Auth != nil || ip == p.IP {
			return client, nil
		}
	}
	return nil, Errors{invalid("clientId", ErrInvalidClient, "must be the id of your own realtime connection")}
}

// buckets are the token buckets of the channels' rate limits. A bucket that is full again is
// equivalent to none, and is freed.
type buckets struct {
	mu       sync.Mutex // guards the fields below
	byClient map[bucketKey]*bucket
	timer    *time.Timer // runs while there are buckets
}

type bucketKey struct{ channelID, publisher string }

type bucket struct {
	limiter *rate.Limiter
	full    time.Time // when it will be full again
}

// freeBucketsEvery is how often full buckets are freed.
const freeBucketsEvery = 10 * time.Second

// take takes one token for a client, or returns how long the client must wait for it. perSecond 0
// means no limit. A client may use one second's tokens at once.
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
	if own.limiter.Limit() != limit { // the channel's limit has changed
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
