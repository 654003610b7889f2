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

// sendOverHTTP sends to one subscriber with a superuser's token: one message after another, and then
// 32 at a time. Herald does so by its own route, the snippet by one that asks for a superuser.
func sendOverHTTP(w *world, _ int) (map[string]float64, error) {
	var token string
	if err := w.get("/bench/superuser", &token); err != nil {
		return nil, err
	}
	if err := w.subscribe(1, "bench", true); err != nil {
		return nil, err
	}
	path := "/api/notify"
	if w.process.Args[2] == "snippet" {
		path = "/bench/send-as-superuser"
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
	began := time.Now()
	var group errgroup.Group
	for range 32 {
		group.Go(func() error {
			for range count / 32 {
				if err := send(); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	took := time.Since(began)
	many, err := w.usage(false)
	if err != nil {
		return nil, err
	}
	if err := w.await(int64(100+paced+count/32*32), patience); err != nil {
		return nil, err
	}
	return map[string]float64{
		"CPU µs per message, one at a time": microseconds(one, before) / paced,
		"CPU µs per message, 32 at a time":  microseconds(many, one) / count,
		"messages per second":               count / took.Seconds(),
	}, nil
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
			key += "?options=" + url.QueryEscape(`{"query":{"since":"`+position+`"}}`)
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
			if err := c.each(n, func(i int) error {
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

// awaitMissed reads until the last of 10 missed messages, and then until the end.
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
	io.Copy(io.Discard, body)
	return false
}
