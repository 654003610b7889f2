// Replays: what a subscription with since or rewind gets of a topic's history before it goes live.
// Started by client.go; pages come from recovery.go.
//
// The hand-over has no gap and no duplicates, and needs memory for one page only:
//
//   - Once the subscription is in the index, the fan-out skips it and records the numbers of the
//     skipped messages (takes). They can be read from the history, because each was stored before it
//     was delivered.
//   - Pages are read and queued until one reaches the end.
//   - Then, under the lock of the topic's fan-out, the subscription goes live if every skipped message
//     is on a page. Otherwise one more page is read.
//   - A message that was on a page before its delivery is skipped by its number.

package notify

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"strings"

	"github.com/pocketbase/pocketbase/tools/subscriptions"

	"herald/notify/internal/conn"
	"herald/notify/internal/history"
)

// replay is the state of a subscription key with since or rewind.
type replay struct {
	isState bool // no history, but who is present: see presence_watch.go
	plain   bool // messages without their envelopes, which cannot tell of a gap
	from    Start
	resumes bool     // with a client that is back after a restart
	earlier []string // ids of connections that the client has had before, as it says

	// guarded by the lock of the topic's stripe
	live bool // it gets messages as they are sent
	// until it is live: the numbers of the first and the last message that it did not get
	firstOut, leftOut int64
	outEpoch          string // the epoch of these numbers

	epoch   string // the epoch of the fields below
	reached int64  // number of the last message that its pages covered
	gap     bool   // messages before the next one may be missing
}

// verdict is what the fan-out does with a message for a subscription key.
type verdict int

const (
	asLive   verdict = iota
	replayed         // not delivered: it is on a page
	afterGap         // delivered as the first after missing messages
)

// takes decides on pub. The lock of the topic's stripe is held. It may be called on nil.
func (r *replay) takes(pub *publication) verdict {
	switch {
	case r == nil:
		return asLive
	case r.isState:
		if r.live {
			return asLive
		}
		return replayed // what it says is in the state
	case pub.Seq == 0:
		return asLive
	case !r.live:
		if r.outEpoch != pub.Epoch {
			r.outEpoch, r.firstOut = pub.Epoch, pub.Seq
		}
		r.leftOut = pub.Seq
		return replayed
	case pub.Epoch == r.epoch && pub.Seq <= r.reached:
		return replayed
	case r.gap:
		r.gap = false
		return afterGap
	}
	return asLive
}

// lapse notes that a message was left out because the client's right was in doubt. It gets another
// state if the right is confirmed. The lock of the topic's stripe is held. It may be called on nil.
func (r *replay) lapse() {
	if r != nil && r.isState {
		r.live = false
	}
}

// newReplay returns the replay that a subscription to topic with options begins with, or nil.
func newReplay(topic string, options subscriptions.SubscriptionOptions) *replay {
	if strings.HasPrefix(topic, PresencePrefix) {
		return &replay{isState: true}
	}
	if from, err := startOf(options); err == nil && from != (Start{}) {
		return &replay{from: from, earlier: clientIDsOf(options)}
	}
	return nil
}

// pendingReplay is a replay that waits to run.
type pendingReplay struct {
	topic, name string // of the subscription key
	replay      *replay
}

// startReplays runs the replays of new subscriptions, one after another, on another goroutine. They
// wait while a request to subscribe is in progress. subsMu is held.
func (c *Client) startReplays() {
	if len(c.replays) > 0 && !c.replaying && !c.resubscribe {
		c.replaying = true
		c.notifier.replaying.Go(c.runReplays)
	}
}

func (c *Client) runReplays() {
	defer c.guard("replaying the history of a topic")
	for {
		c.subsMu.Lock()
		if c.replaying = len(c.replays) > 0 && !c.resubscribe; !c.replaying {
			c.subsMu.Unlock()
			return
		}
		next := c.replays[0]
		c.replays = c.replays[1:]
		c.subsMu.Unlock()
		c.runReplay(next)
	}
}

// runReplay queues pages as fast as the connection takes them, until the subscription is live or
// has ended.
func (c *Client) runReplay(p pendingReplay) {
	if p.replay.isState {
		if !p.replay.resumes {
			c.sendState(p)
			return
		}
		c.notifier.replaying.Go(func() { // those who were there come back, too, and the other replays do not wait
			defer c.guard("telling who is present")
			c.carrier.AwaitOthers()
			c.notifier.awaitTold(p.topic[len(PresencePrefix):], c.conn.Done()) // the state is what was told, and has all of them then
			c.sendState(p)
		})
		return
	}
	n := c.notifier
	from, gap := p.replay.from, false
	for c.conn.AwaitRoom() {
		page, err := c.readPage(p, from)
		if err != nil {
			n.app.Logger().Error("Failed to replay the history of a topic", slog.String("topic", p.topic), slog.String("error", err.Error()))
			page = &history.Page{}
		}
		who := c.identity()
		frames, gapAfter := c.framesOf(p, page, who, gap || !page.Complete)
		switch c.queuePage(p, page, frames, who, gapAfter) {
		case pageOver:
			return
		case pageQueued:
			next := page.Next()
			from, gap = Start{Since: &next}, gapAfter
		}
	}
}

// readPage reads the page that begins at from.
func (c *Client) readPage(p pendingReplay, from Start) (*history.Page, error) {
	n := c.notifier
	n.replaySlots <- struct{}{}
	defer func() { <-n.replaySlots }()
	if from.Rewind {
		// The last messages are those before the subscription, no matter how long it takes to get
		// here. What is in the log now has been delivered. Exclude it from the first message on
		// that came after the subscription.
		head, err := n.history.Settled(p.topic)
		if err != nil {
			return nil, err
		}
		stripe := n.index.stripe(p.topic)
		stripe.mu.Lock()
		if r := p.replay; r.firstOut > 0 && r.outEpoch == head.Epoch {
			head.Seq = min(head.Seq, r.firstOut-1)
		}
		stripe.mu.Unlock()
		from = from.Before(head)
	}
	return n.history.Read(p.topic, from, max(1, n.config.QueueSize/conn.PageShare), min(MaxPageBytes, n.config.QueueBytes/conn.PageShare))
}

// framesOf returns the messages of page that are meant for who. gap says that messages before them
// are missing; framesOf returns it as true if no frame could announce that.
func (c *Client) framesOf(p pendingReplay, page *history.Page, who *identity, gap bool) ([]*conn.Frame, bool) {
	n := c.notifier
	see := n.newViewer(context.Background(), reader{who, c.conn.ID(), p.replay.earlier})
	restricted := n.isRestricted(p.topic)
	frames := make([]*conn.Frame, 0, len(page.Entries))
	for _, entry := range page.Entries {
		pub, verdict, err := see.read(entry)
		if err != nil {
			n.app.Logger().Error("Failed to replay a message", slog.String("topic", p.topic), slog.String("error", err.Error()))
		}
		if verdict != forViewer {
			gap = gap || verdict == forWhom
			continue
		}
		data := pub.Data
		if !p.replay.plain {
			if data, err = pub.envelopeOn(page, gap); err != nil {
				gap = true
				continue
			}
			gap = false
		}
		private := restricted || pub.to != nil && pub.to.looksAtAuth
		frames = append(frames, conn.NewFrame(p.name, data, private).Marked(conn.Mark{Epoch: page.Epoch, Seq: pub.Seq}).Paged())
	}
	return frames, gap
}

// pageOutcome is what became of a page.
type pageOutcome int

const (
	pageQueued pageOutcome = iota // more pages follow
	pageAgain                     // the page must be read again, for somebody else
	pageOver                      // the replay is over
)

// queuePage queues a page that was prepared for who.
func (c *Client) queuePage(p pendingReplay, page *history.Page, frames []*conn.Frame, who *identity, gap bool) pageOutcome {
	s := c.subscriptionTo(p.topic)
	if s == nil {
		return pageOver
	}
	stripe := c.notifier.index.stripe(p.topic)
	stripe.mu.Lock()
	defer stripe.mu.Unlock()
	r := p.replay
	at := slices.IndexFunc(s.keys, func(key subscriptionKey) bool { return key.replay == r })
	if s.at < 0 || at < 0 {
		return pageOver // unsubscribed, or denied
	}
	goLive := func(missing bool) pageOutcome {
		r.live, r.epoch, r.reached, r.gap = true, page.Epoch, page.Last, missing
		if epoch := cmp.Or(page.Epoch, c.notifier.history.Epoch()); c.carrier != nil && epoch != "" && c.CanResume() && c.notifier.HasHistory(p.topic) { // also if none of the messages were for the client
			c.putMark(p.name, conn.Mark{Epoch: epoch, Seq: page.Last})
		}
		if r.plain && missing { // nothing can tell it but a new connection
			r.gap = false
			c.conn.Finish(DisconnectGap)
		}
		return pageOver
	}
	now := c.identity()
	switch {
	case !s.keys[at].grant.holds(now):
		return goLive(true) // it gets nothing, until the rules allow it
	case now.user != who.user:
		return pageAgain
	}

	isReady := false
	c.conn.AllowExcess() // a message may be larger than the queue
	for _, f := range frames {
		outcome := c.conn.Enqueue(f)
		if outcome < conn.Queued {
			return pageOver
		}
		isReady = isReady || outcome == conn.Ready
	}
	if isReady {
		c.notifier.conns.Write(&c.conn)
	}
	c.notifier.stats.replayed.Add(int64(len(frames)))
	switch {
	case page.Epoch == "": // there is no history, or none that can be read
		return goLive(gap || r.leftOut > 0)
	case r.leftOut > 0 && r.outEpoch != page.Epoch:
		if n := c.notifier; n.history.Epoch() != page.Epoch {
			return pageQueued // the log has started over since the page was read
		}
		return goLive(true)
	case page.Last >= page.Head && r.leftOut <= page.Last:
		return goLive(gap)
	}
	return pageQueued
}
