//go:build unix

// The scenarios of presence: many come, leave, or come back after a restart, while others watch.

package main

import (
	"bufio"
	"bytes"
	"encoding/json/v2"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// room is the topic on which everybody is.
const room = "room/1"

// crowd is users who come to the room, and watchers, who get messages about that and ordinary ones.
type crowd struct {
	world  *world
	kind   string
	tokens []string

	users    []seat
	watchers []*watcher
}

// seat is a connection that reads nothing of interest.
type seat struct {
	id    string
	token string
	conn  io.Closer
}

// watcher counts what it is told.
type watcher struct {
	frames, bytes, leaves atomic.Int64
	total                 atomic.Int64 // of the room, as it was told last
	lowest                atomic.Int64 // total since somebody has set it
	latencies             []time.Duration
	done                  chan struct{}
}

func newCrowd(w *world, users, watchers int) (*crowd, error) {
	c := &crowd{world: w, kind: w.process.Args[2]}
	if err := w.get("/bench/tokens?n="+strconv.Itoa(users), &c.tokens); err != nil {
		return nil, err
	}
	return c, c.watch(watchers)
}

func (w *world) get(path string, answer any) error {
	response, err := w.client.Get(w.base + path)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	return json.UnmarshalRead(response.Body, answer)
}

// open opens a connection.
func (c *crowd) open(token string) (s seat, body io.Reader, rest []byte, err error) {
	body, closer, err := c.world.connect(false)
	if err != nil {
		return s, nil, nil, err
	}
	id, rest, err := clientID(body)
	return seat{id, token, closer}, body, rest, err
}

func (c *crowd) set(s seat, topics ...string) error {
	return c.world.postAs(s.token, "/api/realtime", map[string]any{"clientId": s.id, "subscriptions": topics})
}

// watch opens n watchers. Where there is no presence they get the ordinary messages only.
func (c *crowd) watch(n int) error {
	c.watchers = make([]*watcher, n)
	topics := []string{"bench"}
	if c.kind == "presence" {
		topics = append(topics, "@presence/"+room)
	}
	return each(n, func(i int) error {
		s, body, rest, err := c.open("")
		if err != nil {
			return err
		}
		c.watchers[i] = &watcher{done: make(chan struct{})}
		c.watchers[i].total.Store(-1)
		go c.watchers[i].read(io.MultiReader(bytes.NewReader(rest), body))
		c.world.closeLater(s.conn)
		return c.set(s, topics...)
	})
}

// each calls f for 0 to n-1, 32 at a time.
func each(n int, f func(i int) error) error {
	var group errgroup.Group
	group.SetLimit(32)
	for i := range n {
		group.Go(func() error { return f(i) })
	}
	return group.Wait()
}

// connect opens a connection for each user. They are not on the topic yet.
func (c *crowd) connect() error {
	c.users = make([]seat, len(c.tokens))
	return each(len(c.users), func(i int) error { return c.connectOne(i) })
}

func (c *crowd) connectOne(i int) error {
	s, body, _, err := c.open(c.tokens[i])
	if err != nil {
		return err
	}
	c.users[i] = s
	c.world.closeLater(s.conn)
	go io.Copy(io.Discard, body)
	return nil
}

func (r *watcher) read(body io.Reader) {
	defer close(r.done)
	lines := bufio.NewScanner(body)
	lines.Buffer(make([]byte, 0, 16<<10), 4<<20)
	isPresence := false
	for lines.Scan() {
		line := lines.Bytes()
		switch {
		case bytes.HasPrefix(line, []byte("event:")):
			isPresence = bytes.Contains(line, []byte("@presence/"))
		case !bytes.HasPrefix(line, []byte("data:")):
		case isPresence:
			r.frames.Add(1)
			r.bytes.Add(int64(len(line)))
			if bytes.Contains(line, []byte(`"leave":["`)) {
				r.leaves.Add(1)
			}
			if total, ok := numberAfter(line, `"total":`); ok {
				r.total.Store(total)
				for lowest := r.lowest.Load(); total < lowest && !r.lowest.CompareAndSwap(lowest, total); {
					lowest = r.lowest.Load()
				}
			}
		default:
			if sent, ok := numberAfter(line, `{"t":`); ok {
				r.latencies = append(r.latencies, time.Duration(time.Now().UnixNano()-sent))
			}
		}
	}
}

func numberAfter(line []byte, marker string) (int64, bool) {
	_, rest, found := bytes.Cut(line, []byte(marker))
	end := 0
	for end < len(rest) && rest[end] >= '0' && rest[end] <= '9' {
		end++
	}
	number, err := strconv.ParseInt(string(rest[:end]), 10, 64)
	return number, found && err == nil
}

// awaitTotal waits until all watchers know that n are present.
func (c *crowd) awaitTotal(n int) error {
	if c.kind != "presence" {
		return nil
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if !slices.ContainsFunc(c.watchers, func(r *watcher) bool { return r.total.Load() != int64(n) }) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w: the total of the first watcher is %d, want %d", errTimeout, c.watchers[0].total.Load(), n)
		}
	}
}

// close ends all connections, and returns what the watchers were told on average, and the
// percentiles of the ordinary messages.
func (c *crowd) close() map[string]float64 {
	c.world.leaving.Store(true)
	c.world.closersMu.Lock()
	defer c.world.closersMu.Unlock()
	for _, closer := range c.world.closers {
		closer.Close()
	}
	measures := map[string]float64{}
	var latencies []time.Duration
	for _, r := range c.watchers {
		<-r.done
		count := float64(len(c.watchers))
		measures["messages per watcher"] += float64(r.frames.Load()) / count
		measures["KiB per watcher"] += float64(r.bytes.Load()) / count / 1024
		measures["leaves per watcher"] += float64(r.leaves.Load()) / count
		latencies = append(latencies, r.latencies...)
	}
	if len(latencies) > 0 {
		measures["p50 ms of other messages"], measures["p99 ms of other messages"] = percentiles(latencies)
	}
	return measures
}

// storm lets n users join a topic with n watchers within 10 seconds, while ten ordinary messages per
// second are sent.
func storm(w *world, n int) (map[string]float64, error) {
	c, err := newCrowd(w, n, n)
	if err != nil {
		return nil, err
	}
	if err := c.connect(); err != nil {
		return nil, err
	}
	before, err := w.usage(true)
	if err != nil {
		return nil, err
	}
	for _, r := range c.watchers { // not the state
		r.frames.Store(0)
		r.bytes.Store(0)
	}
	var group errgroup.Group
	group.Go(func() error {
		for range 100 {
			if err := w.send("bench", 0); err != nil {
				return err
			}
			time.Sleep(100 * time.Millisecond)
		}
		return nil
	})
	ticker := time.NewTicker(10 * time.Second / time.Duration(n))
	defer ticker.Stop()
	for _, user := range c.users {
		<-ticker.C
		group.Go(func() error { return c.set(user, room) })
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if err := c.awaitTotal(n); err != nil {
		return nil, err
	}
	after, err := w.usage(true)
	if err != nil {
		return nil, err
	}
	measures := c.close()
	measures["CPU ms per second"] = microseconds(after, before) / 1000 / 10
	return measures, nil
}

// comeAndGo lets n users join at once, and then leave, with 100 watchers.
func comeAndGo(w *world, n int) (map[string]float64, error) {
	c, err := newCrowd(w, n, 100)
	if err != nil {
		return nil, err
	}
	if err := c.connect(); err != nil {
		return nil, err
	}
	before, err := w.usage(true)
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	if err := each(n, func(i int) error { return c.set(c.users[i], room) }); err != nil {
		return nil, err
	}
	joined := time.Since(begin)
	if err := c.awaitTotal(n); err != nil {
		return nil, err
	}
	settled := time.Since(begin)
	there, err := w.usage(true)
	if err != nil {
		return nil, err
	}
	begin = time.Now()
	if err := each(n, func(i int) error { return c.set(c.users[i]) }); err != nil {
		return nil, err
	}
	left := time.Since(begin)
	if err := c.awaitTotal(0); err != nil {
		return nil, err
	}
	after, err := w.usage(false)
	if err != nil {
		return nil, err
	}
	measures := c.close()
	measures["seconds to join"], measures["seconds to leave"] = joined.Seconds(), left.Seconds()
	measures["seconds until all watchers know"] = settled.Seconds()
	measures["heap bytes per user"] = float64(there.Heap-before.Heap) / float64(n)
	measures["CPU µs per user who joins and leaves"] = microseconds(after, before) / float64(n)
	return measures, nil
}

// restart kills the server with n users and 100 watchers on the topic, and lets all of them come
// back as fast as they can.
func restart(w *world, n int) (map[string]float64, error) {
	c, err := newCrowd(w, n, 100)
	if err != nil {
		return nil, err
	}
	join := func(i int) error {
		if err := c.connectOne(i); err != nil {
			return err
		}
		return c.set(c.users[i], room)
	}
	c.users = make([]seat, n)
	if err := each(n, join); err != nil {
		return nil, err
	}
	if err := c.awaitTotal(n); err != nil {
		return nil, err
	}
	if err := w.restart(); err != nil {
		return nil, err
	}
	leaves := int64(0)
	for _, r := range c.watchers {
		<-r.done
		leaves += r.leaves.Load()
	}
	began := time.Now()
	var group errgroup.Group
	group.Go(func() error { return c.watch(len(c.watchers)) })
	group.Go(func() error { return each(n, join) })
	if err := group.Wait(); err != nil {
		return nil, err
	}
	back := time.Since(began)
	if err := c.awaitTotal(n); err != nil {
		return nil, err
	}
	settled := time.Since(began)
	measures := c.close()
	measures["leaves per watcher"] += float64(leaves)
	measures["seconds until all are back"] = back.Seconds()
	measures["seconds until all watchers know"] = settled.Seconds()
	return measures, nil
}

// restart kills the server and starts it again, on the same address and data.
func (w *world) restart() error {
	w.process.Process.Kill()
	w.process.Wait()
	process := exec.Command(w.process.Path, w.process.Args[1:]...)
	process.Stderr = os.Stderr
	w.process = process
	w.client.CloseIdleConnections()
	if err := process.Start(); err != nil {
		return err
	}
	return w.awaitStart()
}
