//go:build unix

// The scenarios of requests: messages that are sent over HTTP, and clients that all come back.

package main

import (
	"bytes"
	"fmt"
	"io"
	"net/url"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// sendOverHTTP sends to one subscriber: one message after another, and then many at a time. The snippet does so by a
// route that asks for a superuser, Herald by its own, to a topic without history ("herald") or with ("history"), or as
// a user whom a rule lets publish ("publish").
func sendOverHTTP(atOnce int) func(w *world, n int) (map[string]float64, error) {
	return func(w *world, _ int) (map[string]float64, error) {
		var token string
		path, kind := "/api/notify", w.process.Args[2]
		switch kind {
		case "snippet":
			path = "/bench/send-as-superuser"
		case "publish":
			path, token = "/api/notify/publish", w.token
		}
		if token == "" {
			if err := w.get("/bench/superuser", &token); err != nil {
				return nil, err
			}
		}
		if err := w.subscribe(1, "bench", true); err != nil {
			return nil, err
		}
		send := func() error {
			data := fmt.Sprintf(`{"t":%d,"text":"%s"}`, time.Now().UnixNano(), text)
			return w.postAs(token, path, map[string]any{"topic": "bench", "data": rawJSON(data)})
		}
		const paced, count = 2000, 20_000
		for range 100 { // warm
			if err := send(); err != nil {
				return nil, err
			}
		}
		before, err := w.usage(true)
		if err != nil {
			return nil, err
		}
		for range paced {
			if err := send(); err != nil {
				return nil, err
			}
		}
		one, err := w.usage(false)
		if err != nil {
			return nil, err
		}
		took, err := inParallel(atOnce, count/atOnce, send)
		if err != nil {
			return nil, err
		}
		many, err := w.usage(false)
		if err != nil {
			return nil, err
		}
		if err := w.await(int64(100+paced+count/atOnce*atOnce), patience); err != nil {
			return nil, err
		}
		return map[string]float64{
			"CPU µs per message, one at a time":                     microseconds(one, before) / paced,
			fmt.Sprintf("CPU µs per message, %d at a time", atOnce): microseconds(many, one) / count,
			"messages per second":                                   count / took.Seconds(),
		}, nil
	}
}

// inParallel calls send the given number of times from each of atOnce goroutines.
func inParallel(atOnce, times int, send func() error) (took time.Duration, err error) {
	began := time.Now()
	var group errgroup.Group
	for range atOnce {
		group.Go(func() error {
			for range times {
				if err := send(); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err = group.Wait()
	return time.Since(began), err
}

// sinceKey is the key of a subscription that begins behind a position.
func sinceKey(topic, position string) string {
	return topic + "?options=" + url.QueryEscape(`{"query":{"since":"`+position+`"}}`)
}

// comeback lets n clients connect and subscribe, drop, and come back at once. A "guest" has no
// token; a "member" is signed in, on a topic with a rule, and has missed 10 messages.
func comeback(isMember bool) func(w *world, n int) (map[string]float64, error) {
	return func(w *world, n int) (map[string]float64, error) {
		topic, position := "open", ""
		tokens := make([]string, n)
		if isMember {
			topic = "members/1"
			if err := w.get(fmt.Sprintf("/bench/tokens?n=%d", n), &tokens); err != nil {
				return nil, err
			}
			if w.process.Args[2] == "herald" {
				if err := w.get("/bench/miss?topic="+topic, &position); err != nil {
					return nil, err
				}
			}
		}
		key := topic
		if position != "" {
			key = sinceKey(topic, position)
		}
		var caughtUp atomic.Int64
		c := &crowd{world: w}
		come := func(i int) (io.Closer, error) {
			s, body, rest, err := c.open(tokens[i])
			if err != nil {
				return nil, err
			}
			go func() {
				if awaitMissed(io.MultiReader(bytes.NewReader(rest), body), position != "") {
					caughtUp.Add(1)
				}
			}()
			return s.conn, c.set(s, key)
		}
		var before, after usage
		var took time.Duration
		for round := range 2 { // the first one warms
			conns := make([]io.Closer, n)
			var err error
			if before, err = w.usage(true); err != nil {
				return nil, err
			}
			caughtUp.Store(0)
			began := time.Now()
			if err := each(n, func(i int) error {
				conns[i], err = come(i)
				return err
			}); err != nil {
				return nil, err
			}
			for position != "" && caughtUp.Load() < int64(n) {
				if time.Since(began) > patience {
					return nil, fmt.Errorf("%w: %d of %d clients caught up", errTimeout, caughtUp.Load(), n)
				}
				time.Sleep(time.Millisecond)
			}
			took = time.Since(began)
			if after, err = w.usage(false); err != nil {
				return nil, err
			}
			for _, conn := range conns {
				conn.Close()
			}
			if round == 0 {
				time.Sleep(2 * time.Second) // until the server has noticed
			}
		}
		return map[string]float64{
			"CPU µs per client":      microseconds(after, before) / float64(n),
			"seconds until all came": took.Seconds(),
		}, nil
	}
}

// awaitMissed reads until the last of 10 missed messages, if there are any. The rest is read in the background.
func awaitMissed(body io.Reader, hasMissed bool) bool {
	buffer := make([]byte, 16<<10)
	var read []byte
	for hasMissed {
		n, err := body.Read(buffer)
		read = append(read, buffer[:n]...)
		if bytes.Contains(read, []byte(`"data":10`)) {
			go io.Copy(io.Discard, body)
			return true
		}
		if err != nil {
			return false
		}
	}
	go io.Copy(io.Discard, body)
	return true
}

// retries are the pauses after which PocketBase's JavaScript SDK tries to connect again, in milliseconds.
var retries = []int{200, 300, 500, 1000, 1200, 1500, 2000}

// pauseBefore returns the pause before the next try.
func pauseBefore(try int) time.Duration {
	return time.Duration(retries[min(try, len(retries)-1)]) * time.Millisecond
}

// allAtOnce lets n users drop and come back in the same moment, as after the restart of a proxy, while
// 100 messages a second go to 100 others. On Herald they come back to a topic with a rule, and have missed 10
// messages there.
func allAtOnce(w *world, n int) (map[string]float64, error) {
	var tokens []string
	if err := w.get(fmt.Sprintf("/bench/tokens?n=%d", n), &tokens); err != nil {
		return nil, err
	}
	key, position := "members/1", ""
	if w.process.Args[2] == "herald" {
		if err := w.get("/bench/miss?topic="+key, &position); err != nil {
			return nil, err
		}
		key = sinceKey(key, position)
	}
	others, err := startProbe(w, "bench", 100)
	if err != nil {
		return nil, err
	}
	defer others.stop()
	c := &crowd{world: w}
	var failed atomic.Int64
	come := func(i int) (io.Closer, error) {
		for try := 0; ; try++ {
			s, body, rest, err := c.open(tokens[i])
			if err == nil {
				if err = c.set(s, key); err == nil {
					if awaitMissed(io.MultiReader(bytes.NewReader(rest), body), position != "") {
						return s.conn, nil
					}
					err = io.ErrUnexpectedEOF
				}
				s.conn.Close()
			}
			if failed.Add(1); try == 100 {
				return nil, err
			}
			time.Sleep(pauseBefore(try))
		}
	}
	var took time.Duration
	var before, after usage
	var p50, p99 float64
	for round := range 2 { // the first one warms
		conns := make([]io.Closer, n)
		if before, err = w.usage(true); err != nil {
			return nil, err
		}
		failed.Store(0)
		if round == 1 {
			if err := others.begin(); err != nil {
				return nil, err
			}
		}
		began := time.Now()
		var coming errgroup.Group
		for i := range n {
			coming.Go(func() (err error) {
				conns[i], err = come(i)
				return err
			})
		}
		if err := coming.Wait(); err != nil {
			return nil, err
		}
		took = time.Since(began)
		if round == 1 {
			if p50, p99, err = others.end(); err != nil {
				return nil, err
			}
		}
		if after, err = w.usage(false); err != nil {
			return nil, err
		}
		for _, conn := range conns {
			conn.Close()
		}
		if round == 0 {
			time.Sleep(3 * time.Second) // until the server has noticed
		}
	}
	return map[string]float64{
		"CPU µs per client":        microseconds(after, before) / float64(n),
		"seconds until all came":   took.Seconds(),
		"failed attempts":          float64(failed.Load()),
		"p50 ms of other messages": p50,
		"p99 ms of other messages": p99,
	}, nil
}
